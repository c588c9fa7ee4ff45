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


def write_prompt_logprobs(
    entries: Iterable[Any], decode: Decode
) -> list[dict[str, dict[str, Any]] | None]:
    """Of a prompt's tokens, in vLLM's form: by token id, the token's own first. `rank` counts from
    1, and is null for a token that is not among the likeliest. None where an entry is None."""
    return [entry and _by_token(entry, decode) for entry in entries]


def _by_token(entry: Any, decode: Decode) -> dict[str, dict[str, Any]]:
    ranks = {token: rank for rank, token in enumerate(entry.top, 1)}
    told = {entry.token_id: entry.logprob} | entry.top
    return {
        str(token): {
            "logprob": logprob,
            "rank": ranks.get(token),
            "decoded_token": decode([token]),
        }
        for token, logprob in told.items()
    }


def _entry(token: int, logprob: float, decode: Decode) -> dict[str, Any]:
    """`bytes` is null for a token that is a part of a character."""
    text = decode([token])
    whole = "\ufffd" not in text
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}
