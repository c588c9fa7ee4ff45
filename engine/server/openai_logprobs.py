"""Tokens' log probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Decode = Callable[[Sequence[int]], str]


def write_logprobs(entries: Iterable[Any], decode: Decode, is_chat: bool) -> dict[str, Any] | None:
    """Of an answer's new tokens; None where they were not asked for. `entries` have a `token_id`,
    its `logprob`, and `top`, those of the likeliest token ids."""
    entries = list(entries)
    if not entries:
        return None
    if is_chat:
        return {
            "content": [
                _entry(each.token_id, each.logprob, decode)
                | {"top_logprobs": [_entry(t, p, decode) for t, p in each.top.items()]}
                for each in entries
            ]
        }
    return {
        "tokens": [decode([each.token_id]) for each in entries],
        "token_logprobs": [each.logprob for each in entries],
        "top_logprobs": [
            {decode([token]): logprob for token, logprob in each.top.items()} for each in entries
        ],
    }


def _entry(token: int, logprob: float, decode: Decode) -> dict[str, Any]:
    """`bytes` is null for a token that is a part of a character."""
    text = decode([token])
    whole = "\ufffd" not in text
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}
