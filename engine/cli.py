"""The `octavo` command: serve, chat, info, bench, trace."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import (
    Device,
    Dtype,
    GpuMemoryUtilization,
    Hub,
    KvCacheMemoryBytes,
    LongPrefillTokenThreshold,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumPartialPrefills,
    MaxNumSeqs,
    MaxPixels,
    MaxQueueLen,
    MaxQueueTokens,
    MaxRestarts,
    MinPixels,
    Model,
    OverlapSteps,
    Quantization,
    TensorParallelSize,
    TraceFile,
)

app = typer.Typer(
    help="Serves Qwen2-VL: images, videos and text in, streamed answers out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its table cuts long option names off
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measures the engine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")
trace_app = typer.Typer(
    help="Shows what the scheduler does: record a run with `octavo serve --trace-file FILE` (or "
    "`octavo bench throughput --trace-file FILE`, or octavo.LLM(trace_file=...)), then draw it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(trace_app, name="trace")


@contextmanager
def user_errors() -> Iterator[None]:
    """What the user can mend ends with one line on stderr and status 2; a dead engine with 1."""
    from .client import ClientError
    from .engine import EngineDead
    from .worker.group import WorkerGroupError

    try:
        yield
    except (EngineDead, WorkerGroupError) as error:
        print(f"octavo: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except (ValueError, OSError, ClientError) as error:
        print(f"octavo: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the gRPC service; 0 takes a free one.")
    ] = 50051,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    tensor_parallel_size: TensorParallelSize = 1,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = 64,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    max_num_partial_prefills: MaxNumPartialPrefills = 4,
    long_prefill_token_threshold: LongPrefillTokenThreshold = None,
    max_queue_len: MaxQueueLen = 1024,
    max_queue_tokens: MaxQueueTokens = 1 << 20,
    overlap_steps: OverlapSteps = True,
    max_restarts: MaxRestarts = 3,
    gpu_memory_utilization: GpuMemoryUtilization = 0.9,
    kv_cache_memory_bytes: KvCacheMemoryBytes = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    trace_file: TraceFile = None,
    hub: Hub = "huggingface",
) -> None:
    """Serve a model over gRPC (octavo.v1.Inference, grpc.health.v1).

    Prints one line on stdout when it is ready: ready grpc=HOST:PORT pid=N worker_pids=N,N. Logs go
    to stderr. SIGTERM lets running requests finish for ten seconds.
    """
    settings = {k: v for k, v in locals().items() if k not in ("host", "port")}
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    # While loading, SIGTERM ends as Ctrl-C does: what was started is closed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    with user_errors():
        status = _serve(host, port, settings)
    raise typer.Exit(status)


def _serve(host: str, port: int, settings: dict[str, Any]) -> int:
    from .async_llm import AsyncLLM
    from .server.grpc_server import ready_line
    from .server.grpc_server import serve as serve_grpc

    with AsyncLLM(allow_local_files=False, **settings) as engine:

        def on_ready(address: str) -> None:
            print(ready_line(engine, address), flush=True)

        return asyncio.run(serve_grpc(engine, host, port, on_ready))


@app.command()
def chat(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    server: Annotated[
        str | None, typer.Option(help="HOST:PORT of a running `octavo serve`.")
    ] = None,
    model: Model = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image; may be repeated.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video; may be repeated.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    hub: Hub = "huggingface",
) -> None:
    """Ask one question, of a server or of a model loaded here."""
    media = [{"type": "image", "image": str(path)} for path in image or ()]
    media += [{"type": "video", "video": str(path)} for path in video or ()]
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
    sampling: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    with user_errors():
        if server is None:
            asyncio.run(_chat_here(model, hub, messages, sampling))
            return
        if model is not None:
            raise ValueError("--server and --model: give one; the server has its own model")
        from .client import Client

        with Client(server) as client:
            for delta in client.chat(messages, **sampling):
                print(delta.text, end="", flush=True)
        print()


async def _chat_here(
    model: str | None, hub: str, messages: list[dict[str, Any]], sampling: dict[str, Any]
) -> None:
    from ..scheduler.params import SamplingParams
    from .async_llm import AsyncLLM

    params = SamplingParams(**sampling)
    with AsyncLLM(model, hub=hub) as engine:
        async for delta in engine.chat(messages, params):
            print(delta.text, end="", flush=True)
            if delta.error:
                raise ValueError(delta.error)
    print()


@app.command()
def info(
    model: Model = None,
    hub: Hub = "huggingface",
    dtype: Dtype = "auto",
    tensor_parallel_size: TensorParallelSize = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a checkpoint is, what it needs, and what fits this machine. Loads no weights."""
    from .info import checkpoint_info

    with user_errors():
        found = checkpoint_info(model, hub, dtype, tensor_parallel_size)
        print(json.dumps(found.as_dict(), indent=2) if as_json else found.as_text())


@bench_app.command()
def scheduler(
    num_requests: Annotated[int, typer.Option(help="Requests, all decoding.")] = 256,
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the scheduler alone: schedule() and update() of a step in which all requests decode."""
    from ..benchmarks.scheduler_latency import run

    with user_errors():
        report = run(num_requests, prompt_len)
        print(json.dumps(report.as_dict()) if as_json else report.as_text())


@bench_app.command()
def overhead(
    ranks: Annotated[list[int] | None, typer.Option(help="Default: 1, 2 and 4.")] = None,
    num_requests: Annotated[int, typer.Option(help="Requests, all decoding.")] = 16,
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps to time.")] = 400,
    sleep_ms: Annotated[
        float, typer.Option(min=0, help="Milliseconds that a worker's step takes.")
    ] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Time what the engine and gRPC add to a step: real processes, workers that only sleep; with
    steps overlapped and in turn."""
    from ..benchmarks.step_overhead import run

    with user_errors():
        for num_ranks in ranks or (1, 2, 4):
            for overlap in (True, False):
                report = run(num_ranks, num_requests, overlap, prompt_len, sleep_ms, steps)
                print(json.dumps(report.as_dict()) if as_json else report.as_text(), flush=True)


@bench_app.command()
def throughput(
    model: Model = None,
    input_len: Annotated[int, typer.Option(help="Text tokens of each prompt.")] = 128,
    output_len: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    num_prompts: Annotated[int, typer.Option(help="Requests, all there from the start.")] = 16,
    image_size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT of one random image in each prompt.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    tensor_parallel_size: TensorParallelSize = 1,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = 64,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    kv_cache_memory_bytes: KvCacheMemoryBytes = None,
    trace_file: TraceFile = None,
    hub: Hub = "huggingface",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run random prompts through the engine; print requests and tokens a second, TTFT and TPOT."""
    own = {"input_len", "output_len", "num_prompts", "image_size", "as_json"}
    settings = {name: value for name, value in locals().items() if name not in {*own, "own"}}
    from ..benchmarks.throughput import Workload, run

    with user_errors():
        workload = Workload.parse(input_len, output_len, num_prompts, image_size)
        report = run(workload, settings)
        print(json.dumps(report.as_dict()) if as_json else report.as_text())


@bench_app.command()
def kernels(
    paper: Annotated[
        bool, typer.Option("--paper", help="From shapes and compiled code alone; needs no GPU.")
    ] = False,
    model: Annotated[
        list[str] | None, typer.Option(help="2B, 7B or 72B; may be repeated. Default: all.")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="With --paper: H100, H200, A100 or B200; may be repeated. Default: all."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all rows here.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="With --paper: a table of all rows.")
    ] = None,
) -> None:
    """Run the Triton kernels on the GPU of this machine: against their oracles, torch's own, and
    the device's rates. Or, on paper, tell what each launch has to do and what its code proves."""
    from ..benchmarks.kernel_bench import run

    with user_errors():
        if not run(paper, model, gpu, json_file, markdown):
            raise typer.Exit(1)


@trace_app.command("draw")
def trace_draw(
    trace: Annotated[Path, typer.Argument(help="A recorded run.")],
    out: Annotated[
        Path | None, typer.Option(help="The picture: .png, .svg or .pdf. Default: FILE.png.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="FIRST:END, the numbers of the steps to draw; END is not.")
    ] = None,
) -> None:
    """Draw a recorded run: requests as rows, steps as columns.

    Grey waits, orange encodes an image, blue computes a prompt (with its number of tokens), green
    decodes, red was preempted. Below: tokens, KV blocks and milliseconds of each step.
    """
    with user_errors():
        try:
            from ..benchmarks.trace_plot import Trace, draw, parse_steps
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
    """Record a small made-up run that shows everything: chunks, images, cache hits, forks,
    preemption, priorities, a deadline. Needs no model."""
    from ..benchmarks.trace_demo import record

    with user_errors():
        print(f"{record(trace)} steps; draw them: octavo trace draw {trace}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
