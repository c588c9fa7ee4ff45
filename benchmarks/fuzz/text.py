"""Fuzz tokenization with difficult texts, and measure the longest time a call holds the GIL.

    python -m octavo.benchmarks.fuzz.text [--tokenizer FOLDER] [--seed 0] [--seconds 60]

Random texts of all Unicode categories, runs without split points and characters that expand under
NFC are tokenized as in a server. Token ids are compared with those of the unsplit text; reports the
longest GIL hold and CPU time of each kind of text.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ...engine.errors import InputError
from ...engine.input import pieces
from ...engine.input.tokenizer import TextBudget, TextTokenizer
from ..fakes.tiny_tokenizer import SPECIAL_TOKENS, write_tokenizer

TICK = 0.001  # polling interval of a watcher, in seconds
WORDS = (
    "the quick brown fox ",
    "def f(x): return x\n",
    "das größte ",
    "naïve 1234, ",
    "中文。你好，",
)

# Repeated texts that were slow, large or had no split point.
RUNS = {
    "digits": "1",
    "one letter": "a",
    "expands under NFC": "\ufb2c",
    "musical, expands 3x under NFC": "\U0001d160",
    "marks": "\u0301\u0323\u0327",
    "jamo": "\u1100\u1161\u11a8",
    "ideographs": "中",
    "emoji": "😀",
    "dashes": "-",
    "spaces": " ",
    "line breaks": "\n",
    "spaces and line breaks": " \n",
    "contractions": "'s",
    "words": WORDS[0],
    "mixed": "".join(WORDS),
    "added tokens": "<|im_end|>",
    "almost added tokens": "<|im_en",
    "DNA": "ACGGTTAC",
}


@cache
def alphabets() -> tuple[str, ...]:
    """Return alphabets to sample from: characters relevant to the pre-tokenizer or NFC, and all."""
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, sys.maxunicode + 1))))
    assigned = "".join(c for c in every if unicodedata.category(c) not in ("Cn", "Co"))
    return (
        " \t\n\r\x0b\x85\xa0\u2028\u3000\x1c\u200b",
        "\n\r ",
        "0123456789٠١²½ⅷ",
        "abcXYZäß",
        "'sStTrReEvVmMlLdDſ ",
        "\u0301\u0323\u0338\u0345\u093c\u3099",
        "\u1100\u1161\u11a8\uac00",
        "\ufb2c\u0958\u212a\u037e\u1fef\u2000",
        "<=>!?,.-_",
        "中文。，、一",
        "😀🙂👍🏽\u200d\ufe0f",
        "กขา่ ",
        assigned,
        every,
    )


def random_text(rng: random.Random, size: int) -> str:
    """Return about `size` characters, in runs from a few alphabets."""
    chosen = [rng.choice(alphabets()) for _ in range(rng.randint(1, 5))]
    runs: list[str] = []
    while sum(map(len, runs)) < size:
        alphabet, length = rng.choice(chosen), rng.randint(1, max(1, size // 4))
        few = rng.choices(alphabet, k=rng.randint(1, 12))
        runs.append("".join(rng.choices(few, k=length)))
    return "".join(runs)


def write_large_tokenizer(folder: Path, size: int = 8_000) -> None:
    """Write a `tokenizer.json` with Qwen's rules, trained on this package's sources and docs."""
    from tokenizers import AddedToken, Tokenizer, trainers

    write_tokenizer(folder)
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_str(json.dumps({**rules, "added_tokens": []}))
    root = Path(__file__).parents[2]
    texts = [each.read_text() for each in (*root.glob("engine/**/*.py"), *root.glob("docs/*.md"))]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=list(rules["model"]["vocab"]), show_progress=False
    )
    tokenizer.train_from_iterator((*texts, *RUNS.values()), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.save(str(path))


class Watcher:
    """Measures the longest time that another thread holds the GIL, in seconds.

    From each gap between two ticks it subtracts the time this thread waited for a core, and it caps
    the gap at the CPU time of the process: on a busy machine, a gap alone means little.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self._ends = threading.Event()

    def __enter__(self) -> Watcher:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        time.sleep(10 * TICK)
        self.longest = 0.0
        return self

    def __exit__(self, *exc: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        last = self._now()
        while not self._ends.is_set():
            time.sleep(TICK)
            now = self._now()
            wall, cpu, waited = (b - a for a, b in zip(last, now, strict=True))
            self.longest = max(self.longest, min(wall - waited, cpu) - TICK)
            last = now

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Return wall time, process CPU time and this thread's wait for a core, in seconds."""
        waited = 0.0
        with contextlib.suppress(OSError):
            schedule = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text()
            waited = int(schedule.split()[1]) / 1e9
        return time.monotonic(), time.process_time(), waited


async def longest_block(call: Callable[[], Any]) -> tuple[Any, float]:
    """Await `call()` and measure the longest time it blocks the event loop.

    Returns its result and the CPU seconds of the longest block.
    """
    longest, done = 0.0, False

    async def tick() -> None:
        nonlocal longest
        last = time.thread_time()
        while not done:
            await asyncio.sleep(0)
            now = time.thread_time()
            longest, last = max(longest, now - last), now
            await asyncio.sleep(TICK)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(5 * TICK)
    longest = 0.0
    try:
        found = await call()
        await asyncio.sleep(5 * TICK)
        return found, longest
    finally:
        done = True
        await ticking


def differing(tokenizer: TextTokenizer, seed: int) -> Iterator[str]:
    """Yield without end, for random texts: "" if split and unsplit ids agree, else the text."""
    rng = random.Random(seed)
    while True:
        text = random_text(rng, rng.choice((8, 40, 200)))
        plain = tokenizer.encode_plain(text) == whole_ids(tokenizer, text)
        spelled = text[:20] + rng.choice(list(tokenizer.added)) + text[20:]
        marked = tokenizer.encode_marked(spelled) == tokenizer.backend.encode(spelled).ids
        yield "" if plain and marked else text


def whole_ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Return the ids of a text encoded as a whole."""
    return list(tokenizer._plain.encode(text, add_special_tokens=False).ids)


def longest_hold(tokenizer: TextTokenizer, text: str, max_tokens: int) -> float:
    """Return the longest GIL hold in seconds while a text is encoded or rejected."""
    with Watcher() as watcher, contextlib.suppress(InputError):
        tokenizer.encode_marked(text, TextBudget(max_tokens))
    return watcher.longest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, help="folder with a tokenizer.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="duration of the comparison of ids"
    )
    parser.add_argument("--context", type=int, default=32768, help="maximum tokens of a text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.tokenizer or Path(name)
        if args.tokenizer is None:
            write_large_tokenizer(folder)
        report(TextTokenizer(folder), args.seed, args.seconds, args.context)


def report(tokenizer: TextTokenizer, seed: int, seconds: float, context: int) -> None:
    for name, run in RUNS.items():
        text = run * (1_000_000 // len(run))
        started = time.process_time()
        hold = longest_hold(tokenizer, text, context)
        spent = time.process_time() - started
        print(f"{name:34} GIL hold {1000 * hold:5.1f} ms, {spent:5.2f} s of CPU", flush=True)
    pieces.PIECE = 2  # split wherever possible
    end, count, wrong = time.monotonic() + seconds, 0, 0
    for text in differing(tokenizer, seed):
        count, wrong = count + 1, wrong + bool(text)
        if text:
            print(f"differs: {text[:200]!r}")
        if time.monotonic() > end:
            break
    print(f"{count} random texts, {wrong} with ids that differ from the unsplit text's")


if __name__ == "__main__":
    main()
