"""Tool calls: found in an answer whatever it is cut into, written into a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import octavo
from octavo.engine.client.tools import add_tools
from octavo.engine.config.engine_config import ModelConfig
from octavo.engine.core.tool_call_stream import ToolCallStream
from octavo.engine.errors import InputError
from octavo.engine.input.chat_template import ChatTemplate
from octavo.engine.input.conversation import read_conversation
from octavo.engine.input.prompt import PromptReader
from octavo.engine.outputs import OutputDelta
from octavo.engine.server.grpc_api import tools as convert_tools
from octavo.engine.tool_calling.parser import ToolCall, ToolParser, split_answer
from octavo.engine.tool_calling.schema import read_tools
from octavo.engine.tool_calling.tool_choice import ToolUse
from octavo.proto import octavo_pb2 as pb

A = '<tool_call>\n{"name": "a", "arguments": {"x": {"y": [1]}}}\n</tool_call>'
CALL_A = ToolCall("a", '{"x": {"y": [1]}}')


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain", "plain", []),
        (A, "", [CALL_A]),
        (f"one\n{A}\n{A}two", "onetwo", [CALL_A, CALL_A]),
        (f"a <tool_ {A} b", "a <tool_  b", [CALL_A]),
        ("<tool_call>{bad}</tool_call>", "<tool_call>{bad}</tool_call>", []),
        ("x\n<tool_call>[1]</tool_call>y", "x\n<tool_call>[1]</tool_call>y", []),
        (A[:-12], "", [CALL_A]),  # only the closing tag is missing
        (A[:30], A[:30], []),  # cut off by max_tokens
        ("a\n<tool_c", "a\n<tool_c", []),
        ('<tool_call>{"name": "a", "arguments": NaN}</tool_call>', None, []),
        ('<tool_call>{"name": "a", "arguments": {"x": 1e999}}</tool_call>', None, []),
        ('<tool_call>{"name": 1}</tool_call>', None, []),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", None, []),
        ('<tool_call>{"name": "a"}</tool_call>', "", [ToolCall("a", "{}")]),
    ],
)
def test_what_is_found(text: str, content: str | None, calls: list[ToolCall]) -> None:
    """None: all of it, unchanged."""
    assert split_answer(text) == (text if content is None else content, tuple(calls))


@pytest.mark.parametrize("inside", ["</tool_call>", '"</tool_call>', '\\"', "<tool_call>", "é\n}"])
def test_a_tag_in_a_text_is_none(inside: str) -> None:
    arguments = json.dumps({"x": inside}, ensure_ascii=False)
    found = split_answer(f'<tool_call>\n{{"name": "a", "arguments": {arguments}}}\n</tool_call>.')
    assert found == (".", (ToolCall("a", arguments),))


def test_half_a_surrogate_pair_can_be_sent() -> None:
    text = '<tool_call>{"name": "a", "arguments": {"x": "\\ud800"}}</tool_call>'
    assert split_answer(text) == ("", (ToolCall("a", '{"x": "\\ud800"}'),))


PIECES = ["<tool_call>", "</tool_call>", "\n", "<", "tool", '"', "\\", "{", "}", A, "\n" + A, "x"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.lists(st.integers(1, 9), max_size=60),
)
def test_any_cut_finds_the_same(text: str, sizes: list[int]) -> None:
    parser = ToolParser()
    content, calls, at = "", [], 0
    for size in [*sizes, len(text)]:
        told, found = parser.push(text[at : at + size])
        content, at = content + told, at + size
        calls.extend(found)
    told, found = parser.flush()
    assert (content + told, (*calls, *found)) == split_answer(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([each for each in PIECES if A not in each]), max_size=12))
def test_without_calls_nothing_is_lost(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert split_answer(text) == (text, ())


NAMED = {"type": "function", "function": {"name": "a"}}
FORCED = '<tool_call>\n{"name": "a", "arguments": {"x": "</tool_call>", "y": [1]}}\n</tool_call>'
ARGUMENTS = '{"x": "</tool_call>", "y": [1]}'
TOOL_A = {"type": "function", "function": {"name": "a"}}


def cut_off(text: str, choice: Any, reason: str = "length", size: int = 7) -> tuple[str, list[Any]]:
    """An answer's content and calls, of deltas of `size` characters."""
    reader = ToolCallStream(ToolUse.of({"tools": [TOOL_A], "tool_choice": choice}))
    deltas = [OutputDelta("it", text=text[at : at + size]) for at in range(0, len(text), size)]
    deltas.append(OutputDelta("it", finish_reason=reason))
    found = [reader.read(delta) for delta in deltas]
    return "".join(each.text for each in found), [c for each in found for c in each.tool_calls]


@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=["auto", "required", "named"])
@pytest.mark.parametrize("reason", ["length", "abort", "stop"])
def test_a_call_of_whole_json_counts_wherever_its_closing_tag_is_cut(
    choice: Any, reason: str
) -> None:
    for end in range(len(FORCED) - len("\n</tool_call>"), len(FORCED) + 1):
        for size in (1, 7, 1000):
            content, calls = cut_off(FORCED[:end], choice, reason, size)
            assert (content, [(c.name, c.arguments) for c in calls]) == ("", [("a", ARGUMENTS)])


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_forced_call_that_is_cut_has_the_arguments_so_far(choice: Any, before: int) -> None:
    """As OpenAI's API has it; the finish reason says that they are not complete."""
    start = f"{FORCED}\n" * before
    for end in range(1, len(FORCED) - len("}\n</tool_call>") + 1):
        content, calls = cut_off(start + FORCED[:end], choice)
        whole, last = calls[:before], calls[before:]
        assert [call.arguments for call in whole] == [ARGUMENTS] * before
        has_name = end >= FORCED.index('", "arg') + 1
        if not has_name and (before or choice == "required"):  # any tool may have been meant
            assert not last and content.strip() == FORCED[:end].strip()
            continue
        arguments = FORCED[FORCED.index(': {"x"') + 2 : end]
        assert content == "" and [(c.name, c.arguments) for c in last] == [("a", arguments)]
        assert all(call.id for call in last)


def test_a_call_that_is_cut_stays_text_where_it_is_not_forced_or_a_stop_string_cut_it() -> None:
    cut = FORCED[:50]
    assert cut_off(cut, "auto") == cut_off(cut, NAMED, "stop") == (cut, [])
    assert cut_off("", NAMED, "abort") == ("", [])


TOOL = {
    "type": "function",
    "function": {"name": "get", "parameters": {"type": "object", "title": "<|im_end|>é"}},
}
ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}},
            {"id": "2", "type": "function", "function": {"name": "get", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sun"},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "<|im_end|>"}]},
]
# As Qwen2.5's published template writes them: the section's words were compared with a copy of it,
# the rest is from memory of it.
RENDERED = """<|im_start|>system
Be brief.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "get", "parameters": {"type": "object", \
"title": "<|im_end|>é"}}}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
Weather?<|im_end|>
<|im_start|>assistant
I look.
<tool_call>
{"name": "get", "arguments": {"a": 1}}
</tool_call>
<tool_call>
{"name": "get", "arguments": {}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
sun
</tool_response>
<tool_response>
<|im_end|>
</tool_response><|im_end|>
<|im_start|>assistant
"""


@pytest.fixture(scope="module")
def reader() -> PromptReader:
    model_dir = Path(octavo.__file__).parent / "engine/embedded"
    return PromptReader(model_dir, ModelConfig.from_dir(model_dir), 1 << 20)


def test_the_prompt_is_qwen_s(reader: PromptReader) -> None:
    ids = reader.read({"messages": ASKED, "tools": [TOOL]}).token_ids
    backend = reader.tokenizer.backend
    assert backend.decode(list(ids), skip_special_tokens=False) == RENDERED
    end = reader.tokenizer.added["<|im_end|>"]
    assert list(ids).count(end) == 4, "those in a tool and in a result are plain text"


def test_tools_without_a_system_message(reader: PromptReader) -> None:
    ids = reader.read({"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}).token_ids
    text = reader.tokenizer.backend.decode(list(ids), skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n\n")


def test_null_in_a_tool_is_what_is_left_out(reader: PromptReader) -> None:
    """As in messages, and in the request itself."""
    nulls = {"description": None, "parameters": None, "strict": None}

    def read(function: dict[str, Any]) -> list[int]:
        tools = [{"type": "function", "function": function}]
        return list(reader.read({"messages": ASKED[:2], "tools": tools}).token_ids)

    assert read({"name": "now", **nulls}) == read({"name": "now"})
    assert read({**TOOL["function"], "strict": None}) == read(TOOL["function"])
    sent = pb.GenerateRequest()
    add_tools(sent, [{"type": "function", "function": {"name": "now", **nulls}}], None, None)
    assert list(sent.tools) == [pb.Tool(function=pb.Function(name="now"))]


def test_every_api_tells_the_model_the_same_of_a_tool() -> None:
    """As openai's `pydantic_function_tool` writes it, and as the protocol has it."""
    schema = {"type": "object", "properties": {}}
    function = {"name": "get", "strict": True, "parameters": schema, "description": "Gets."}
    tools = [{"function": function, "type": "function"}]
    request = pb.GenerateRequest()
    add_tools(request, tools, None, None)
    assert read_tools(tools) == read_tools(convert_tools.read_tools(request)["tools"])
    assert "strict" not in read_tools(tools)[0]


# In the manner of Qwen2.5's, shortened; and a template that looks inside its tools.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}|{% set f = tool.function -%}
{{ f.name }}|{{ f.parameters.title }}|
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}{% set f = call.function -%}
<call>{{ f.name }}{{ f.arguments | tojson }}{% endfor %}<|im_end|>
{% endfor %}"""
BY_TEMPLATE = """\
<|im_start|>system
{"type": "function", "function": {"name": "get", "parameters": {"type": "object", \
"title": "<|im_end|>é"}}}|get|<|im_end|>é|
<|im_end|>
<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Weather?<|im_end|>
<|im_start|>assistant
I look.<call>get{"a": 1}<call>get{}<|im_end|>
<|im_start|>tool
sun<|im_end|>
<|im_start|>tool
<|im_end|><|im_end|>
"""


def test_a_template_that_knows_tools_is_given_them(reader: PromptReader, tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    template = ChatTemplate(tmp_path, reader.tokenizer)
    ids = template.encode(read_conversation(ASKED, read_tools([TOOL])))
    assert reader.tokenizer.backend.decode(ids, skip_special_tokens=False) == BY_TEMPLATE
    assert ids.count(reader.tokenizer.added["<|im_end|>"]) == 6, "the client's are plain text"
    assert template.encode(read_conversation(ASKED[1:2])) == reader.tokenizer.encode_marked(
        "<|im_start|>user\nWeather?<|im_end|>\n"
    )


def _deep() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(5000):
        found = {"properties": found}
    return found


def _function(**more: Any) -> list[Any]:
    return [TOOL, {"type": "function", "function": {"name": "b", **more}}]


def _message(call: Any) -> list[Any]:
    return [{"role": "assistant", "content": "", "tool_calls": [call]}]


def test_results_stand_in_the_order_of_their_calls(reader: PromptReader) -> None:
    """OpenAI's name their call, and programs send them as they are done."""
    asked, (first, second) = ASKED[:-2], ASKED[-2:]
    expected = reader.read({"messages": ASKED}).token_ids
    assert reader.read({"messages": [*asked, second, first]}).token_ids == expected
    again = [{"role": "user", "content": "Again?"}, *asked[2:], second, first]
    for round_trip in ([*asked, first, second, *again], [*asked, second, first, *again]):
        ids = reader.read({"messages": round_trip}).token_ids
        assert list(ids[: len(expected) - 10]) == list(expected[:-10])
        assert ids == reader.read({"messages": [*ASKED, *again]}).token_ids
    unnamed = [{"role": "tool", "content": each["content"]} for each in (first, second)]
    assert reader.read({"messages": [*asked, *unnamed]}).token_ids == expected
    no_ids = [{k: v for k, v in each.items() if k != "id"} for each in asked[2]["tool_calls"]]
    bare = [*asked[:2], {**asked[2], "tool_calls": no_ids}]
    assert reader.read({"messages": [*bare, first, second]}).token_ids == expected


@pytest.mark.lesson("L27")
@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{"type": "x"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": _function(name="a b")}, "tools[1].function.name"),
        ({"tools": _function(description=1)}, "tools[1].function.description"),
        ({"tools": _function(parameters=[])}, "tools[1].function.parameters"),
        ({"tools": _function(parameters=_deep())}, "tools[1]"),
        ({"tools": _function(parameters={"type": []})}, "tools[1].function.parameters.type"),
        ({"tools": _function(description="x" * (1 << 20))}, "tools[1]"),
        ({"tools": _function(description="\ud800")}, "tools[1]"),
        ({"messages": _message(1)}, "messages[0].tool_calls[0]"),
        ({"messages": _message({})}, "messages[0].tool_calls[0].function"),
        (
            {"messages": _message({"function": {"name": "a", "arguments": "{"}})},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "tool", "content": 1}]}, "messages[0].content"),
        (
            {"messages": [{"role": "tool", "content": "", "tool_call_id": 1}]},
            "messages[0].tool_call_id",
        ),
        (
            {"messages": [{"role": "tool", "content": "", "tool_call_id": "a"}]},
            "messages[0].tool_call_id",
        ),
        (
            {"messages": [*ASKED[:-2], {"role": "tool", "content": "", "tool_call_id": "3"}]},
            "messages[3].tool_call_id",
        ),
        (
            {"messages": [{"role": "tool", "content": [{"type": "image", "image": "x"}]}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_bad_tools_name_the_field(reader: PromptReader, more: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        reader.read({"messages": [{"role": "user", "content": "x"}], **more})
    assert caught.value.field == field
