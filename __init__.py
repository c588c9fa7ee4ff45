"""Octavo: serves Qwen2-VL from paged memory. This page hands the public names on, lazily."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "LLM": ".engine.llm",
    "AsyncLLM": ".engine.async_llm",
    "Client": ".engine.client",
    "Engine": ".engine.engine",
    "MediaEmbeds": ".engine.media.embeds",
    "RequestOptions": ".scheduler.params",
    "RequestOutput": ".engine.output",
    "SamplingParams": ".scheduler.params",
    "ServerFile": ".engine.client_media",
    "StructuredOutput": ".scheduler.structured",
    "Tls": ".engine.client_channel",
    "TokenLogprobs": ".scheduler.logprobs",
    "ToolCall": ".engine.tool_calls",
}

if TYPE_CHECKING:
    from .engine.async_llm import AsyncLLM
    from .engine.client.channel import Tls
    from .engine.client.client import Client
    from .engine.client.media import ServerFile
    from .engine.core.engine import Engine
    from .engine.llm import LLM
    from .engine.media.embeds import MediaEmbeds
    from .engine.outputs import RequestOutput
    from .engine.tool_calling.parser import ToolCall
    from .scheduler.logprobs import TokenLogprobs
    from .scheduler.params import RequestOptions, SamplingParams
    from .scheduler.structured import StructuredOutput

__all__ = [
    "LLM",
    "AsyncLLM",
    "Client",
    "Engine",
    "MediaEmbeds",
    "RequestOptions",
    "RequestOutput",
    "SamplingParams",
    "ServerFile",
    "StructuredOutput",
    "Tls",
    "TokenLogprobs",
    "ToolCall",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name], __name__), name)
