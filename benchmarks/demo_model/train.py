"""Train the embedded model. Resumes from its state; `touch DIR/decay` starts the final decay.

Each step uses two batches of different kinds. In addition to the answers, auxiliary heads (dropped
on export) learn each patch's contents and position: a tower of this size barely learns to read from
answers alone.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

# Each batch layout has matmuls of its own shapes. Creating a oneDNN primitive takes longer than
# running it, and the default cache of 1,024 evicts primitives before they are reused.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "30000")

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from .batch import Batch
from .data import Maker
from .draw import DIRECTIONS, NUMBER_WORDS
from .losses import cut, losses
from .model import Shape, TrainModel
from .paint import COLORS, SHAPES
from .stream import Batches
from .tokenizer import make_tokenizer

VOCABULARY = [*COLORS, *SHAPES, *NUMBER_WORDS, *DIRECTIONS, "first", "second"]
KINDS = {"shape": 0.6, "count": 2.0, "number": 1.6, "digits": 1.0, "which": 2.0, "motion": 0.4}


@torch.no_grad()
def evaluate(
    model: TrainModel, tokenizer: Tokenizer, seed: int, count: int = 3
) -> dict[str, float]:
    right: dict[str, list[float]] = {}
    for kind in ("shape", "count", "number", "which", "motion", "who"):
        for i in range(count):
            maker = Maker(tokenizer, np.random.default_rng([seed, 999, i]), 0.0)
            with torch.autocast("cpu", torch.bfloat16):
                ok = losses(model, maker.make(kind, 6000))[2]
            right.setdefault(kind, []).extend(ok.tolist())
    return {k: sum(v) / len(v) for k, v in right.items()}


def rate_at(step: int, decay_from: int, decay_steps: int, peak: float) -> float:
    """Return the learning rate: warm-up, constant, then linear decay to 0 over `decay_steps`."""
    warm = min(1.0, (step + 1) / 200)
    if decay_from < 0 or step < decay_from:
        return peak * warm
    return peak * warm * max(0.0, 1 - (step - decay_from) / decay_steps)


@dataclass(eq=False)
class Trainer:
    """The model, its optimizers and its weight average; resumes from DIR/state.pt."""

    folder: Path
    seed: int
    peak_rate: float
    aux_weight: float
    compiled: bool
    stop_at: float  # unix time; 0: never
    decay_seconds: float
    step: int = 0
    spent: float = 0.0  # training time of earlier runs, in seconds
    decay_from: int = -1
    decay_steps: int = 1

    def __post_init__(self) -> None:
        self.tokenizer = make_tokenizer(VOCABULARY)
        self.tokenizer.save(str(self.folder / "tokenizer.json"))
        words = [self.tokenizer.encode(f" {word}").ids for word in (*COLORS, *SHAPES)]
        self.model = TrainModel(Shape(), [ids[0] for ids in words])
        if not self.state_file.exists():
            whiten(self.model, self.tokenizer, self.seed)
        self.optimizers = make_optimizers(self.model)
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}
        if self.state_file.exists():
            self.resume()
        if self.compiled:
            compile_blocks(self.model)
        self.first, self.started = self.step, time.time()
        self.log: dict[str, list[tuple[float, float, float]]] = {}

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def resume(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average, self.step, self.spent = state["ema"], state["step"], state["spent"]
        self.decay_from, self.decay_steps = state["decay"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "ema": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "spent": self.seconds,
            "decay": (self.decay_from, self.decay_steps),
        }
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.state_file)

    @property
    def seconds(self) -> float:
        """Training time in seconds, including earlier runs."""
        return self.spent + time.time() - self.started

    def train_step(self, batches: list[Batch]) -> None:
        rate = rate_at(self.step, self.decay_from, self.decay_steps, self.peak_rate)
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            group["lr"] = rate * group["share"]
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                answer, aux, right = losses(self.model, batch)
            weight = 0.2 if batch.kind == "who" else 1.0
            ((answer + self.aux_weight * aux) * weight / 2).backward()
            entry = (answer.item(), aux.item(), right.float().mean().item())
            self.log.setdefault(batch.kind, []).append(entry)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(0.998, 1 - 1 / (self.step + 1))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - keep)

    def start_decay_if_due(self) -> None:
        """Start the decay in the last minutes before `stop_at`, or after `touch DIR/decay`."""
        due = self.stop_at and time.time() > self.stop_at - self.decay_seconds
        if self.decay_from < 0 and (due or (self.folder / "decay").exists()):
            per_step = (time.time() - self.started) / max(1, self.step - self.first)
            self.decay_from = self.step
            self.decay_steps = max(1, int(self.decay_seconds / per_step))
            print(f"decay from {self.step} over {self.decay_steps} steps", flush=True)

    @property
    def is_done(self) -> bool:
        over = self.decay_from >= 0 and self.step >= self.decay_from + self.decay_steps
        return over or bool(self.stop_at and time.time() > self.stop_at + 120)

    def report(self) -> None:
        """Print a line with each kind's answer loss, auxiliary loss and share of right answers."""
        kinds = (
            f"{kind} " + "/".join(f"{np.mean(column):.3f}" for column in zip(*rows, strict=True))
            for kind, rows in sorted(self.log.items())
        )
        print(f"{self.step} {self.seconds:.0f}s", *kinds, flush=True)
        self.log = {}

    def evaluate_average(self) -> None:
        raw = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        found = evaluate(self.model, self.tokenizer, 10_000)
        print(
            "accuracy of the averaged weights:",
            {k: round(v, 3) for k, v in found.items()},
            flush=True,
        )
        self.model.load_state_dict(raw)

    def run(self, data: Batches) -> None:
        loader = DataLoader(
            data, batch_size=None, num_workers=1, prefetch_factor=8, worker_init_fn=yield_cores
        )
        for batches in loader:
            self.train_step(batches)
            self.start_decay_if_due()
            if self.step % 100 == 0:
                self.report()
            if self.step % 500 == 0 or self.is_done:
                self.save()
            if self.step % 1000 == 0 or self.is_done:
                self.evaluate_average()
            if self.is_done:
                break


def make_optimizers(model: TrainModel) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """Use Muon for inner matrices, AdamW for the rest; `share` scales a group's learning rate."""
    groups: dict[str, list[torch.Tensor]] = {"inside": [], "patches": [], "rest": []}
    for name, parameter in model.named_parameters():
        if "patch_embed" in name:
            groups["patches"].append(parameter)
        else:
            is_inside = parameter.dim() == 2 and "embed_tokens" not in name and "aux" not in name
            groups["inside" if is_inside else "rest"].append(parameter)
    muon = torch.optim.Muon(groups["inside"], weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    muon.param_groups[0]["share"] = 1.0
    adam = torch.optim.AdamW(
        [{"params": groups["patches"], "share": 0.1}, {"params": groups["rest"], "share": 1.0}],
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=True,
    )
    return muon, adam


@torch.no_grad()
def whiten(model: TrainModel, tokenizer: Tokenizer, seed: int) -> None:
    """Initialize the patch embedding as a whitened projection on the patches' main components.

    From random weights it perceives little but the mean color for the first thousands of steps.
    """
    maker = Maker(tokenizer, np.random.default_rng([seed, 888]), 0.5)
    batches = [maker.make(kind, 8000) for kind in KINDS for _ in range(3)]
    patches = torch.cat([cut(item).flatten(0, 1) for b in batches for item in b.items])
    patches = patches[patches.std(1) > 0.05]
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    weight = model.visual.patch_embed.proj.weight
    size = len(weight)
    best = vectors[:, -size:] / (values[-size:] + 1e-3 * values[-1]).sqrt()
    turned = torch.linalg.qr(torch.randn(size, size))[0] @ best.T
    weight.copy_(turned.view_as(weight))


def compile_blocks(model: TrainModel) -> None:
    """Compile the blocks: a third faster, but needs a C++ compiler and a minute at the start."""
    for block in (*model.visual.blocks, *model.model.layers):
        block.compile(dynamic=True)


def yield_cores(_: int) -> None:
    """Give the data loader low priority: a delayed training thread delays all the others."""
    os.nice(19)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--dir", type=Path, default=Path("/root/octavo-train"), help="folder of the training state")
    add("--seed", type=int, default=1)
    add("--lr", type=float, default=2e-3, help="learning rate between warm-up and decay")
    add("--budget", type=int, default=2500, help="patches per batch")
    add(
        "--compile",
        action="store_true",
        help="compile the model: a third faster, needs a C++ compiler",
    )
    add("--small", type=float, default=0.55, help="share of batches at a low resolution")
    add("--aux", type=float, default=0.4, help="weight of the training heads' loss")
    add("--decay-minutes", type=float, default=45)
    add("--stop-at", type=float, default=0, help="Unix time at which the decay must be finished")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    decay = args.decay_minutes * 60
    trainer = Trainer(args.dir, args.seed, args.lr, args.aux, args.compile, args.stop_at, decay)
    count = sum(p.numel() for p in trainer.model.parameters())
    print(f"{count} parameters with the training heads, from step {trainer.step}", flush=True)
    tokenizer_json = trainer.tokenizer.to_str()
    trainer.run(Batches(tokenizer_json, args.seed, trainer.step, args.small, args.budget, KINDS))


if __name__ == "__main__":
    main()
