"""Measure the embedded model's accuracy on freshly generated questions, through `octavo.LLM`.

    python -m octavo.benchmarks.eval_demo_model --num 1000 --seed 7

Kinds: color, shape, which, motion, count, number. `--backend transformers` sends the same questions
to the same checkpoint through transformers, for comparison.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from octavo.engine.config.engine_config import EMBEDDED_MODEL
from octavo.scheduler.params import SamplingParams

from .demo_model.draw import (
    DIRECTIONS,
    NUMBER_WORDS,
    choose_canvas,
    choose_number,
    draw_count,
    draw_motion,
    draw_number,
    draw_shape,
)
from .demo_model.paint import COLORS, SHAPES
from .demo_model.tokenizer import QUESTIONS

Message = dict[str, Any]
TARGETS = {"color": 0.97, "shape": 0.97, "which": 0.97, "motion": 0.97, "count": 0.95}
TARGETS["number"] = 0.95


@dataclass(frozen=True)
class Question:
    messages: list[Message]
    answer: str


def _ask(text: str, answer: str, *media: Any) -> Question:
    """Build a question about `media`: a list is a video, anything else an image."""
    parts: list[Message] = [
        {"type": "video", "video": item} if isinstance(item, list) else
        {"type": "image", "image": item}
        for item in media
    ]  # fmt: skip
    content = [*parts, {"type": "text", "text": text}]
    return Question([{"role": "user", "content": content}], answer)


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]


def _one_shape(rng: np.random.Generator) -> tuple[str, str, Image.Image]:
    color, shape = _pick(rng, COLORS), _pick(rng, SHAPES)
    return color, shape, draw_shape(rng, choose_canvas(rng), color, shape).image


def ask_color(rng: np.random.Generator) -> Question:
    color, _, image = _one_shape(rng)
    return _ask(QUESTIONS["color"], color, image)


def ask_shape(rng: np.random.Generator) -> Question:
    _, shape, image = _one_shape(rng)
    return _ask(QUESTIONS["shape"], shape, image)


def ask_which(rng: np.random.Generator) -> Question:
    """Ask which of two images shows a shape; the other shares its color, its shape, or neither."""
    color, shape, image = _one_shape(rng)
    while True:
        other = _pick(rng, COLORS), _pick(rng, SHAPES)
        shared = rng.integers(3)
        other = (color, other[1]) if shared == 0 else (other[0], shape) if shared == 1 else other
        if other != (color, shape):
            break
    images = [image, draw_shape(rng, choose_canvas(rng), *other).image]
    second = bool(rng.integers(2))
    if second:
        images.reverse()
    answer = "the second" if second else "the first"
    return _ask(QUESTIONS["which"].format(color, shape), answer, *images)


def ask_motion(rng: np.random.Generator) -> Question:
    direction = _pick(rng, DIRECTIONS)
    clip = draw_motion(rng, choose_canvas(rng), direction, int(rng.integers(4, 13)))
    return _ask(QUESTIONS["motion"], direction, [p.image for p in clip])


def ask_count(rng: np.random.Generator) -> Question:
    count = int(rng.integers(1, 7))
    image = draw_count(rng, choose_canvas(rng), count).image
    return _ask(QUESTIONS["count"], NUMBER_WORDS[count - 1], image)


def ask_number(rng: np.random.Generator) -> Question:
    canvas = choose_canvas(rng)
    text = choose_number(rng, canvas)
    return _ask(QUESTIONS["number"], text, draw_number(rng, canvas, text).image)


KINDS: dict[str, Callable[[np.random.Generator], Question]] = {
    "color": ask_color,
    "shape": ask_shape,
    "which": ask_which,
    "motion": ask_motion,
    "count": ask_count,
    "number": ask_number,
}


def questions(kind: str, seed: int) -> Iterator[Question]:
    """Yield questions of a kind without end, determined by the seed; training uses other seeds."""
    rng = np.random.default_rng([seed, *kind.encode(), 77])
    while True:
        yield KINDS[kind](rng)


def answer_with_octavo(
    model: Path, quantization: str | None
) -> Callable[[list[Question]], list[str]]:
    from octavo.engine.llm import LLM

    llm = LLM(model, quantization=quantization)
    params = SamplingParams(temperature=0, max_tokens=12)

    def answer(asked: list[Question]) -> list[str]:
        outputs = llm.chat([q.messages for q in asked], params, progress=False)
        return [output.outputs[0].text.strip() or output.error for output in outputs]

    return answer


def answer_with_transformers(model: Path) -> Callable[[list[Question]], list[str]]:
    """Use our preprocessing and tokenization with the model of transformers."""
    from .compare.transformers_model import TransformersModel

    reference = TransformersModel(model)
    return lambda asked: [reference.answer(q.messages, 12).strip() for q in asked]


def measure(
    answer: Callable[[list[Question]], list[str]], kind: str, num: int, seed: int
) -> dict[str, Any]:
    """Return the share of exact answers, with up to five wrong ones."""
    stream, right = questions(kind, seed), 0
    wrong: list[str] = []
    started = time.perf_counter()
    batches = range(0, num, 50)
    for first in track(batches, description=f"{kind:8}", transient=True):
        asked = list(islice(stream, min(50, num - first)))
        for question, text in zip(asked, answer(asked), strict=True):
            right += text == question.answer
            if text != question.answer and len(wrong) < 5:
                wrong.append(f"{question.answer} -> {text}")
    seconds = time.perf_counter() - started
    return {"kind": kind, "num": num, "right": right / num, "seconds": seconds, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL)
    parser.add_argument("--num", type=int, default=1000, help="questions per kind")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--backend", choices=["octavo", "transformers"], default="octavo")
    parser.add_argument(
        "--quantization", choices=["int8"], help="weight quantization (octavo backend)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per kind")
    args = parser.parse_args()
    if args.backend == "octavo":
        answer = answer_with_octavo(args.model, args.quantization)
    else:
        answer = answer_with_transformers(args.model)
    for kind in args.kinds:
        found = measure(answer, kind, args.num, args.seed)
        if args.json:
            print(json.dumps(found), flush=True)
            continue
        mark = "" if found["right"] >= TARGETS[kind] else f"  below target {TARGETS[kind]:.0%}"
        print(
            f"{kind:8} {found['right']:7.1%} of {args.num}, {found['seconds']:.0f} s{mark}"
            f"   {'; '.join(found['wrong'][:3])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
