"""Which call a tool's result answers. OpenAI's results name it and come in any order; Qwen's form
has no ids: there the results stand in the order of the calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..input_error import InputError, shown


def in_order_of_calls(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of checked messages, the results that follow an answer in the order of its calls.

    Raises `InputError` for one that names none of these. One that names nothing stays in its place.
    """
    order: list[int] = []
    results: list[tuple[int, int]] = []  # the place of its call, and its own
    calls: Sequence[Mapping[str, Any]] = ()
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            place = _place_of(message.get("tool_call_id"), calls, f"messages[{index}]")
            results.append((len(results) if place is None else place, index))
            continue
        order += [at for _, at in sorted(results)]
        order.append(index)
        results, calls = [], message.get("tool_calls") or ()
    return order + [at for _, at in sorted(results)]


def _place_of(given: Any, calls: Sequence[Mapping[str, Any]], field: str) -> int | None:
    """None where there is nothing to go by."""
    ids = [call.get("id") for call in calls]
    if not given or (ids and not any(ids)):
        return None
    if given not in ids:
        text = f"{shown(given)}: is no id in tool_calls of the assistant's message before"
        raise InputError(f"{field}.tool_call_id", text)
    return ids.index(given)
