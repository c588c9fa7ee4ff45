"""A thread pool that does not keep the interpreter from exiting."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from .lifetime import join_at_exit

T = TypeVar("T")
Task = tuple[Future[Any], Callable[[], Any]]


class DaemonPool:
    """Thread pool with at most `size` daemon threads, started on demand.

    `concurrent.futures.ThreadPoolExecutor` joins its threads when the interpreter exits, before
    exit hooks can stop their work.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size, self._name = size, name
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._num_unfinished = 0  # queued and running tasks
        self._is_closed = False
        join_at_exit(self)

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Schedule a call. Raises RuntimeError if the pool is closed."""
        future: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the thread pool is closed")
            if self._num_unfinished >= len(self._threads) < self._size:
                self._start_thread()
            self._num_unfinished += 1
            self._tasks.put((future, lambda: function(*args)))
        return future

    def _start_thread(self) -> None:
        name = f"{self._name}_{len(self._threads)}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        """Cancel queued tasks, and end each thread after its current call, without waiting."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            cancelled = self._take_all()
            for _ in self._threads:
                self._tasks.put(None)
        for future, _ in cancelled:
            future.cancel()

    def _take_all(self) -> list[Task]:
        found: list[Task] = []
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                return found
            if task is not None:
                found.append(task)

    def join(self, deadline: float) -> None:
        """Close the pool, and wait for its threads until `deadline` (monotonic time)."""
        self.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            _run_task(*task)
            del task
            with self._lock:
                self._num_unfinished -= 1


def _run_task(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
