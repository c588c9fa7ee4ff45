"""Read structured output options: OpenAI's `response_format`, vLLM's `structured_outputs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....scheduler.params import truncated_repr
from ....scheduler.structured import ANY_OBJECT, StructuredOutput
from ...errors import InputError

FORMATS = ("text", "json_object", "json_schema")
OF_SCHEMA = ("name", "description", "schema", "strict")
FORMS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "lark"}


def read_structured(given: dict[str, Any]) -> tuple[StructuredOutput | None, str]:
    """Remove both fields from `given` and return the constraint and the name of its field.

    Raises `InputError`.
    """
    response_format = given.pop("response_format", None)
    outputs = given.pop("structured_outputs", None)
    form, field = _read_format(response_format)
    if outputs is None:
        return form, field
    if form is not None:
        raise InputError(
            "structured_outputs", "cannot be combined with response_format; set only one"
        )
    return _read_outputs(outputs)


def _read_format(given: Any) -> tuple[StructuredOutput | None, str]:
    field = "response_format"
    if given is None:
        return None, ""
    kind = _mapping(field, given).get("type")
    if kind not in FORMATS:
        raise InputError(
            f"{field}.type", f"{truncated_repr(kind)}: must be one of {', '.join(FORMATS)}"
        )
    known = ("type", "json_schema") if kind == "json_schema" else ("type",)
    _only(field, given, known)
    if kind != "json_schema":
        return (ANY_OBJECT, field) if kind == "json_object" else (None, "")
    field = f"{field}.json_schema"
    found = _mapping(field, given.get("json_schema"))
    _only(field, found, OF_SCHEMA)
    if not isinstance(found.get("strict"), bool | None):
        raise InputError(
            f"{field}.strict", f"{truncated_repr(found['strict'])}: must be true or false"
        )
    field = f"{field}.schema"
    schema = _mapping(field, found.get("schema"))
    return _made(field, json_schema=schema), field


def _read_outputs(given: Any) -> tuple[StructuredOutput, str]:
    field = "structured_outputs"
    _only(field, _mapping(field, given), tuple(FORMS))
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) != 1:
        raise InputError(field, f"set exactly one of {', '.join(FORMS)}")
    ((name, value),) = found.items()
    if value in ("", []):
        raise InputError(f"{field}.{name}", "must not be empty")
    return _made(f"{field}.{name}", **{FORMS[name]: value}), f"{field}.{name}"


def _made(field: str, **form: Any) -> StructuredOutput:
    try:
        return StructuredOutput(**form)
    except InputError as error:
        raise renamed(error, field) from None


def renamed(error: InputError, field: str) -> InputError:
    """Return an error about `structured` with `field` as its field name. Others are unchanged."""
    if not error.field.startswith("structured"):
        return error
    return InputError(field, field + str(error).removeprefix(error.field))


def _mapping(field: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise InputError(field, f"{truncated_repr(given)}: must be an object")
    return given


def _only(field: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise InputError(
                field, f"{truncated_repr(name)} is unknown; allowed are {', '.join(known)}"
            )
