"""Answers of a given form through LLM, AsyncLLM, gRPC and HTTP: the same tokens, the same refusals,
and no harm to a neighbour."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import openai
import pytest

import octavo
from octavo import SamplingParams, StructuredOutput
from octavo.engine.client.client import ClientError
from octavo.engine.config.engine_config import EMBEDDED_MODEL
from octavo.engine.errors import InputError
from octavo.tests.support.http_served import HttpServed

WHO = [{"role": "user", "content": "Who are you?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square"]},
        "sides": {"type": "integer", "minimum": 0, "maximum": 99},
        "notes": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
    },
    "required": ["shape", "sides"],
    "additionalProperties": False,
}
FORMS = {
    "schema": StructuredOutput(json_schema=SCHEMA),
    "regex": StructuredOutput(regex="[A-F]{3}-[0-9]{4}"),
    "choice": StructuredOutput(choice=("a circle", "a square", "keins von beiden 👍")),
    "lark": StructuredOutput(lark='start: "<" WORD ("," WORD)~2 ">"\nWORD: /[a-z]{3}/'),
}
DRAWN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 11}
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 6,
}
# Compiled at once, and found too complex only as it is followed.
HOSTILE = "a?" * 2000 + "a" * 2000
KEY = "the-one-and-only-key"
LOOK_AROUND, NOT = "look-around is not supported", "'not': not supported; remove it"


def check(name: str, text: str) -> None:
    if name == "schema":
        jsonschema.validate(json.loads(text), SCHEMA)
    elif name == "regex":
        assert re.fullmatch("[A-F]{3}-[0-9]{4}", text)
    elif name == "choice":
        assert text in FORMS[name].choice
    else:
        assert re.fullmatch("<[a-z]{3}(,[a-z]{3}){2}>", text)


@pytest.fixture(scope="module")
def served() -> Iterator[HttpServed]:
    served = HttpServed(EMBEDDED_MODEL, (KEY,), **SETTINGS)
    yield served
    served.wait_empty()
    served.close()


@pytest.fixture
def client(served: HttpServed) -> Iterator[octavo.Client]:
    with octavo.Client(served.address) as client:
        yield client


@pytest.fixture
def web(served: HttpServed) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as web:
        yield web


def params_of(name: str, **more: Any) -> SamplingParams:
    return SamplingParams(**{**DRAWN, "structured": FORMS[name], "max_tokens": 200, **more})


@pytest.fixture(scope="module")
def told() -> dict[str, list[str]]:
    """What `LLM` answers to each form, three times; all at once, beside a free one."""
    with octavo.LLM(**SETTINGS) as llm:
        free = SamplingParams(**DRAWN, max_tokens=40)
        alone = llm.chat(WHO, free)[0].outputs[0]
        each = [*(params_of(name, n=3) for name in FORMS), free]
        outs = llm.chat([WHO] * len(each), each, progress=False)
        assert outs[-1].outputs[0].token_ids == alone.token_ids
        for out in outs[:-1]:
            assert {answer.finish_reason for answer in out.outputs} == {"stop"}
        with pytest.raises(InputError, match=NOT) as caught:
            llm.chat(
                WHO, SamplingParams(structured=StructuredOutput(json_schema={"not": {"const": 1}}))
            )
        assert caught.value.field == "structured.json_schema"
        bad = params_of("regex", structured=StructuredOutput(regex="a(?=b)"))
        refused, kept = llm.chat([WHO, WHO], [bad, params_of("regex")], progress=False)
        assert LOOK_AROUND in refused.error and kept.outputs[0].text == outs[1].outputs[0].text
        llm.engine.scheduler.check_integrity()
        assert not llm.engine._matchers._matchers
    return {n: [a.text for a in out.outputs] for n, out in zip(FORMS, outs, strict=False)}


@pytest.mark.parametrize("name", sorted(FORMS))
def test_answers_have_their_form(told: dict[str, list[str]], name: str) -> None:
    assert len(told[name]) == 3
    for text in told[name]:
        check(name, text)


def test_many_seeds_make_valid_json(served: HttpServed) -> None:
    async def ask(seed: int) -> str:
        params = params_of("schema", seed=seed, temperature=1.3)
        deltas = [delta async for delta in served.engine.chat(WHO, params)]
        assert deltas[-1].finish_reason == "stop"
        return "".join(delta.text for delta in deltas)

    async def ask_all() -> list[str]:
        return await asyncio.gather(*map(ask, range(6)))

    texts = served.run(ask_all())
    for text in texts:
        check("schema", text)
    assert len(set(texts)) > 1


@pytest.mark.parametrize("name", sorted(FORMS))
def test_every_api_answers_the_same(
    served: HttpServed,
    client: octavo.Client,
    web: openai.OpenAI,
    told: dict[str, list[str]],
    name: str,
) -> None:
    expected = told[name][0]

    async def ask() -> str:
        return "".join([delta.text async for delta in served.engine.chat(WHO, params_of(name))])

    assert served.run(ask()) == expected
    deltas = list(client.chat(WHO, **DRAWN, max_tokens=200, structured=FORMS[name]))
    assert "".join(delta.text for delta in deltas) == expected
    assert deltas[-1].finish_reason == "stop"
    assert say(web, name) == (expected, "stop")
    assert say(web, name, stream=True) == (expected, "stop")


def say(web: openai.OpenAI, name: str, stream: bool = False) -> tuple[str, str]:
    """By `response_format` where that can say it."""
    form = FORMS[name]
    more: dict[str, Any] = {"model": "embedded", "messages": WHO, "max_tokens": 200}
    more |= {"temperature": 1.0, "top_p": 1.0, "seed": 11, "extra_body": {"top_k": 0}}
    if name == "schema":
        said = {"name": "shape", "schema": SCHEMA, "strict": True}
        more["response_format"] = {"type": "json_schema", "json_schema": said}
    else:
        key = {"regex": "regex", "choice": "choice", "lark": "grammar"}[name]
        more["extra_body"]["structured_outputs"] = {key: getattr(form, form.field)}
    if not stream:
        choice = web.chat.completions.create(**more).choices[0]
        return choice.message.content or "", str(choice.finish_reason)
    chunks = [c.choices[0] for c in web.chat.completions.create(**more, stream=True)]
    text = "".join(chunk.delta.content or "" for chunk in chunks)
    return text, str(chunks[-1].finish_reason)


def test_any_json_object_and_completions(web: openai.OpenAI) -> None:
    # A model that was not taught JSON may fill a string for ever: `max_tokens` cuts it off.
    made = web.chat.completions.create(
        model="embedded", messages=WHO, response_format={"type": "json_object"},
        max_tokens=80, temperature=0,
    ).choices[0]  # fmt: skip
    assert (made.message.content or "").startswith("{")
    if made.finish_reason == "stop":
        assert isinstance(json.loads(made.message.content or ""), dict)
    plain = web.chat.completions.create(
        model="embedded", messages=WHO, response_format={"type": "text"}, temperature=0
    )
    free = web.chat.completions.create(model="embedded", messages=WHO, temperature=0)
    assert plain.choices[0].message.content == free.choices[0].message.content
    text = web.completions.create(
        model="embedded",
        prompt="Yes or no?",
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert text.choices[0].text in ("yes", "no")
    schema = web.completions.create(
        model="embedded", prompt="?", max_tokens=200, temperature=0,
        extra_body={"structured_outputs": {"json": json.dumps(SCHEMA)}},
    )  # fmt: skip
    check("schema", schema.choices[0].text)


BAD_BODIES: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": 3}, "response_format", "must be an object"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "text, json_object"),
    ({"response_format": {"type": "text", "x": 1}}, "response_format", "'x' is unknown"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "an object"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
     "response_format.json_schema.strict", "true or false"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {"const": 1}}}}},
     "response_format.json_schema.schema", NOT),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a(?=b)"}}, "structured_outputs.regex", LOOK_AROUND),
    ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs.regex", "65536 bytes"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "must not be empty"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "is not"),
    ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar", "not defined"),
    ({"structured_outputs": {"lark": "start: x"}}, "structured_outputs", "'lark' is unknown"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
     "structured_outputs", "set only one"),
    ({"structured": {"regex": "a"}}, "structured", "unknown"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(BAD_BODIES)))
@pytest.mark.parametrize("stream", [False, True])
def test_bad_forms_over_http(web: openai.OpenAI, index: int, stream: bool) -> None:
    body, param, words = BAD_BODIES[index]
    with pytest.raises(openai.BadRequestError) as caught:
        web.chat.completions.create(model="embedded", messages=WHO, stream=stream,
                                    extra_body=body)  # fmt: skip
    error: Any = caught.value.body
    assert error["param"] == param and words in error["message"]
    assert error["message"].startswith(param) or param == "structured"


def test_bad_forms_over_grpc(client: octavo.Client) -> None:
    with pytest.raises(ClientError) as caught:
        list(client.chat(WHO, structured=StructuredOutput(json_schema={"not": {"const": 1}})))
    assert caught.value.code == "INVALID_ARGUMENT" and NOT in str(caught.value)
    assert "structured.json_schema" in str(caught.value)
    with pytest.raises(ClientError, match=r"must be an octavo.StructuredOutput"):
        list(client.chat(WHO, structured="a"))


def test_what_proves_too_complex_ends_its_own_request_alone(
    served: HttpServed, client: octavo.Client, web: openai.OpenAI
) -> None:
    async def ask(params: SamplingParams) -> tuple[list[int], str]:
        deltas = [delta async for delta in served.engine.chat(WHO, params)]
        return [token for delta in deltas for token in delta.token_ids], deltas[-1].error

    free = SamplingParams(**DRAWN, max_tokens=60, ignore_eos=True)
    expected, _ = served.run(ask(free))
    bad = replace(free, ignore_eos=False, structured=StructuredOutput(regex=HOSTILE))

    async def ask_both() -> Any:
        return await asyncio.gather(ask(free), *(ask(replace(bad, seed=i)) for i in range(4)))

    neighbour, *ended = served.run(ask_both())
    assert neighbour == (expected, "")
    for _, error in ended:
        assert error.startswith("INVALID_ARGUMENT: structured.regex: after "), error
        assert "too complex; simplify it" in error
    with pytest.raises(ClientError) as caught:
        list(client.chat(WHO, structured=bad.structured, **DRAWN))
    assert caught.value.code == "INVALID_ARGUMENT" and "too complex" in str(caught.value)
    assert caught.value.field == "structured.regex"
    with pytest.raises(
        openai.BadRequestError, match=r"structured_outputs\.regex: .* too c"
    ) as told:
        web.chat.completions.create(
            model="embedded", messages=WHO,
            extra_body={"structured_outputs": {"regex": HOSTILE}},
        )  # fmt: skip
    assert told.value.param == "structured_outputs.regex"
    with pytest.raises(ClientError) as caught:
        client.generate_once(WHO, structured=bad.structured, **DRAWN)
    assert caught.value.field == "structured.regex"
    served.wait_empty()
    assert not served.engine.engine._matchers._matchers


def test_settings_beside_a_form(served: HttpServed) -> None:
    async def ask(form: StructuredOutput, **more: Any) -> tuple[str, str | None, int]:
        params = SamplingParams(**{**DRAWN, "structured": form, "max_tokens": 30, **more})
        deltas = [delta async for delta in served.engine.chat(WHO, params)]
        count = sum(len(delta.token_ids) for delta in deltas)
        return "".join(delta.text for delta in deltas), deltas[-1].finish_reason, count

    many, one = StructuredOutput(regex="b*"), StructuredOutput(regex="b(c|d)")
    text, reason, count = served.run(ask(many, ignore_eos=True))
    assert (set(text), reason, count) == ({"b"}, "length", 30)
    text, reason, count = served.run(ask(many, min_tokens=9))
    assert set(text) == {"b"} and reason in ("stop", "length") and count >= 9
    for more in ({"ignore_eos": True}, {"min_tokens": 20}):
        text, reason, _ = served.run(ask(one, **more))
        assert text in ("bc", "bd") and reason == "stop"
    tokenizer = served.engine.engine.processor.tokenizer.backend
    letter = tokenizer.token_to_id("c")
    text, reason, _ = served.run(ask(StructuredOutput(regex="[cd]{3}"), bad_words=("c",)))
    assert (text, reason) == ("ddd", "stop")
    text, _, _ = served.run(ask(StructuredOutput(regex="[cd]{3}"), logit_bias={letter: 100.0}))
    assert text == "ccc"
    text, reason, _ = served.run(ask(StructuredOutput(regex="[a-z]{9}"), stop=("c", "d", "e", "s")))
    assert reason == "stop" and not set(text) & set("cdes")
    assert served.run(ask(one, max_tokens=2))[1] == "stop"  # complete with its last token
