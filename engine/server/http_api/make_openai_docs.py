"""Write docs/openai.md.

python -m octavo.engine.server.http_api.make_openai_docs > docs/openai.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from ...utils.openai_fields import TABLES, Field

HEAD = """\
# The OpenAI-compatible HTTP API

<!-- Generated from engine/utils/openai_fields.py by engine/server/http_api/make_openai_docs.py. -->

Fields of requests to `/v1/chat/completions` and `/v1/completions`. Null is the same as absent.
"Accepted without effect": the field changes no answer here, and any value passes unless values are
named; other values are rejected by name, as is every field that is not in these tables.

Responses: `usage` is over all prompts and choices of a request. In `logprobs`, `bytes` are the
exact bytes of a token; a part of a character is written as `\\xe2\\x80` in chats and
`bytes:\\xe2\\x80` in completions. `top_logprobs` of completions have the sampled token first; a
name that two tokens share is `token_id:ID` for the second. `text_offset` counts characters.

A request may ask for at most 2,097,152 log probabilities over all of its prompts and answers:
tokens of its prompts x (`prompt_logprobs` + 1) + `n` x `max_tokens` x (`logprobs` + 1). An answer
without `max_tokens` counts as long as the model allows. Responses over 32 KiB are sent in pieces.
"""


def openai_page() -> str:
    """Return the page, as Markdown."""
    return HEAD + "\n" + "\n".join(line for table in TABLES.items() for line in _table(*table))


def _table(title: str, fields: tuple[Field, ...]) -> Iterator[str]:
    yield from (f"## {title}", "", "| field | type | effect |", "|---|---|---|")
    for field in fields:
        yield f"| `{field.name}` | {field.type} | {_effect(field)} |"
    yield ""


def _effect(field: Field) -> str:
    if field.is_supported:
        return field.effect
    if field.neutral is None:
        return "accepted without effect"
    if not field.neutral:
        return "only null is accepted"
    values = ", ".join(f"`{json.dumps(value)}`" for value in field.neutral)
    return f"accepted without effect: {values}"


if __name__ == "__main__":
    print(openai_page(), end="")
