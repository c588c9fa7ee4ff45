"""The gRPC service `octavo.v1.Control`, for operators."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import fields
from typing import Any

import grpc

from .... import __version__
from ....proto import octavo_pb2 as pb
from ....proto import octavo_pb2_grpc
from ....scheduler.params import MAX_TIMEOUT, truncated_repr
from ...async_llm import AsyncLLM
from ...config.engine_config import EngineConfig
from ...errors import InputError
from ..drain import CallTracker
from ..errors import RequestRejected

log = logging.getLogger("octavo.server")

# Settings that reveal paths or addresses of the server.
PRIVATE = (
    "model",
    "trace_file",
    "allowed_media_paths",
    "allowed_media_domains",
    "workers",
    "worker_tls",
)
HERE = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "ipv6:[::ffff:127.", "unix:")


class ControlServicer(octavo_pb2_grpc.ControlServicer):
    def __init__(
        self,
        engine: AsyncLLM,
        work: CallTracker,
        stop_serving: Callable[[], Awaitable[None]],
        has_api_keys: bool,
    ) -> None:
        """Serve `engine`. `stop_serving` sets the server's health to NOT_SERVING."""
        self._engine, self._work = engine, work
        self._stop_serving = stop_serving
        self._has_api_keys = has_api_keys
        self._start = time.monotonic()

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortReply:
        return pb.AbortReply(found=await self._engine.abort(request.request_id))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInfo:
        config = self._engine.engine.model_config
        return pb.ModelInfo(
            name=self._engine.engine.model_name,
            served_names=self._engine.engine.served_model_names,
            dtype=config.dtype,
            weight_format=config.weight_format.label if config.weight_format else "",
            max_model_len=self._engine.config.max_model_len or 0,
            max_position_embeddings=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            num_vision_layers=config.vision.depth,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerInfo:
        return pb.ServerInfo(
            version=__version__,
            uptime_s=time.monotonic() - self._start,
            num_workers=len(self._engine.worker_pids),
            has_api_keys=self._has_api_keys,
            settings=public_settings(self._engine.config),
        )

    async def GetLoad(
        self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> pb.Load:
        stats = self._engine.engine.stats
        load = stats.load()
        return pb.Load(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_free_blocks=load.num_free_blocks,
            num_blocks=load.num_blocks,
            prefix_hit_rate=load.prefix_hit_ratio,
            encoder_hit_rate=load.encoder_hit_ratio,
            tokens_per_second=load.tokens_per_second,
            num_output_tokens=stats.num_output_tokens,
            is_draining=self._work.is_draining,
        )

    async def Drain(
        self, request: pb.DrainRequest, context: grpc.aio.ServicerContext
    ) -> pb.DrainReply:
        is_known = self._has_api_keys or bool(context.peer_identities())
        check_may_drain(context.peer(), is_known)
        timeout = request.timeout_s if request.HasField("timeout_s") else None
        if timeout is not None and not 0 <= timeout <= MAX_TIMEOUT:
            text = f"{truncated_repr(timeout)}: must be from 0 to {MAX_TIMEOUT:.0f} seconds"
            raise InputError("timeout_s", text)
        if not self._work.is_draining:
            running = self._work.num_running
            log.info("Control.Drain: rejecting new requests; %d in flight", running)
        self._work.is_draining = True  # set first, so that health cannot become SERVING again
        await self._stop_serving()
        return pb.DrainReply(num_running=await self._work.drain(timeout))


def check_may_drain(peer: str, is_known: bool) -> None:
    """Raise `RequestRejected` unless the client is authenticated or on this machine."""
    if not is_known and not peer.startswith(HERE):
        text = "only allowed from localhost unless API keys are configured; set --api-key-file"
        raise RequestRejected("PERMISSION_DENIED", f"Drain: {text}")


def public_settings(config: EngineConfig) -> dict[str, str]:
    """Return the settings that clients may see: name to JSON value."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: _as_json(value) for name, value in values.items() if name not in PRIVATE}


def _as_json(value: Any) -> str:
    return json.dumps(dict(value) if isinstance(value, Mapping) else value)
