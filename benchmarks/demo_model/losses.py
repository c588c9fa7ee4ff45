"""Losses of a batch's answers and of the training heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from octavo.engine.model.vision import patch_positions

from .batch import Batch, Item
from .model import AUX_SIZES, Seen, TrainModel
from .paint import COLORS, SHAPES

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
SHARPNESS = 12.0  # inverse temperature of a softmax over cosine similarities


def cut(item: Item) -> torch.Tensor:
    """Return normalized patches [b * t, h*w, 1176] in merge-group order."""
    t, h, w = item.grid
    b = item.num_pictures
    x = (item.pixels.float() / 255 - MEAN) / STD
    x = x.view(b, -1, *x.shape[1:])
    if x.shape[1] == 1:
        x = x.expand(-1, 2, -1, -1, -1)
    x = x.reshape(b, t, 2, h // 2, 2, 14, w // 2, 2, 14, 3)
    return x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(b * t, h * w, 1176)


def losses(model: TrainModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the answer loss, the auxiliary loss, and which first answers are entirely correct."""
    b = len(batch.token_ids)
    media = [(cut(item), *item.grid[1:], item.offset, item.rows) for item in batch.items]
    if batch.kind == "digits":  # no question
        guesses = [model.look(*one[:3])[1] for one in media]
        return torch.zeros(()), item_loss(guesses, batch), torch.zeros(b)
    hidden, guesses = model(batch.token_ids, batch.positions, media)
    shifted = F.pad(batch.labels[:, 1:], (0, 1), value=-100)
    at = shifted != -100
    logits = model.logits(hidden[at]).float()
    answer = F.cross_entropy(logits, shifted[at], label_smoothing=0.02)
    wrong = torch.zeros(at.shape, dtype=torch.bool)
    wrong[at] = logits.argmax(-1) != shifted[at]
    if (batch.shown_in >= 0).any():
        known = batch.shown_in >= 0
        answer = answer + F.cross_entropy(
            model.aux[2](hidden[known]).float(), batch.shown_in[known]
        )
    return answer, item_loss(guesses, batch), ~wrong.any(1)


def item_loss(seen: list[Seen], batch: Batch) -> torch.Tensor:
    """Return the training heads' loss: the mean over items and head positions, plus `word_loss`."""
    loss = torch.zeros(())
    for item, (guesses, likeness) in zip(batch.items, seen, strict=True):
        for guess in guesses:
            loss = loss + aux_loss(guess.float(), item) / len(seen) / 2
        loss = loss + word_loss(likeness.float(), item) / len(seen)
    return loss


def word_loss(likeness: torch.Tensor, item: Item) -> torch.Tensor:
    """Pull the embedding of a red shape toward the word "red", and so on.

    Matching a question's words with one of two images then only requires comparing similar
    vectors; without this loss the model rarely learns it.
    """
    loss = torch.zeros(())
    guesses = likeness.split((len(COLORS), len(SHAPES)), dim=-1)
    for name, guess in zip(("color", "shape"), guesses, strict=True):
        label = item.labels[name].unflatten(-1, (-1, 4)).amax(-1)
        there = label > 0
        if there.any():
            loss = loss + F.cross_entropy(guess[there] * SHARPNESS, label[there] - 1)
    return loss


def aux_loss(out: torch.Tensor, item: Item) -> torch.Tensor:
    """Return the loss of patch labels and patch positions; the many empty patches weigh less."""
    color, shape, centre, digit, order, motion, row, column = out.split(AUX_SIZES, dim=-1)
    positions = patch_positions(*item.grid[1:], 2).expand(len(out), -1, -1)
    loss = torch.zeros(())
    for guess, axis, size in ((row, 0, item.grid[1]), (column, 1, item.grid[2])):
        label = positions[..., axis] * 8 // size
        loss = loss + 0.3 * F.cross_entropy(guess.flatten(0, 1), label.flatten())
    guesses = {"color": color, "shape": shape, "centre": centre, "motion": motion}
    guesses["digit"] = digit.unflatten(-1, (2, 11))
    guesses["order"] = order.unflatten(-1, (2, 7))
    for name, label in item.labels.items():
        guess = guesses[name].flatten(0, -2)
        each = F.cross_entropy(guess, label.flatten(), reduction="none")
        there = label.flatten() > 0
        if name == "centre":  # used for counting: extra and missing patches are equally wrong
            loss = loss + each.sum() / there.sum().clamp(min=1) * 0.3
            continue
        for chosen in (there, ~there):
            if chosen.any():
                loss = loss + each[chosen].mean() * 0.5
    return loss
