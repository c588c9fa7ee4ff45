"""Builder of training batches: each has conversations of one kind and one layout."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from .batch import (
    IMAGE_PIXELS,
    PATCH,
    VIDEO_PIXELS,
    Batch,
    Item,
    between,
    patch_labels,
    smart_resize,
)
from .draw import (
    DIRECTIONS,
    NUMBER_WORDS,
    Picture,
    choose_canvas,
    choose_number,
    draw_count,
    draw_digits,
    draw_motion,
    draw_number,
    draw_shape,
)
from .paint import COLORS, SHAPES, finish, new_canvas
from .tokenizer import QUESTIONS, SYSTEM, WHO

Thing = tuple[str, str] | None  # color and shape shown in a picture


def draw_thing(rng: np.random.Generator, canvas: tuple[int, int], thing: Thing) -> Picture:
    if thing is None:
        return Picture(finish(rng, new_canvas(rng, canvas)), ())
    return draw_shape(rng, canvas, *thing)


class Maker:
    """Builds batches from one random generator."""

    def __init__(self, tokenizer: Tokenizer, rng: np.random.Generator, small: float) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        self.small = small  # share of batches at a lower resolution

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def limits(self) -> tuple[int, int]:
        if self.rng.random() < self.small:
            side = int(self.rng.choice([112, 140, 168]))
            return side * side, side * side
        return IMAGE_PIXELS

    def canvases(
        self, count: int, limits: tuple[int, int]
    ) -> tuple[list[tuple[int, int]], tuple[int, int]]:
        """Return random canvases that are resized to a common grid, and its size."""
        base = choose_canvas(self.rng)
        goal = smart_resize(base[1], base[0], *limits)
        found = [base]
        tries = 0
        while len(found) < count:
            tries += 1
            if tries > 40 * count:
                found.append(base)
                continue
            scale = math.exp(self.rng.uniform(-1.0, 1.0))
            bend = math.exp(self.rng.uniform(-0.15, 0.15))
            size = int(base[0] * scale * bend), int(base[1] * scale / bend)
            if min(size) < 56 or max(size) > 448 or max(size) > 4 * min(size):
                continue
            if smart_resize(size[1], size[0], *limits) == goal:
                found.append(size)
        return found, goal

    def item(self, pictures: list[Picture], goal: tuple[int, int]) -> Item:
        h, w = goal
        pixels = np.stack(
            [np.asarray(p.image.resize((w, h), Image.Resampling.BICUBIC)) for p in pictures]
        )
        labels = [patch_labels(p.marks, p.image.size, h // PATCH, w // PATCH) for p in pictures]
        return Item(torch.from_numpy(pixels), 1, labels=join(labels, "motion"))

    def make(self, kind: str, budget: int) -> Batch:
        """Make a batch of about `budget` patches."""
        return getattr(self, f"make_{kind}")(budget)

    def _count(self, budget: int, goal: tuple[int, int], items: int = 1) -> int:
        return int(max(2, min(64, budget // (items * goal[0] * goal[1] // PATCH**2))))

    def make_shape(self, budget: int) -> Batch:
        limits = self.limits()
        canvases, goal = self.canvases(64, limits)
        n = self._count(budget, goal)
        rng = self.rng
        wanted = [(str(rng.choice(COLORS)), str(rng.choice(SHAPES))) for _ in range(n)]
        pictures = [draw_shape(rng, c, *w) for c, w in zip(canvases, wanted, strict=False)]
        talks = []
        before = rng.random() < 0.15
        first = int(rng.integers(2))
        for color, shape in wanted:
            turns = [(QUESTIONS["color"], color), (QUESTIONS["shape"], shape)]
            k = first if before else int(rng.integers(2))
            talk = [turns[k]]
            if rng.random() < 0.6:
                talk.append(turns[1 - k])
            if rng.random() < 0.1:
                talk.append((QUESTIONS["count"], "one"))
            talks.append(talk)
        return self.batch("shape", [self.item(pictures, goal)], talks, before)

    def make_count(self, budget: int) -> Batch:
        canvases, goal = self.canvases(64, self.limits())
        n = self._count(budget, goal)
        numbers = [int(self.rng.integers(1, 7)) for _ in range(n)]
        pictures = [draw_count(self.rng, c, k) for c, k in zip(canvases, numbers, strict=False)]
        talks = [[(QUESTIONS["count"], NUMBER_WORDS[k - 1])] for k in numbers]
        return self.batch("count", [self.item(pictures, goal)], talks, self.rng.random() < 0.1)

    def make_number(self, budget: int) -> Batch:
        canvases, goal = self.canvases(64, self.limits())
        n = self._count(budget, goal)
        area = goal[0] * goal[1]
        smallest = [max(18, math.ceil(11 * (w * h / area) ** 0.5)) for w, h in canvases[:n]]
        texts = [choose_number(self.rng, c, s) for c, s in zip(canvases, smallest, strict=False)]
        pictures = [
            draw_number(self.rng, c, t, s)
            for c, t, s in zip(canvases, texts, smallest, strict=False)
        ]
        talks = [[(QUESTIONS["number"], t)] for t in texts]
        return self.batch("number", [self.item(pictures, goal)], talks, self.rng.random() < 0.1)

    def make_digits(self, budget: int) -> Batch:
        """Make pictures full of digits without a question; they train only the auxiliary heads."""
        canvases, goal = self.canvases(64, self.limits())
        n = self._count(budget, goal)
        area = goal[0] * goal[1]
        pictures = [
            draw_digits(self.rng, c, max(18, math.ceil(11 * (c[0] * c[1] / area) ** 0.5)))
            for c in canvases[:n]
        ]
        item = self.item(pictures, goal)
        del item.labels["order"]  # the digits have no left-to-right order
        return self.batch("digits", [item], [[(QUESTIONS["number"], "")]] * n, False)

    def make_which(self, budget: int) -> Batch:
        """Make questions about pairs of images; each picture is in several pairs.

        Some pictures are empty, so that the model first learns where shapes are, and then to look
        for the shape in the question.
        """
        rng = self.rng
        limits = self.limits()
        if rng.random() < 0.5:  # few tokens
            side = int(rng.choice([84, 112]))
            limits = side * side, side * side
        sides = [self.canvases(64, limits), self.canvases(64, limits)]
        n = int(max(3, min(64, budget // (sum(h * w for _, (h, w) in sides) // PATCH**2))))
        # Use few colors and shapes, so that the images of a pair often share one.
        colors, shapes = rng.choice(COLORS, 3, replace=False), rng.choice(SHAPES, 3, replace=False)
        things: list[list[Thing]] = [[], []]
        items: list[Item] = []
        for drawn, (canvases, goal) in zip(things, sides, strict=True):
            for _ in range(n):
                drawn.append((str(rng.choice(colors)), str(rng.choice(shapes))))
                if rng.random() < 0.12:
                    drawn[-1] = None
            drawn[0] = (str(colors[len(items)]), str(shapes[0]))
            pairs = zip(canvases, drawn, strict=False)
            items.append(self.item([draw_thing(rng, c, t) for c, t in pairs], goal))
        chosen = [(0, 0)]
        for a, b in rng.integers(0, n, (5 * n, 2)).tolist():
            if things[0][a] != things[1][b]:
                chosen.append((a, b))
        items[0].rows, items[1].rows = torch.tensor(chosen).T
        talks = [[self.ask_which(things[0][a], things[1][b])] for a, b in chosen]
        batch = self.batch("which", items, talks, False)
        for row, (a, b) in enumerate(chosen):
            self.mark_words(batch, row, things[0][a] or (), things[1][b] or ())
        return batch

    def mark_words(
        self, batch: Batch, row: int, first: tuple[str, ...], second: tuple[str, ...]
    ) -> None:
        for word in {*first, *second}:
            (token,) = self.ids(f" {word}")
            at = batch.token_ids[row] == token
            batch.shown_in[row, at] = 2 if word in first and word in second else int(word in second)

    def ask_which(self, first: Thing, second: Thing) -> tuple[str, str]:
        answer = int(self.rng.integers(2)) if first and second else int(first is None)
        wanted, other = (second, first) if answer else (first, second)
        assert wanted is not None
        return self.asked_for(wanted, other), ("the first", "the second")[answer]

    def asked_for(self, wanted: tuple[str, str], other: Thing) -> str:
        """Ask mostly for color and shape, sometimes only for what differs, which is easier."""
        question, (color, shape) = QUESTIONS["which"], wanted
        if other and self.rng.random() < 0.4:
            if color != other[0]:
                return question.format(color, "shape")
            return question.replace("{} {}", "{}").format(shape)
        return question.format(color, shape)

    def make_motion(self, budget: int) -> Batch:
        rng = self.rng
        limits = VIDEO_PIXELS if rng.random() < 0.85 else (84 * 84, 168 * 168)
        canvases, goal = self.canvases(64, limits)
        frames = int(rng.choice([4, 4, 4, 6, 6, 8, 8, 10, 12]))
        n = int(max(2, min(48, budget // (frames // 2 * goal[0] * goal[1] // PATCH**2))))
        wanted = [str(rng.choice(DIRECTIONS)) for _ in range(n)]
        stacks, labels = [], []
        for canvas, direction in zip(canvases, wanted, strict=False):
            clip = draw_motion(rng, canvas, direction, frames)
            images = (p.image.resize(goal[::-1], Image.Resampling.BICUBIC) for p in clip)
            stacks += [np.asarray(image) for image in images]
            grid = goal[0] // PATCH, goal[1] // PATCH
            for a, b in zip(clip[::2], clip[1::2], strict=True):
                mark = between(a.marks[0], b.marks[0])
                labels.append(patch_labels((mark,), canvas, *grid, direction))
        item = Item(torch.from_numpy(np.stack(stacks)), frames // 2, labels=join(labels))
        talks = [[(QUESTIONS["motion"], d)] for d in wanted]
        return self.batch("motion", [item], talks, rng.random() < 0.1)

    def make_who(self, budget: int) -> Batch:
        return self.batch("who", [], [[(QUESTIONS["who"], WHO)]] * 2, False)

    def batch(
        self, kind: str, items: list[Item], talks: list[list[tuple[str, str]]], before: bool
    ) -> Batch:
        head = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
        if before:
            head += talks[0][0][0]
        prefix = self.ids(head)
        pad = "<|video_pad|>" if kind == "motion" else "<|image_pad|>"
        (pad_id,) = self.ids(pad)
        positions = [[i] * 3 for i in range(len(prefix))]
        for item in items:
            prefix += self.ids("<|vision_start|>")
            at = 1 + max(positions[-1])
            positions.append([at] * 3)
            item.offset = len(prefix)
            prefix += [pad_id] * item.num_tokens
            t, h, w = item.grid
            h, w = h // 2, w // 2
            positions += [
                [at + 1 + a, at + 1 + b, at + 1 + c]
                for a in range(t)
                for b in range(h)
                for c in range(w)
            ]
            prefix += self.ids("<|vision_end|>")
            positions.append([at + 1 + max(t, h, w)] * 3)
        rows, labels = [], []
        for talk in talks:
            row, label = list(prefix), [-100] * len(prefix)
            for i, (question, answer) in enumerate(talk):
                asked = "" if before and i == 0 else question
                lead = "" if i == 0 else "\n<|im_start|>user\n"
                ask = self.ids(f"{lead}{asked}<|im_end|>\n<|im_start|>assistant\n")
                reply = self.ids(f"{answer}<|im_end|>")
                row += ask + reply
                label += [-100] * len(ask) + reply
            rows.append(row)
            labels.append(label)
        longest = max(map(len, rows))
        for row, label in zip(rows, labels, strict=True):
            label += [-100] * (longest - len(row))
            row += [0] * (longest - len(row))
        last = max(positions[-1])
        positions += [[last + 1 + i] * 3 for i in range(longest - len(positions))]
        return Batch(
            kind,
            torch.tensor(rows),
            torch.tensor(labels),
            torch.tensor(positions).T.contiguous(),
            items,
            torch.full((len(rows), longest), -100),
            [t[0][0] for t in talks],
            [t[0][1] for t in talks],
        )


def join(labels: list[dict[str, np.ndarray]], without: str = "") -> dict[str, torch.Tensor]:
    names = [name for name in labels[0] if name != without]
    return {name: torch.from_numpy(np.stack([one[name] for one in labels])) for name in names}
