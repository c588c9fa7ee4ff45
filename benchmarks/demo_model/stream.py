"""Infinite stream of training batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset

from .batch import Batch
from .data import Maker


class Batches(IterableDataset):
    """Lists of batches, one list per optimizer step, seeded by (seed, step).

    Each list is used twice, a hundred or more steps apart, as drawing takes a third of a step.
    """

    def __init__(
        self,
        tokenizer_json: str,
        seed: int,
        first_step: int,
        small: float,
        budget: int,
        weights: dict[str, float],
    ) -> None:
        self.tokenizer_json, self.seed, self.first = tokenizer_json, seed, first_step
        self.small, self.budget, self.weights = small, budget, weights

    def __iter__(self) -> Iterator[list[Batch]]:
        tokenizer = Tokenizer.from_str(self.tokenizer_json)
        kinds, chances = list(self.weights), np.array(list(self.weights.values()))
        step = self.first
        drawn: deque[list[Batch]] = deque()
        while True:
            if len(drawn) > 100 and step % 2:
                yield drawn.popleft()
                step += 1
                continue
            rng = np.random.default_rng([self.seed, step])
            maker = Maker(tokenizer, rng, self.small)
            chosen = rng.choice(kinds, 2, replace=False, p=chances / chances.sum())
            batches = [maker.make(str(kind), self.budget) for kind in chosen]
            if rng.random() < 0.05:
                batches.append(maker.make("who", 0))
            drawn.append(batches)
            yield batches
            step += 1
