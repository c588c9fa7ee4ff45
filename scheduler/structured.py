"""Structured-output constraints of a request, and their basic validation.

Grammars are compiled by the engine's `structured_output` package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from reprlib import Repr
from typing import Any

from .errors import InputError

MAX_FORM_BYTES = 1 << 16  # of a schema, regex or grammar, or of all choices together
MAX_CHOICES = 1024

_REPR = Repr()
_REPR.maxstring = 80


@dataclass(frozen=True)
class StructuredOutput:
    """Constraint on the whole output. Exactly one field must be set.

    json_schema: JSON text or a dict, stored as text. `{"type": "object"}` allows any JSON object.
    regex: A regular expression without look-around and back-references.
    choice: A list of strings, of which the output is one.
    lark: A Lark grammar in llguidance's dialect.

    EOS tokens are allowed only where the output is complete, and generation stops when nothing can
    follow. `max_tokens`, `stop` and `stop_token_ids` may truncate it earlier; `ignore_eos` and
    `min_tokens` apply as long as the grammar allows more output. Log probabilities are those of
    the unconstrained model. Raises `InputError` if the value is malformed or too large.
    """

    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    lark: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.choice, str | bytes) or not isinstance(self.choice, Sequence):
            raise InputError("structured.choice", "must be a list of strings")
        if len(self.choice) > MAX_CHOICES:
            raise InputError(
                "structured.choice",
                f"{len(self.choice)} choices; the maximum is {MAX_CHOICES}",
            )
        object.__setattr__(self, "choice", tuple(self.choice))
        given = [each.name for each in fields(self) if getattr(self, each.name) not in (None, ())]
        if len(given) != 1:
            names = ", ".join(each.name for each in fields(self))
            found = f"{' and '.join(given)} are set" if given else "no field is set"
            raise InputError("structured", f"{found}; set exactly one of {names}")
        if isinstance(self.json_schema, Mapping | bool):
            object.__setattr__(self, "json_schema", _as_json(self.json_schema))
        for text in self.choice if self.choice else (getattr(self, given[0]),):
            _check_text(f"structured.{given[0]}", text)
        if sum(len(text.encode("utf-8", "replace")) for text in self.choice) > MAX_FORM_BYTES:
            raise InputError("structured.choice", f"exceeds {MAX_FORM_BYTES} bytes in total")
        if self.lark is not None and self.lark.lstrip().startswith("{"):
            raise InputError("structured.lark", "starts with '{'; pass Lark rules, not JSON")
        if self.json_schema is not None:
            _check_schema(str(self.json_schema))

    @property
    def field(self) -> str:
        """Return the name of the field that is set."""
        return next(f.name for f in fields(self) if getattr(self, f.name) not in (None, ()))


def _as_json(schema: object) -> str:
    try:
        return json.dumps(dict(schema) if isinstance(schema, Mapping) else schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise InputError("structured.json_schema", "must be JSON-serializable") from None


def _check_text(field: str, text: object) -> None:
    if not isinstance(text, str):
        raise InputError(field, f"{field}={_REPR.repr(text)}: must be a string")
    if not text:
        raise InputError(field, "must not be empty")
    if len(text) > MAX_FORM_BYTES or len(text.encode("utf-8", "replace")) > MAX_FORM_BYTES:
        raise InputError(field, f"{len(text)} characters; the maximum is {MAX_FORM_BYTES} bytes")
    if text.encode("utf-8", "ignore").decode() != text or "\0" in text:
        fix = "must be valid Unicode text without NUL"
        raise InputError(field, f"{field}={_REPR.repr(text)}: {fix}")


def _check_schema(text: str) -> None:
    field = "structured.json_schema"
    try:
        schema = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(field, f"is not valid JSON at {where}") from None
    except (ValueError, RecursionError):  # too many digits; too deep nesting
        raise InputError(
            field, "is not valid JSON: nested too deep, or a number too long"
        ) from None
    if not isinstance(schema, dict):
        raise InputError(field, f"{field}={_REPR.repr(schema)}: must be a JSON object")


ANY_OBJECT = StructuredOutput(json_schema='{"type":"object"}')
