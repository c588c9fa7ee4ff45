"""Trains the embedded model. Resumes from its state; `touch DIR/decay` starts the final decay."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from octavo.engine.model.vision import patch_positions

from .data import Batch, Batches, Item, Maker
from .draw import COLORS, DIRECTIONS, NUMBER_WORDS, SHAPES
from .model import AUX_SIZES, Shape, TrainModel
from .tokenizer import make_tokenizer

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def cut(item: Item, b: int) -> torch.Tensor:
    """Normalised patches [b * t, h*w, 1176] in merge-group order."""
    t, h, w = item.grid
    x = (item.pixels.float() / 255 - MEAN) / STD
    x = x.view(b, -1, *x.shape[1:])
    if x.shape[1] == 1:
        x = x.expand(-1, 2, -1, -1, -1)
    x = x.reshape(b, t, 2, h // 2, 2, 14, w // 2, 2, 14, 3)
    return x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(b * t, h * w, 1176)


def losses(model: TrainModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Answer loss, auxiliary loss, and which conversations had their first answer all right."""
    b = len(batch.token_ids)
    media = [(cut(item, b), item.grid[1], item.grid[2], item.offset) for item in batch.items]
    hidden, features = model(batch.token_ids, batch.positions, media)
    shifted = F.pad(batch.labels[:, 1:], (0, 1), value=-100)
    at = shifted != -100
    logits = model.logits(hidden[at]).float()
    answer = F.cross_entropy(logits, shifted[at], label_smoothing=0.02)
    if batch.kind == "digits":
        answer = answer * 0
    wrong = torch.zeros(at.shape, dtype=torch.bool)
    wrong[at] = logits.argmax(-1) != shifted[at]
    aux = torch.zeros(())
    for item, feature in zip(batch.items, features, strict=True):
        aux = aux + aux_loss(model.aux(feature).float(), item) / len(batch.items)
    return answer, aux, ~wrong.any(1)


def aux_loss(out: torch.Tensor, item: Item) -> torch.Tensor:
    """What lies on each patch and where the patch is; most patches are empty and count less."""
    color, shape, centre, digit, order, row, column = out.split(AUX_SIZES, dim=-1)
    places = patch_positions(*item.grid[1:], 2).expand(len(out), -1, -1)
    loss = torch.zeros(())
    for guess, axis, size in ((row, 0, item.grid[1]), (column, 1, item.grid[2])):
        label = places[..., axis] * 8 // size
        loss = loss + 0.3 * F.cross_entropy(guess.flatten(0, 1), label.flatten())
    guesses = {"color": color, "shape": shape, "centre": centre}
    guesses["digit"] = digit.unflatten(-1, (2, 11))
    guesses["order"] = order.unflatten(-1, (2, 7))
    for name, label in item.labels.items():
        guess = guesses[name].flatten(0, -2)
        each = F.cross_entropy(guess, label.flatten(), reduction="none")
        there = label.flatten() > 0
        loss = loss + each[~there].mean() * 0.5
        if there.any():
            loss = loss + each[there].mean() * 0.5
    return loss


@torch.no_grad()
def evaluate(
    model: TrainModel, tokenizer: Tokenizer, seed: int, count: int = 3
) -> dict[str, float]:
    right: dict[str, list[float]] = {}
    for kind in ("shape", "count", "number", "which", "motion", "who"):
        for i in range(count):
            maker = Maker(tokenizer, np.random.default_rng([seed, 999, i]), 0.0)
            with torch.autocast("cpu", torch.bfloat16):
                ok = losses(model, maker.make(kind, 12000))[2]
            right.setdefault(kind, []).extend(ok.tolist())
    return {k: sum(v) / len(v) for k, v in right.items()}


def rate(step: int, decay_from: int, decay_steps: int, peak: float) -> float:
    """Warm up, stay, then fall to zero over `decay_steps`."""
    warm = min(1.0, (step + 1) / 200)
    if decay_from < 0 or step < decay_from:
        return peak * warm
    part = min(1.0, (step - decay_from) / decay_steps)
    return peak * warm * max(0.0, (1 - part)) ** 1.0


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--dir", type=Path, default=Path("/root/octavo-train"))
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--budget", type=int, default=6000)
    p.add_argument("--small", type=float, default=0.5)
    p.add_argument("--aux", type=float, default=0.5)
    p.add_argument("--decay-minutes", type=float, default=25)
    p.add_argument(
        "--stop-at", type=float, default=0, help="unix time at which the decay must be over"
    )
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    a.dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    tokenizer = make_tokenizer([*COLORS, *SHAPES, *NUMBER_WORDS, *DIRECTIONS, "first", "second"])
    shape = Shape(vocab=512)
    assert tokenizer.get_vocab_size() <= shape.vocab, tokenizer.get_vocab_size()
    tokenizer.save(str(a.dir / "tokenizer.json"))
    model = TrainModel(shape)
    decay = [q for n, q in model.named_parameters() if q.dim() >= 2 and "embed_tokens" not in n]
    rest = [
        q for n, q in model.named_parameters() if not (q.dim() >= 2 and "embed_tokens" not in n)
    ]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=a.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    step, decay_from, decay_steps, spent = 0, -1, 1, 0.0
    state_file = a.dir / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, spent = state["ema"], state["step"], state["spent"]
        decay_from, decay_steps = state["decay"]
    print(
        "parameters",
        sum(q.numel() for q in model.parameters()),
        asdict(shape),
        "step",
        step,
        flush=True,
    )
    weights = {
        "shape": 0.7,
        "count": 1.2,
        "number": 1.6,
        "digits": 1.6,
        "which": 1.2,
        "motion": 0.4,
    }
    data = Batches(tokenizer.to_str(), a.seed, step, a.small, a.budget, weights)
    loader = iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=6))
    start = last = time.time()
    log, seen = {}, 0
    while True:
        batches = next(loader)
        now_rate = rate(step, decay_from, decay_steps, a.lr)
        for group in optimizer.param_groups:
            group["lr"] = now_rate
        total = 0.0
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                answer, aux, ok = losses(model, batch)
            weight = 0.2 if batch.kind == "who" else 1.0
            ((answer + a.aux * aux) * weight / 2).backward()
            entry = log.setdefault(batch.kind, [])
            entry.append((answer.item(), aux.item(), ok.float().mean().item()))
            seen += len(batch.token_ids)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        keep = min(0.999, 1 - 1 / (step + 1)) if step < 500 else 0.998
        with torch.no_grad():
            for k, v in model.state_dict().items():
                ema[k].lerp_(v, 1 - keep)
        now = time.time()
        if step % 50 == 0:
            line = " ".join(
                f"{k}:{np.mean([e[0] for e in v]):.3f}/{np.mean([e[1] for e in v]):.3f}/{np.mean([e[2] for e in v]):.3f}"
                for k, v in sorted(log.items())
            )
            print(
                f"{step} {spent + now - start:.0f}s lr {now_rate:.2e} {seen / (now - last):.0f}/s {line}",
                flush=True,
            )
            log, seen, last = {}, 0, now
        wants_decay = (a.dir / "decay").exists() or (
            a.stop_at and now > a.stop_at - a.decay_minutes * 60
        )
        if decay_from < 0 and wants_decay:
            per_step = (now - start) / max(1, step - data.first)
            decay_from, decay_steps = step, max(1, int(a.decay_minutes * 60 / per_step))
            print(f"decay from {decay_from} over {decay_steps} steps", flush=True)
        done = (decay_from >= 0 and step >= decay_from + decay_steps) or bool(
            a.stop_at and now > a.stop_at + 120
        )
        if step % 250 == 0 or done:
            raw = {k: v.clone() for k, v in model.state_dict().items()}
            torch.save(
                {
                    "model": raw,
                    "ema": ema,
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "spent": spent + now - start,
                    "decay": (decay_from, decay_steps),
                },
                a.dir / "state.tmp",
            )
            os.replace(a.dir / "state.tmp", state_file)
            model.load_state_dict(ema)
            print(
                "eval(ema)",
                {k: round(v, 3) for k, v in evaluate(model, tokenizer, 10_000).items()},
                flush=True,
            )
            model.load_state_dict(raw)
            last = time.time()
        if done:
            break


if __name__ == "__main__":
    main()
