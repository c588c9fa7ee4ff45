"""Generate docs/openai.md.

python -m octavo.engine.server.http_api.make_openai_docs > docs/openai.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from ...utils.openai_fields import TABLES, Field

HEAD = """\
# The OpenAI-compatible HTTP API

<!-- Generated from engine/utils/openai_fields.py by engine/server/http_api/make_openai_docs.py. -->

Request fields of `/v1/chat/completions` and `/v1/completions`. Null is the same as absent.
"Accepted without effect" means that the field is ignored. If the table lists values, only those are
accepted. Other values, and fields that are not in these tables, are rejected with an error that
names the field.

Responses: `usage` is the total over all prompts and choices of a request. In `logprobs`, `bytes`
are the exact bytes of a token; an incomplete character is written as `\\xe2\\x80` in chats and
`bytes:\\xe2\\x80` in completions. `top_logprobs` of completions list the sampled token first; if
two tokens have the same name, the second is named `token_id:ID`. `text_offset` counts characters.

A request may have at most 2,097,152 log probabilities over all of its prompts and outputs:
prompt tokens x (`prompt_logprobs` + 1) + `n` x `max_tokens` x (`logprobs` + 1). Without
`max_tokens`, the maximum output length of the model counts. Responses over 32 KiB are chunked.
"""


def openai_page() -> str:
    """Return the page as Markdown."""
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
