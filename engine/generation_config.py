"""What a checkpoint says of sampling."""

from __future__ import annotations

from pathlib import Path

from ..scheduler.params import SamplingParams
from .config import read_json


def generation_defaults(path: Path) -> tuple[SamplingParams, frozenset[int]]:
    """Sampling defaults and end tokens of a checkpoint's `generation_config.json`."""
    raw = read_json(path / "generation_config.json", missing_ok=True)
    eos = raw.get("eos_token_id", read_json(path / "config.json").get("eos_token_id"))
    ends = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
    greedy = raw.get("do_sample") is False
    return SamplingParams(
        temperature=0.0 if greedy else float(raw.get("temperature", 1.0)),
        top_k=int(raw.get("top_k") or 0),
        top_p=float(raw.get("top_p") or 1.0),
        min_p=float(raw.get("min_p") or 0.0),
        repetition_penalty=float(raw.get("repetition_penalty") or 1.0),
    ), ends
