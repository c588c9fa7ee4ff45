"""The encode units of a request, in prompt order, as they are made.

A thread makes them; the step thread takes them. A video's later frames are still being decoded
while its first are computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from ..input_error import InputError
from .item import UnitContent


class UnitStream:
    """Units that come from `source`, which `run` goes through. Thread-safe but for `run`."""

    def __init__(self, source: Iterator[UnitContent]) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._ready: list[UnitContent] = []
        self._is_done = self._is_cancelled = False
        self.error: InputError | None = None  # set before the stream is done
        self.on_arrival: Callable[[], None] = lambda: None  # called by the thread that makes them

    @property
    def is_done(self) -> bool:
        """No more units come than `take` gives."""
        return self._is_done

    def finish(self) -> tuple[UnitContent, ...]:
        """Makes all that are left and gives them, in the caller's thread. Raises `InputError`."""
        return tuple(self._source)

    def run(self) -> None:
        """Makes all that are left. An error is kept for who takes them."""
        try:
            for unit in self._source:
                if self._is_cancelled:
                    break
                with self._lock:
                    self._ready.append(unit)
                self.on_arrival()
        except InputError as error:
            self.error = error
        except Exception as error:  # a fault of ours: the request's alone all the same
            self.error = InputError("prompt", f"its media could not be made: {error!r}")
        finally:
            self._is_done = True
            self.on_arrival()

    def take(self) -> list[UnitContent]:
        """What has come since the last call."""
        with self._lock:
            taken, self._ready = self._ready, []
        return taken

    def cancel(self) -> None:
        """Nobody wants the rest: `run` stops after the unit in hand."""
        self._is_cancelled = True
