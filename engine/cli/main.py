"""The `octavo` command: serve, worker, chat, info, bench, trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ... import __version__
from ...benchmarks.cli import bench_app
from ..config.media_limits import MediaLimits
from .chat import chat
from .errors import user_errors
from .media_options import (
    AllowMediaDomains,
    AllowMediaPath,
    DecoderMemory,
    FetchTimeout,
    ImageOption,
    MaxMediaBytes,
    MaxMediaItems,
    MaxMediaPixels,
    MaxVideoFrames,
    MaxVideoSeconds,
    MediaTimeout,
    VideoOption,
)
from .options import (
    ApiKeyFile,
    Device,
    Dtype,
    GpuMemoryUtilization,
    HttpHost,
    HttpPort,
    Hub,
    KvCacheDtype,
    KvCacheMemoryBytes,
    LogFormat,
    LongPrefillTokenThreshold,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumPartialPrefills,
    MaxNumSeqs,
    MaxPixels,
    MaxQueueBytes,
    MaxQueueLen,
    MaxQueueTokens,
    MaxRestarts,
    MetricsPort,
    MinPixels,
    Model,
    ModelName,
    OtlpEndpoint,
    OverlapSteps,
    Port,
    Quantization,
    ServedModelName,
    TensorParallelSize,
    TlsCert,
    TlsClientCa,
    TlsKey,
    TraceFile,
    one_model,
)
from .serve import serve_model
from .worker import Workers, WorkerTls, worker

SERVER_OPTIONS = (
    *("host", "port", "http_host", "http_port"),
    *("api_key_file", "tls_cert", "tls_key", "tls_client_ca"),
    *("metrics_port", "otlp_endpoint", "log_format"),
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its tables truncate long option names
    pretty_exceptions_enable=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"octavo {__version__}")
        raise typer.Exit


@app.callback()
def _octavo(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Serve Qwen2-VL models: images, videos and text in, streamed text out."""


app.add_typer(bench_app, name="bench")
trace_app = typer.Typer(
    help="Draw what the scheduler does. Record a run with `octavo serve --trace-file FILE`, "
    "`octavo bench throughput --trace-file FILE` or octavo.LLM(trace_file=...).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(trace_app, name="trace")


@app.command()
def serve(
    model_name: ModelName = None,
    model: Model = None,
    served_model_name: ServedModelName = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Port = 50051,
    http_port: HttpPort = None,
    http_host: HttpHost = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    tensor_parallel_size: TensorParallelSize = 1,
    workers: Workers = None,
    worker_tls: WorkerTls = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = 64,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    max_num_partial_prefills: MaxNumPartialPrefills = 4,
    long_prefill_token_threshold: LongPrefillTokenThreshold = None,
    max_queue_len: MaxQueueLen = 1024,
    max_queue_tokens: MaxQueueTokens = 1 << 20,
    max_queue_bytes: MaxQueueBytes = 4 << 30,
    overlap_steps: OverlapSteps = True,
    max_restarts: MaxRestarts = 3,
    gpu_memory_utilization: GpuMemoryUtilization = 0.9,
    kv_cache_memory_bytes: KvCacheMemoryBytes = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    image_options: ImageOption = None,
    video_options: VideoOption = None,
    allowed_media_domains: AllowMediaDomains = None,
    allowed_media_paths: AllowMediaPath = None,
    max_media_bytes: MaxMediaBytes = MediaLimits.max_media_bytes,
    max_media_pixels: MaxMediaPixels = MediaLimits.max_media_pixels,
    max_video_frames: MaxVideoFrames = MediaLimits.max_video_frames,
    max_video_seconds: MaxVideoSeconds = MediaLimits.max_video_seconds,
    max_media_items: MaxMediaItems = MediaLimits.max_media_items,
    fetch_timeout_s: FetchTimeout = MediaLimits.fetch_timeout_s,
    media_timeout_s: MediaTimeout = MediaLimits.media_timeout_s,
    decoder_memory_bytes: DecoderMemory = MediaLimits.decoder_memory_bytes,
    trace_file: TraceFile = None,
    metrics_port: MetricsPort = None,
    otlp_endpoint: OtlpEndpoint = None,
    log_format: LogFormat = "text",
    hub: Hub = "huggingface",
    api_key_file: ApiKeyFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
) -> None:
    """Serve a model over gRPC (octavo.v1, grpc.health.v1, reflection); HTTP with --http-port.

    Prints one line on stdout when ready: ready grpc=HOST:PORT [http=HOST:PORT] pid=N
    worker_pids=N,N [metrics=HOST:PORT]. After SIGTERM, running requests have ten seconds to finish.
    """
    settings = locals()
    with user_errors():
        status = serve_model(settings, **{name: settings.pop(name) for name in SERVER_OPTIONS})
    raise typer.Exit(status)


app.command()(worker)
app.command()(chat)


@app.command()
def info(
    model_name: ModelName = None,
    model: Model = None,
    hub: Hub = "huggingface",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    tensor_parallel_size: TensorParallelSize = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a checkpoint's sizes and memory needs, and what fits this machine. Loads no weights."""
    from .info import checkpoint_info

    with user_errors():
        found = checkpoint_info(
            one_model(model_name, model),
            hub,
            dtype,
            tensor_parallel_size,
            quantization,
            kv_cache_dtype,
        )
        print(json.dumps(found.as_dict(), indent=2) if as_json else found.as_text())


@trace_app.command("draw")
def trace_draw(
    trace: Annotated[Path, typer.Argument(help="The trace file of a recorded run.")],
    out: Annotated[
        Path | None, typer.Option(help="Output file: .png, .svg or .pdf. Default: TRACE.png.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="FIRST:END, the steps to draw; END is excluded.")
    ] = None,
) -> None:
    """Draw a recorded run: requests as rows, steps as columns.

    Grey: waiting. Orange: encoding an image. Blue: prefill, with the number of tokens. Green:
    decode. Red: preempted. Below: tokens, KV blocks and milliseconds of each step.
    """
    with user_errors():
        try:
            from ...benchmarks.trace.plot import Trace, draw, parse_steps
        except ImportError:
            raise ValueError("drawing needs matplotlib: pip install matplotlib") from None
        picture = out or trace
        picture = picture if out and out.suffix else picture.with_suffix(".png")
        draw(Trace.read(trace, *parse_steps(steps)), picture)
        print(picture)


@trace_app.command("demo")
def trace_demo(
    trace: Annotated[Path, typer.Argument(help="The file to write.")],
) -> None:
    """Record a small simulated run with all scheduler features. Needs no model.

    It shows chunked prefill, images, cache hits, forks, preemption, priorities and a deadline.
    """
    from ...benchmarks.trace.demo import record

    with user_errors():
        print(f"recorded {record(trace)} steps; draw them with: octavo trace draw {trace}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
