"""Octavo serves Qwen2-VL with a paged KV cache. Public names are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "AdmissionError": ".scheduler.errors",
    "AsyncLLM": ".engine.async_llm",
    "Client": ".engine.client.client",
    "ClientError": ".engine.client.errors",
    "ConfigError": ".engine.errors",
    "Engine": ".engine.core.engine",
    "EngineConfig": ".engine.config.engine_config",
    "EngineDead": ".engine.errors",
    "InputError": ".engine.errors",
    "LLM": ".engine.llm",
    "MediaEmbeds": ".engine.media.embeds",
    "QueueFull": ".scheduler.errors",
    "RequestOptions": ".scheduler.params",
    "RequestOutput": ".engine.outputs",
    "SamplingParams": ".scheduler.params",
    "ServerFile": ".engine.client.media",
    "StructuredOutput": ".scheduler.structured",
    "Tls": ".engine.client.channel",
    "TokenLogprobs": ".scheduler.logprobs",
    "ToolCall": ".engine.tool_calling.parser",
    "metrics_text": ".engine.observability.prometheus",
}

if TYPE_CHECKING:
    from .engine.async_llm import AsyncLLM
    from .engine.client.channel import Tls
    from .engine.client.client import Client
    from .engine.client.errors import ClientError
    from .engine.client.media import ServerFile
    from .engine.config.engine_config import EngineConfig
    from .engine.core.engine import Engine
    from .engine.errors import ConfigError, EngineDead, InputError
    from .engine.llm import LLM
    from .engine.media.embeds import MediaEmbeds
    from .engine.observability.prometheus import metrics_text
    from .engine.outputs import RequestOutput
    from .engine.tool_calling.parser import ToolCall
    from .scheduler.admission import AdmissionError, QueueFull
    from .scheduler.logprobs import TokenLogprobs
    from .scheduler.params import RequestOptions, SamplingParams
    from .scheduler.structured import StructuredOutput

__all__ = [
    "LLM",
    "AdmissionError",
    "AsyncLLM",
    "Client",
    "ClientError",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineDead",
    "InputError",
    "MediaEmbeds",
    "QueueFull",
    "RequestOptions",
    "RequestOutput",
    "SamplingParams",
    "ServerFile",
    "StructuredOutput",
    "Tls",
    "TokenLogprobs",
    "ToolCall",
    "__version__",
    "metrics_text",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)
