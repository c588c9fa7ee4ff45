"""A client process of the soak: `python -P -m octavo.benchmarks.soak.clients SETTINGS`.

Threads send requests chosen by a seeded generator at a fixed rate. Lines on stdin pause and resume
them; every few seconds a line of JSON on stdout reports counts and failures.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import bad, good
from .caller import Caller, FirstAnswers
from .media import make_media

REPORT_INTERVAL = 5.0  # seconds
MAX_FAILURES = 50  # number of failure texts kept


@dataclass(frozen=True)
class Case:
    """A kind of request, chosen with probability proportional to `weight`."""

    kind: str  # "good", "bad" or "leaving"
    run: Callable[[Caller, random.Random], None]
    weight: int = 1

    @property
    def name(self) -> str:
        return self.run.__name__


CASES = (
    Case("good", good.chat_text, 4),
    Case("good", good.chat_image, 4),
    Case("good", good.chat_new_image, 2),
    Case("good", good.chat_video, 1),
    Case("good", good.chat_options, 2),
    Case("good", good.chat_schema, 2),
    Case("good", good.chat_tools, 2),
    Case("good", good.chat_turns, 2),
    Case("good", good.completions, 2),
    Case("good", good.tokens, 1),
    Case("good", good.watching, 1),
    Case("good", good.grpc_text, 4),
    Case("good", good.grpc_media, 3),
    Case("good", good.grpc_structured, 2),
    Case("bad", bad.bad_fields, 2),
    Case("bad", bad.bad_bodies, 1),
    Case("bad", bad.bad_http, 1),
    Case("bad", bad.bad_media, 2),
    Case("bad", bad.bad_keys, 1),
    Case("bad", bad.bad_grpc, 2),
    Case("leaving", bad.leave_upload, 1),
    Case("leaving", bad.leave_stream, 2),
    Case("leaving", bad.leave_media, 2),
    Case("leaving", bad.leave_in_time, 1),
    Case("leaving", bad.leave_grpc, 2),
)


@dataclass(frozen=True)
class Settings:
    grpc_address: str
    http_address: str
    api_key: str
    folder: str  # folder of the media files
    seed: int
    rate: float  # cases per second
    num_threads: int
    cases: tuple[str, ...] = ()  # by name; empty: all


class Clients:
    """The client threads of this process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._chosen = [c for c in CASES if not settings.cases or c.name in settings.cases]
        self._media = make_media(Path(settings.folder))
        self._answers = FirstAnswers()
        self._going, self._over = threading.Event(), threading.Event()
        self._going.set()
        self._lock = threading.Lock()
        self._num_active = 0
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def run(self) -> None:
        """Send requests until stdin closes."""
        numbers = range(self._settings.num_threads)
        threads = [threading.Thread(target=self._work, args=(number,)) for number in numbers]
        threads += [threading.Thread(target=self._report, daemon=True)]
        for thread in threads:
            thread.start()
        for line in sys.stdin:
            self._going.clear() if line.strip() == "pause" else self._going.set()
        self._over.set()
        self._going.set()
        for thread in threads[:-1]:
            thread.join()
        self._print()

    def _work(self, number: int) -> None:
        settings = self._settings
        rng = random.Random(f"{settings.seed}/{number}")
        addresses = (settings.grpc_address, settings.http_address, settings.api_key)
        caller = Caller(*addresses, self._media, self._answers, rng)
        pause = settings.num_threads / settings.rate
        weights = [case.weight for case in self._chosen]
        while not self._over.is_set():
            if not self._going.is_set():
                caller.close()
                self._going.wait()
                continue
            case = rng.choices(self._chosen, weights)[0]
            began = time.monotonic()
            with self._lock:
                self._num_active += 1
            self._try(case, caller, rng)
            with self._lock:
                self._num_active -= 1
            left = began + pause * (0.5 + rng.random()) - time.monotonic()
            if left > 0:
                time.sleep(left)
        caller.close()

    def _try(self, case: Case, caller: Caller, rng: random.Random) -> None:
        failure = ""
        try:
            case.run(caller, rng)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error}"[:600]
            failure = f"{time.strftime('%H:%M:%S')} {case.name} {place.name}: {text}"
            caller.close()
        with self._lock:
            self.counts[case.name] += 1
            if failure:
                self.counts[f"failed {case.kind}"] += 1
                self.failures = [*self.failures[:MAX_FAILURES], failure]

    def _report(self) -> None:
        while not self._over.wait(REPORT_INTERVAL):
            self._print()

    def _print(self) -> None:
        with self._lock:
            found = {
                "counts": dict(self.counts),
                "failures": self.failures,
                "num_active": self._num_active,
                "is_paused": not self._going.is_set(),
            }
        print(json.dumps(found), flush=True)


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    given: dict[str, Any] = json.loads(sys.argv[1])
    Clients(Settings(**{**given, "cases": tuple(given.get("cases", ()))})).run()


if __name__ == "__main__":
    main()
