"""Options shared by several commands, with their help texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(
        help="Checkpoint folder or hub id, such as Qwen/Qwen2-VL-2B-Instruct. "
        "Default: the small embedded model, which recognizes colored shapes and numbers."
    ),
]
ModelName = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="Same as --model.", show_default=False)
]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Model name in requests; responses have the first one. May be repeated. "
        "Default: the hub id or the folder's name.",
    ),
]
Hub = Annotated[str, typer.Option(help="Hub to download from: huggingface or modelscope.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, float32, bfloat16 or float16. auto: the checkpoint's dtype on a GPU; on a CPU, "
        "bfloat16 if the processor has native bfloat16 multiplication, else float32."
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="int8: 8-bit weights and activations, CPU only: about twice as fast, half the weight "
        "memory, nearly the same outputs. Default: no quantization."
    ),
]
KvCacheDtype = Annotated[
    str,
    typer.Option(
        help="auto or fp8. fp8: 8-bit keys and values (e4m3) with one scale per token, GPU only; "
        "nearly twice as many tokens fit into the same memory. auto: as --dtype."
    ),
]
TensorParallelSize = Annotated[
    int,
    typer.Option(help="Number of tensor-parallel workers: 1, 2 or 4; also 8 for the 72B model."),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        help="Maximum tokens of prompt and output. Default: the model's number of positions. It "
        "may be higher, for long videos, whose tokens share positions. Positions are checked per "
        "request, and the output ends when they are used up."
    ),
]
MaxNumSeqs = Annotated[int, typer.Option(help="Maximum number of running requests.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(help="Maximum tokens per step.")]
MaxNumPartialPrefills = Annotated[
    int, typer.Option(help="Maximum number of chunked prefills per step, highest priority first.")
]
LongPrefillTokenThreshold = Annotated[
    int | None,
    typer.Option(
        help="Chunk prompts longer than this while other requests decode; also the per-step token "
        "budget of all chunks. Keeps long prompts from stalling decoding requests. Default: 96 on "
        "a CPU, 256 on a GPU."
    ),
]
OverlapSteps = Annotated[
    bool,
    typer.Option(
        help="Plan and send each step while the previous one runs, so that workers never wait for "
        "the engine. A finished request may have computed one extra token."
    ),
]
MaxQueueLen = Annotated[
    int, typer.Option(help="Maximum waiting requests; more are rejected with RESOURCE_EXHAUSTED.")
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        help="Maximum worker restarts per 10 minutes; running requests continue after a restart. "
        "The server exits when exceeded."
    ),
]
MaxQueueTokens = Annotated[int, typer.Option(help="Maximum total tokens of waiting requests.")]
MaxQueueBytes = Annotated[
    int,
    typer.Option(
        help="Maximum bytes of received images and videos of all waiting and running requests; "
        "more are rejected with RESOURCE_EXHAUSTED."
    ),
]
GpuMemoryUtilization = Annotated[
    float, typer.Option(help="Fraction of each GPU's memory for weights and KV cache, 0 to 1.")
]
KvCacheMemoryBytes = Annotated[
    int | None,
    typer.Option(
        help="KV cache bytes per rank, limited to what the maximum running requests plus 16 "
        "requests of --max-model-len need. Default: the rest of a GPU's memory; on a CPU, a "
        "quarter of free memory, at most 4 GB, all resident soon after startup."
    ),
]
MinPixels = Annotated[
    int | None, typer.Option(help="Minimum pixels of an image. Default: the checkpoint's.")
]
MaxPixels = Annotated[
    int | None, typer.Option(help="Maximum pixels of an image. Default: the checkpoint's.")
]

Port = Annotated[
    int, typer.Option(min=0, max=65535, help="Port of the gRPC server; 0 selects a free one.")
]
HttpPort = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help="Port of the OpenAI-compatible HTTP server (requires octavo[http]); 0 selects a free "
        "one. Default: no HTTP server.",
    ),
]
HttpHost = Annotated[
    str | None, typer.Option(help="Address for the HTTP server. Default: same as --host.")
]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        help="Record each step in this file, one JSON line per step, for `octavo trace draw`. "
        "An existing file is overwritten."
    ),
]

ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        help="File with API keys, one per line; calls must have one of them. The file is reloaded "
        "when it changes. The environment variable OCTAVO_API_KEYS adds comma-separated keys. "
        "Default: no authentication."
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        help="The server's TLS certificate, PEM; enables TLS. Changed files are used for new "
        "connections."
    ),
]
TlsKey = Annotated[Path | None, typer.Option(help="The certificate's private key, PEM.")]
TlsClientCa = Annotated[
    Path | None,
    typer.Option(help="Enables mutual TLS: CA of the clients' certificates, PEM."),
]


def one_model(name: str | None, model: str | None) -> str | None:
    """Return the model from the argument or the option. Raises ValueError if they differ."""
    if name and model and name != model:
        raise ValueError(f"--model {model}: conflicts with the argument {name}; pass only one")
    return name or model


MetricsPort = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help="Port for Prometheus metrics, on --host, without authentication; 0 selects a free "
        "port. Default: no metrics port.",
    ),
]
OtlpEndpoint = Annotated[
    str | None,
    typer.Option(
        help="Send OpenTelemetry spans of requests to this collector, http://HOST:4318 (OTLP over "
        "HTTP; requires octavo[otel]). Default: OTEL_EXPORTER_OTLP_ENDPOINT, else no spans."
    ),
]
LogFormat = Annotated[
    str, typer.Option(help="Log format: text, or json (one object per line, with request ids).")
]


@dataclass(frozen=True)
class WatchOptions:
    """Destinations of metrics and spans; None disables them."""

    metrics_port: int | None = None
    otlp_endpoint: str | None = None
