"""Convert deltas to OpenAI's responses: one object, or chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from ....scheduler.logprobs import TokenLogprobs
from ...media.item import MediaInfo
from ...outputs import Output, OutputDelta, Usage
from ...tool_calling.parser import ToolCall
from ..token_texts import TextOffsets, TokenTexts
from .openai_logprobs import (
    Entries,
    write_chat_logprobs,
    write_completion_logprobs,
    write_prompt_logprobs,
)

PromptLogprobs = Sequence[TokenLogprobs | None]


@dataclass(eq=False)
class ChoiceState:
    """Progress of a choice's stream."""

    offsets: TextOffsets
    is_first: bool = True
    num_calls: int = 0


@dataclass(frozen=True)
class AnswerForm:
    """Formats one request's responses. `choice` indices count over all of its prompts."""

    request_id: str
    model: str
    is_chat: bool
    texts: TokenTexts
    skip_special_tokens: bool = True
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970

    def chunk(
        self,
        choice: int,
        delta: OutputDelta,
        state: ChoiceState,
    ) -> dict[str, Any]:
        """Return a stream's chunk.

        A prompt's log probabilities are in the first chunk of its first choice.
        """
        is_first, num_calls = state.is_first, state.num_calls
        state.is_first, state.num_calls = False, num_calls + len(delta.tool_calls)
        new: dict[str, Any] = {"text": delta.text}
        if self.is_chat:
            content = {"content": delta.text} if delta.text or is_first else {}
            new = {"delta": ({"role": "assistant"} if is_first else {}) | content}
            if delta.tool_calls:
                calls = enumerate(write_calls(delta.tool_calls), num_calls)
                new["delta"]["tool_calls"] = [{"index": i, **call} for i, call in calls]
        logprobs = self._logprobs(delta.logprobs, state.offsets)
        has_calls = bool(num_calls or delta.tool_calls)
        reason = {"logprobs": logprobs, "finish_reason": _reason(delta.finish_reason, has_calls)}
        chunk = self._head("chat.completion.chunk", [{"index": choice, **new, **reason}])
        if delta.prompt_logprobs:
            prompt_logprobs = write_prompt_logprobs(delta.prompt_logprobs, self.texts)
            (chunk if self.is_chat else chunk["choices"][0])["prompt_logprobs"] = prompt_logprobs
        if delta.media:
            chunk["media"] = write_media(delta.media)
        return chunk

    def usage_chunk(self, usages: Sequence[Usage]) -> dict[str, Any]:
        return self._head("chat.completion.chunk", []) | {"usage": write_usage(usages)}

    def whole(
        self,
        outputs: Sequence[Output],
        usages: Sequence[Usage],
        media: Sequence[MediaInfo],
        prompt_logprobs: Sequence[PromptLogprobs] = (),
    ) -> dict[str, Any]:
        """Return a complete response.

        `outputs`: in the order of choices. `prompt_logprobs`: one entry per prompt, if requested.
        As in vLLM, they are in each choice of completions, and at the top level of chats.
        """
        prompts = [write_prompt_logprobs(each, self.texts) for each in prompt_logprobs]
        choices = []
        for choice, output in enumerate(outputs):
            new: dict[str, Any] = {"text": output.text}
            if self.is_chat:
                new = {"message": {"role": "assistant", "content": output.text, "refusal": None}}
                if output.tool_calls:
                    calls = {"tool_calls": write_calls(output.tool_calls)}
                    new["message"] |= {"content": output.text or None} | calls
            logprobs = self._logprobs(cast(Entries, output.logprobs), self.new_choice().offsets)
            ended = _reason(output.finish_reason, bool(output.tool_calls))
            reason = {"logprobs": logprobs, "finish_reason": ended}
            if prompts and not self.is_chat:
                new["prompt_logprobs"] = prompts[choice * len(prompts) // len(outputs)]
            choices.append({"index": choice, **new, **reason})
        answer = self._head("chat.completion", choices) | {"usage": write_usage(usages)}
        if prompts and self.is_chat:
            answer["prompt_logprobs"] = prompts[0]
        return answer | ({"media": write_media(media)} if media else {})

    def new_choice(self) -> ChoiceState:
        return ChoiceState(self.texts.offsets(self.skip_special_tokens))

    def _logprobs(self, entries: Entries, offsets: TextOffsets) -> dict[str, Any] | None:
        if self.is_chat:
            return write_chat_logprobs(entries, self.texts)
        return write_completion_logprobs(entries, self.texts, offsets)

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.request_id}",
            "object": kind if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def write_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]


def _reason(reason: str | None, has_calls: bool) -> str | None:
    """Return OpenAI's finish reason. A truncated output is "length" even with tool calls."""
    return "tool_calls" if has_calls and reason == "stop" else reason


def write_usage(usages: Sequence[Usage]) -> dict[str, Any]:
    """Return the total usage of a request's prompts."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    output = sum(usage.output_tokens for usage in usages)
    cached = sum(usage.cached_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def write_media(media: Sequence[MediaInfo]) -> list[dict[str, Any]]:
    """Return how each item was preprocessed: an extension, like gRPC's ResolvedMedia."""
    return [asdict(info) for info in media]
