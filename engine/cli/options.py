"""Options that commands share, with the help that each shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(
        help="Checkpoint folder or hub id, such as Qwen/Qwen2-VL-2B-Instruct. "
        "Default: the small embedded model, which knows colored shapes and numbers."
    ),
]
ModelName = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="The same as --model.", show_default=False)
]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A name of the model in requests; responses have the first. May be repeated. "
        "Default: the hub id or the folder's name.",
    ),
]
Hub = Annotated[str, typer.Option(help="Where hub ids come from: huggingface or modelscope.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, float32, bfloat16 or float16. auto: the checkpoint's on a GPU; on a CPU "
        "bfloat16 where the processor multiplies it natively, else float32."
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="int8: weights and activations in eight bits, on a CPU: about twice as fast, half "
        "the memory of the weights, nearly the same answers. Default: as --dtype says."
    ),
]
KvCacheDtype = Annotated[
    str,
    typer.Option(
        help="auto or fp8, on a GPU: keys and values in eight bits (e4m3), each token's with a "
        "scale of its own, so that the same memory holds nearly twice the tokens. auto: as --dtype."
    ),
]
TensorParallelSize = Annotated[
    int, typer.Option(help="Worker processes that share each layer: 1, 2 or 4; 8 for the 72B.")
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        help="Tokens of prompt and output. Default: as many as the model has positions. It may be "
        "more: the frames of a video take positions far slower than tokens, so that long videos "
        "fit; each request's positions are checked, and its answer ends where they do."
    ),
]
MaxNumSeqs = Annotated[int, typer.Option(help="Requests that run at once.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(help="Tokens of one step.")]
MaxNumPartialPrefills = Annotated[
    int, typer.Option(help="Prompts that go in pieces in one step: the most urgent ones.")
]
LongPrefillTokenThreshold = Annotated[
    int | None,
    typer.Option(
        help="Prompts that have more tokens to compute go in pieces while other requests decode, "
        "and so many tokens are what all pieces take of a step: long prompts do not stall those "
        "that decode. Default: 96 on a CPU, 256 on a GPU."
    ),
]
OverlapSteps = Annotated[
    bool,
    typer.Option(
        help="Plan and send each step while the one before it runs: the workers never wait for "
        "the engine, and a request that stops may have been computed one token too far."
    ),
]
MaxQueueLen = Annotated[
    int, typer.Option(help="Requests that may wait; more are refused with RESOURCE_EXHAUSTED.")
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        help="Times in ten minutes that workers which ended are started anew; running requests go "
        "on. One more, and the server exits."
    ),
]
MaxQueueTokens = Annotated[int, typer.Option(help="Tokens of the requests that may wait.")]
MaxQueueBytes = Annotated[
    int,
    typer.Option(
        help="Bytes of images and videos, as they came, of all requests that wait or run; more "
        "are refused with RESOURCE_EXHAUSTED."
    ),
]
GpuMemoryUtilization = Annotated[
    float, typer.Option(help="Share of each GPU's memory for weights and KV cache.")
]
KvCacheMemoryBytes = Annotated[
    int | None,
    typer.Option(
        help="Bytes of KV cache on each rank; no more is taken than 16 requests of "
        "--max-model-len need beside those that may run. Default: what is left of a GPU's memory; "
        "on a CPU a quarter of free memory, at most 4 GB, all of it resident soon after the start."
    ),
]
MinPixels = Annotated[
    int | None, typer.Option(help="Least pixels of an image. Default: the checkpoint's.")
]
MaxPixels = Annotated[
    int | None, typer.Option(help="Most pixels of an image. Default: the checkpoint's.")
]

Port = Annotated[
    int, typer.Option(min=0, max=65535, help="Port of the gRPC service; 0 takes a free one.")
]
HttpPort = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help="Port of the OpenAI-compatible HTTP service (extra octavo[http]); 0 takes a free one. "
        "Default: no HTTP.",
    ),
]
HttpHost = Annotated[
    str | None, typer.Option(help="Address that HTTP listens on. Default: as --host.")
]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        help="Record each step there as a JSON line, for `octavo trace draw`; replaces the file."
    ),
]

ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        help="API keys, one a line: calls must bring one of them. The file is read again when it "
        "changes. Others come from the variable "
        "OCTAVO_API_KEYS, apart by commas. Default: none is asked for."
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        help="The server's certificate, PEM: it talks TLS. Files that are replaced are used from "
        "the next connection on."
    ),
]
TlsKey = Annotated[Path | None, typer.Option(help="The certificate's private key, PEM.")]
TlsClientCa = Annotated[
    Path | None,
    typer.Option(help="Mutual TLS: clients must have a certificate that this one signed, PEM."),
]


def one_model(name: str | None, model: str | None) -> str | None:
    """Of the two ways to give it. Raises ValueError."""
    if name and model and name != model:
        raise ValueError(f"--model {model}: and {name} as well; give one of them")
    return name or model


MetricsPort = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help="Serve Prometheus metrics there, on --host, without any key; 0 takes a free port. "
        "Default: they are not served.",
    ),
]
OtlpEndpoint = Annotated[
    str | None,
    typer.Option(
        help="Send OpenTelemetry spans of requests to this collector, http://HOST:4318 (OTLP over "
        "HTTP); needs octavo[otel]. Default: OTEL_EXPORTER_OTLP_ENDPOINT, else none are sent."
    ),
]
LogFormat = Annotated[
    str, typer.Option(help="Log lines: text, or json, one object a line with request ids.")
]


@dataclass(frozen=True)
class WatchOptions:
    """Where what is measured goes; None: nowhere."""

    metrics_port: int | None = None
    otlp_endpoint: str | None = None
