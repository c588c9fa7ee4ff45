"""Fields of OpenAI-format requests: which are accepted, and their effects.

Request parsers take the names of ignored fields from these tables; docs/openai.md is generated from
them. Fields that are not in a table are rejected with an error that names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Field:
    """A request field and its effect."""

    name: str
    type: str
    effect: str = ""  # "" and no `neutral` values: accepted without effect
    neutral: tuple[Any, ...] | None = (
        None  # JSON values accepted without effect, in addition to null
    )

    @property
    def is_supported(self) -> bool:
        return bool(self.effect)

    @property
    def is_ignored(self) -> bool:
        """Whether all values are accepted and ignored."""
        return not self.effect and self.neutral is None


def _labels(*names: str, type: str = "any") -> tuple[Field, ...]:
    return tuple(Field(name, type) for name in names)


REQUEST = (
    Field("model", "string", "one of the served model names; empty or absent: the served model"),
    Field("messages", "list of objects", "the conversation (chat)"),
    Field("prompt", "string, token ids, or a list of either", "the prompts, 1 to 64 (completions)"),
    Field("stream", "boolean", "server-sent events"),
    Field("stream_options", "object", "see below"),
    Field("max_tokens", "integer", "maximum output tokens; default: up to the model's length"),
    Field("max_completion_tokens", "integer", "alias of max_tokens (chat)"),
    Field("temperature", "number", "0 is greedy"),
    Field("top_p", "number", "nucleus sampling"),
    Field("top_k", "integer", "0 or -1: off"),
    Field("min_p", "number", "minimum probability, relative to that of the most likely token"),
    Field("repetition_penalty", "number", "applies to prompt and output tokens"),
    Field("presence_penalty", "number", "-2 to 2", (0,)),
    Field("frequency_penalty", "number", "-2 to 2", (0,)),
    Field("logit_bias", "object of token id to number", "-100 to 100 each", ({},)),
    Field("seed", "integer", "the same seed gives the same output; -1: a random one"),
    Field("n", "integer", "number of outputs per prompt"),
    Field("stop", "string or list of strings", "ends the output; not included in it"),
    Field("stop_token_ids", "list of token ids", "end the output"),
    Field("include_stop_str", "boolean", "include the matched stop string in the output"),
    Field("ignore_eos", "boolean", "continue after EOS tokens"),
    Field("min_tokens", "integer", "minimum output tokens"),
    Field("bad_words", "list of strings", "never generated"),
    Field("skip_special_tokens", "boolean", "false includes special tokens in the text"),
    Field("logprobs", "boolean (chat) or integer", "log probabilities of output tokens", (False,)),
    Field("top_logprobs", "integer", "alternatives per token, requires logprobs (chat)", (0,)),
    Field("prompt_logprobs", "integer", "log probabilities of prompt tokens"),
    Field("response_format", "object", "text, json_object or json_schema"),
    Field("structured_outputs", "object", "json, regex, choice or grammar"),
    Field("tools", "list of objects", "functions that the model may call (chat)", ([],)),
    Field("tool_choice", "string or object", "auto, none, required, a function", ("none", "auto")),
    Field("parallel_tool_calls", "boolean", "false: at most one call", (True, False)),
    Field("priority", "integer", "0 (highest) to 9 (lowest)"),
    Field("timeout_s", "number", "timeout of the request in seconds"),
    Field(
        "cache_salt", "string", "shares cached prefixes only between requests with the same salt"
    ),
    *_labels("user", "safety_identifier", "prompt_cache_key", type="string"),
    *_labels("prompt_cache_retention", type="string"),
    *_labels("metadata", "prompt_cache_options", type="object"),
    Field("add_generation_prompt", "boolean", "", (True,)),
    Field("audio", "object", "", ()),
    Field("best_of", "integer", "", (1,)),
    Field("chat_template_kwargs", "object", "", ({},)),
    Field("continue_final_message", "boolean", "", (False,)),
    Field("echo", "boolean", "", (False,)),
    Field("function_call", "string or object", "", ("none", "auto")),
    Field("functions", "list of objects", "", ([],)),
    Field("include_stop_str_in_output", "boolean", "", (False,)),
    Field("length_penalty", "number", "", (1,)),
    Field("modalities", "list of strings", "", (["text"],)),
    Field("moderation", "object", "", ()),
    Field("prediction", "object", "", ()),
    Field("reasoning_effort", "string", "", ("none",)),
    Field("service_tier", "string", "", ("auto", "default", "flex", "scale", "priority")),
    Field("spaces_between_special_tokens", "boolean", "", (True,)),
    Field("store", "boolean", "", (False,)),
    Field("suffix", "string", "", ("",)),
    Field("use_beam_search", "boolean", "", (False,)),
    Field("verbosity", "string", "", ("medium",)),
    Field("web_search_options", "object", "", ()),
)

STREAM_OPTIONS = (
    Field("include_usage", "boolean", "add a last chunk with the usage and no choices"),
    Field(
        "continuous_usage_stats",
        "boolean",
        "add the usage so far to each chunk, over all prompts and choices",
    ),
    Field("include_obfuscation", "boolean"),
)

MESSAGE = (
    Field("role", "string", "system, developer, user, assistant or tool"),
    Field("content", "string or list of parts", "text, images and videos"),
    Field("tool_calls", "list of objects", "calls of an assistant message", ([],)),
    Field("tool_call_id", "string", "the call that a tool message responds to"),
    Field("name", "string"),
    Field("audio", "object", "", ()),
    Field("function_call", "object", "", ()),
    # Fields that clients copy from responses, or set for other providers.
    *_labels("id", "refusal", "reasoning", "reasoning_content", type="string"),
    *_labels("annotations", "reasoning_details", "thinking_blocks", type="list"),
    *_labels("cache_control", "provider_specific_fields", type="object"),
    *_labels("parsed"),
)

PART = (
    Field("type", "string", "text, image_url, video_url, image or video"),
    Field("text", "string", "the text of a text part"),
    Field("image_url", "string or object", "a URL or data URI, with options"),
    Field("video_url", "string or object", "a URL, a data URI or a list of frames, with options"),
    Field("image", "string or object", "alias of image_url"),
    Field("video", "string or object", "alias of video_url"),
    *_labels("cache_control", "prompt_cache_breakpoint", type="object"),
    *_labels("uuid", type="string"),
)

TOOL = (
    Field("type", "string", "function"),
    Field(
        "function",
        "object",
        "name, description, parameters; other fields are passed to the chat template",
    ),
    *_labels("cache_control", type="object"),
)

TABLES = {
    "Request": REQUEST,
    "`stream_options`": STREAM_OPTIONS,
    "Message": MESSAGE,
    "Part of a message's `content`": PART,
    "Tool": TOOL,
}

IGNORED_OF_MESSAGE = frozenset(each.name for each in MESSAGE if each.is_ignored)
NULL_OF_MESSAGE = frozenset(each.name for each in MESSAGE if each.neutral is not None)
IGNORED_OF_PART = frozenset(each.name for each in PART if each.is_ignored)
IGNORED_OF_TOOL = frozenset(each.name for each in TOOL if each.is_ignored)


def without(given: Mapping[Any, Any], names: frozenset[str]) -> Mapping[Any, Any]:
    """Return an object without the given fields."""
    if names.isdisjoint(given):
        return given
    return {name: value for name, value in given.items() if name not in names}


def without_ignored(message: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return a message without fields that have no effect, such as those of echoed responses."""
    if message.keys() <= {"role", "content"}:
        return message
    return {
        name: value
        for name, value in message.items()
        if name not in IGNORED_OF_MESSAGE
        and not (name in NULL_OF_MESSAGE and (value is None or value == []))
    }
