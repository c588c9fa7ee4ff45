"""Sampling defaults and EOS tokens of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...scheduler.params import SamplingParams
from ..errors import ConfigError
from .engine_config import read_json
from .json_fields import JsonFields

FILE = "generation_config.json"
MAX_END_TOKENS = 256


def generation_defaults(path: Path) -> tuple[SamplingParams, frozenset[int]]:
    """Return the defaults and EOS tokens of `generation_config.json`. Raises `ConfigError`."""
    raw = JsonFields(read_json(path / FILE, missing_ok=True), str(path / FILE))
    greedy = raw.get("do_sample") is False
    try:
        params = SamplingParams(
            temperature=0.0 if greedy else float(raw.number("temperature", 0, 100, 1.0)),
            top_k=raw.integer("top_k", 0, 1 << 30, 0),
            top_p=float(raw.number("top_p", 0, 1, 1.0)) or 1.0,
            min_p=float(raw.number("min_p", 0, 1, 0.0)),
            repetition_penalty=float(raw.number("repetition_penalty", 0, 100, 1.0)) or 1.0,
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path / FILE}: {error}") from None
    return params, _end_tokens(raw, path)


def _end_tokens(raw: JsonFields, path: Path) -> frozenset[int]:
    if "eos_token_id" not in raw.raw:
        raw = JsonFields(read_json(path / "config.json"), str(path / "config.json"))
    eos: Any = raw.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if len(ends) > MAX_END_TOKENS or any(type(each) is not int or each < 0 for each in ends):
        text = f"must be a token id, or a list of at most {MAX_END_TOKENS} of them"
        raise raw.error("eos_token_id", text)
    return frozenset(ends)
