"""What a checkpoint says of sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..scheduler.params import SamplingParams
from .config import ConfigError, read_json

MAX_END_TOKENS = 1024


def generation_defaults(path: Path) -> tuple[SamplingParams, frozenset[int]]:
    """Sampling defaults and end tokens of a checkpoint's `generation_config.json`."""
    raw = read_json(path / "generation_config.json", missing_ok=True)
    try:
        return _read(raw, path)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path / 'generation_config.json'}: {error}") from None


def _read(raw: dict[str, Any], path: Path) -> tuple[SamplingParams, frozenset[int]]:
    """Raises TypeError or ValueError."""
    eos = raw.get("eos_token_id", read_json(path / "config.json").get("eos_token_id"))
    given = eos if isinstance(eos, list) else [] if eos is None else [eos]
    ends = frozenset(each for each in given if type(each) is int)
    if len(given) > MAX_END_TOKENS:
        raise ValueError(f"eos_token_id: {len(given)} ids; at most {MAX_END_TOKENS} are taken")
    if any(type(each) is not int or not 0 <= each < 1 << 31 for each in given):
        raise ValueError(f"eos_token_id={eos!r}: must be a token id, or a list of them")
    temperature = raw.get("temperature")
    greedy = raw.get("do_sample") is False
    return SamplingParams(
        temperature=0.0 if greedy else float(1.0 if temperature is None else temperature),
        top_k=int(raw.get("top_k") or 0),
        top_p=float(raw.get("top_p") or 1.0),
        min_p=float(raw.get("min_p") or 0.0),
        repetition_penalty=float(raw.get("repetition_penalty") or 1.0),
    ), ends
