"""Format output log probabilities as in OpenAI's APIs, and those of prompts as in vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ....scheduler.logprobs import TokenLogprobs
from ..chunked_json import LazyList
from ..token_texts import TextOffsets, TokenTexts

MIN_LOGPROB = -9999.0  # OpenAI's value for -Infinity, which JSON lacks

Entries = Sequence[TokenLogprobs]


def write_chat_logprobs(entries: Entries, texts: TokenTexts) -> dict[str, Any] | None:
    """Return `logprobs` of a chat choice, or None if not requested."""
    if not entries:
        return None
    return {"content": LazyList(lambda: (_chat_entry(each, texts) for each in entries))}


def write_completion_logprobs(
    entries: Entries, texts: TokenTexts, offsets: TextOffsets
) -> dict[str, Any] | None:
    """Return `logprobs` of a completions choice, or None if not requested.

    `offsets`: the choice's offset counter. Encode the result only once, because that advances it.
    """
    if not entries:
        return None
    return {
        "tokens": LazyList(lambda: (texts.key_of(each.token_id) for each in entries)),
        "token_logprobs": LazyList(lambda: (_finite(each.logprob) for each in entries)),
        "top_logprobs": LazyList(lambda: (_by_key(each, texts) for each in entries)),
        "text_offset": LazyList(lambda: offsets.of(each.token_id for each in entries)),
    }


def write_prompt_logprobs(entries: Sequence[TokenLogprobs | None], texts: TokenTexts) -> LazyList:
    """Return a prompt's log probabilities in vLLM's format: by token id, the prompt token first.

    `rank` starts at 1; it is null for a token that is not among the alternatives. Entries that are
    None stay None.
    """
    return LazyList(lambda: (each and _by_token(each, texts) for each in entries))


def _by_token(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, dict[str, Any]]:
    ranks = {token: rank for rank, token in enumerate(entry.top, 1)}
    found = {entry.token_id: entry.logprob} | entry.top
    return {
        str(token): {
            "logprob": _finite(logprob),
            "rank": ranks.get(token),
            "decoded_token": texts.bytes_of(token).decode(errors="replace"),
        }
        for token, logprob in found.items()
    }


def _by_key(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, float]:
    """Map names to logprobs, the sampled token first. A duplicate name becomes the token id."""
    found = {texts.key_of(entry.token_id): _finite(entry.logprob)}
    for token, logprob in _others(entry):
        key = texts.key_of(token)
        found[f"token_id:{token}" if key in found else key] = _finite(logprob)
    return found


def _others(entry: TokenLogprobs) -> Iterator[tuple[int, float]]:
    pairs = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
    return (pair for pair in pairs if pair[0] != entry.token_id)


def _chat_entry(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, Any]:
    top = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
    own = _token(entry.token_id, entry.logprob, texts)
    return {**own, "top_logprobs": [_token(token, logprob, texts) for token, logprob in top]}


def _token(token: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    data = list(texts.bytes_of(token))
    return {"token": texts.text_of(token), "logprob": _finite(logprob), "bytes": data}


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
