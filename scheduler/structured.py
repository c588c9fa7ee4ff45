"""The form that an answer is to have, as a caller states it. Its form is checked here; what it says
is read by the engine's `grammar.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from reprlib import Repr
from typing import Any

MAX_FORM_BYTES = 1 << 16  # of a schema, regex or grammar, or of all choices
MAX_CHOICES = 1024

_REPR = Repr()
_REPR.maxstring = 80


@dataclass(frozen=True)
class StructuredOutput:
    """Exactly one is given; the answer then has that form and no other.

    json_schema: JSON text or a dict; kept as text. `{"type": "object"}` is any JSON object.
    regex: the whole answer matches it; neither look-around nor back-references.
    choice: the answer is one of these texts.
    lark: a grammar in Lark's form, as llguidance reads it.

    End tokens are drawn only where the form is complete, and the answer ends as soon as nothing can
    follow. `max_tokens`, `stop` and `stop_token_ids` may cut it off before that; `ignore_eos` and
    `min_tokens` hold as long as the form lets the answer go on. Log probabilities are the model's
    own, as if there were no form. Raises ValueError.
    """

    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    lark: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.choice, str | bytes) or not isinstance(self.choice, Sequence):
            raise ValueError("structured.choice: must be a list of texts")
        if len(self.choice) > MAX_CHOICES:
            raise ValueError(f"structured.choice: {len(self.choice)}; at most {MAX_CHOICES}")
        object.__setattr__(self, "choice", tuple(self.choice))
        given = [each.name for each in fields(self) if getattr(self, each.name) not in (None, ())]
        if len(given) != 1:
            names = ", ".join(each.name for each in fields(self))
            found = f"{' and '.join(given)} are given" if given else "nothing is given"
            raise ValueError(f"structured: {found}; give exactly one of {names}")
        if isinstance(self.json_schema, Mapping | bool):
            object.__setattr__(self, "json_schema", _as_json(self.json_schema))
        for text in self.choice if self.choice else (getattr(self, given[0]),):
            _check_text(f"structured.{given[0]}", text)
        if sum(len(text.encode("utf-8", "replace")) for text in self.choice) > MAX_FORM_BYTES:
            raise ValueError(f"structured.choice: at most {MAX_FORM_BYTES} bytes together")
        if self.lark is not None and self.lark.lstrip().startswith("{"):
            raise ValueError("structured.lark: begins with '{', and a Lark grammar with a rule")
        if self.json_schema is not None:
            _check_schema(str(self.json_schema))

    @property
    def field(self) -> str:
        """The one that is given."""
        return next(f.name for f in fields(self) if getattr(self, f.name) not in (None, ()))


def _as_json(schema: object) -> str:
    try:
        return json.dumps(dict(schema) if isinstance(schema, Mapping) else schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("structured.json_schema: must be made of what JSON has") from None


def _check_text(field: str, text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{field}={_REPR.repr(text)}: must be a text")
    if not text:
        raise ValueError(f"{field}: is empty")
    if len(text) > MAX_FORM_BYTES or len(text.encode("utf-8", "replace")) > MAX_FORM_BYTES:
        raise ValueError(f"{field}: {len(text)} characters; at most {MAX_FORM_BYTES} bytes")
    if text.encode("utf-8", "ignore").decode() != text or "\0" in text:
        raise ValueError(f"{field}={_REPR.repr(text)}: must be Unicode text")


def _check_schema(text: str) -> None:
    field = "structured.json_schema"
    try:
        schema = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{field}: is not JSON from {where} on") from None
    except (ValueError, RecursionError):  # a number of too many digits; brackets in brackets
        raise ValueError(f"{field}: is not JSON that can be read: it nests too deep") from None
    if not isinstance(schema, dict):
        raise ValueError(f"{field}={_REPR.repr(schema)}: must be an object")


ANY_OBJECT = StructuredOutput(json_schema='{"type":"object"}')
