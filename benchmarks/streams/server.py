"""Server of `octavo bench streams`: the real engine and API servers with a worker that sleeps.

`python -P -m octavo.benchmarks.streams.server REQUESTS SLEEP_MS` prints the ready line, serves
until SIGTERM, and then prints its record of each step as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import string
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from octavo.engine.async_llm import AsyncLLM
from octavo.engine.config.engine_config import EMBEDDED_MODEL
from octavo.engine.input.tokenizer import TextTokenizer
from octavo.engine.runner.batch import BatchResult
from octavo.engine.server.grpc_api.server import ready_line, serve
from octavo.engine.server.http_api.server import HttpServer

from ..fakes.sleeping_worker import TOKENS
from ..step_overhead import sleeping

# Characters sampled by consecutive steps, one token each, so that a text identifies its steps.
LETTERS = string.ascii_letters + string.digits + string.punctuation
KEEP = 1 << 36  # bytes of KV cache; a sleeping worker does not allocate it


class StepLog:
    """Records a row when each step's result arrives.

    A row is [time, CPU seconds of the step thread, of these for building deltas, of these for
    delivering them, CPU seconds of the server thread]; all but the time are cumulative.
    """

    def __init__(self, engine: AsyncLLM) -> None:
        self.rows: list[tuple[float, ...]] = []
        self._making = self._handing = 0.0
        self._serving = time.pthread_getcpuclockid(threading.get_ident())
        inner: Any = engine.engine
        inner.group.receive = self._watched(inner.group.receive)
        inner.requests.deltas = self._timed(inner.requests.deltas, "_making")
        steps: Any = engine._steps
        steps._deliver = self._timed(steps._deliver, "_handing")

    def _watched(self, receive: Callable[[], BatchResult]) -> Callable[[], BatchResult]:
        def watched() -> BatchResult:
            result = receive()
            spent = (time.thread_time(), self._making, self._handing)
            self.rows.append((time.monotonic(), *spent, time.clock_gettime(self._serving)))
            return result

        return watched

    def _timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = time.thread_time()
            try:
                return call(*args)
            finally:
                setattr(self, name, getattr(self, name) + time.thread_time() - began)

        return timed


def main(num_requests: int, sleep_ms: float) -> int:
    tokenizer = TextTokenizer(EMBEDDED_MODEL).backend
    os.environ[TOKENS] = ",".join(str(tokenizer.token_to_id(letter)) for letter in LETTERS)
    settings: dict[str, Any] = {
        "max_num_seqs": num_requests,
        "max_num_batched_tokens": 64 * num_requests + 16384,
        "kv_cache_memory_bytes": KEEP,
    }
    with sleeping(sleep_ms), AsyncLLM(**settings) as engine:
        seen = StepLog(engine)

        def on_ready(address: str, http_address: str) -> None:
            print(ready_line(engine, address, http_address), flush=True)

        http = HttpServer("127.0.0.1", 0)
        status = asyncio.run(serve(engine, "127.0.0.1", 0, on_ready, http=http))
    print(json.dumps(seen.rows))
    return status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))
