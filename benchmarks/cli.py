"""The `octavo bench` commands.

Commands import their dependencies lazily, to keep `octavo --help` fast.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.engine.cli.errors import user_errors

from .media.cli import media
from .options import (
    EngineOptions,
    OutputOptions,
    WorkloadOptions,
    at_least_one,
    counts,
    rates,
    with_options,
)
from .roofline.cli import roofline
from .streams.cli import streams

bench_app = typer.Typer(help="Measure the engine.", no_args_is_help=True, rich_markup_mode=None)
bench_app.command()(roofline)
bench_app.command()(media)
bench_app.command()(streams)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@bench_app.command()
def scheduler(
    num_requests: Annotated[int, typer.Option(help="Decoding requests in the step.")] = 256,
    prompt_len: Annotated[int, typer.Option(help="Tokens per prompt.")] = 1024,
    as_json: AsJson = False,
) -> None:
    """Time only the scheduler: schedule() and update() of a step in which all requests decode."""
    from .scheduler_latency import run

    with user_errors():
        report = run(num_requests, prompt_len)
        print(json.dumps(report.as_dict()) if as_json else report.as_text())


@bench_app.command()
def overhead(
    ranks: Annotated[
        list[int] | None, typer.Option(help="Number of workers; may be repeated. Default: 1, 2, 4.")
    ] = None,
    num_requests: Annotated[int, typer.Option(help="Decoding requests in each step.")] = 16,
    prompt_len: Annotated[int, typer.Option(help="Tokens per prompt.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps to time.")] = 400,
    sleep_ms: Annotated[
        float, typer.Option(min=0, help="Duration of a worker's step, in ms.")
    ] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Time the overhead that the engine and gRPC add to a step, with and without overlapped steps.

    Uses real worker processes whose steps only sleep.
    """
    from .step_overhead import run

    with user_errors():
        for num_ranks in ranks or (1, 2, 4):
            for overlap in (True, False):
                report = run(num_ranks, num_requests, overlap, prompt_len, sleep_ms, steps)
                print(json.dumps(report.as_dict()) if as_json else report.as_text(), flush=True)


@bench_app.command()
@with_options
def throughput(
    workload: WorkloadOptions,
    engine: EngineOptions,
    output: OutputOptions,
    num_prompts: Annotated[
        str,
        typer.Option(
            metavar="N[,N...]",
            help="Requests (conversations), all submitted at the start. A list measures each "
            "batch size in turn.",
        ),
    ] = "16",
) -> None:
    """Run a batch of prompts: requests/s, tokens/s, TTFT and TPOT.

    With --num-prompts 1,2,4,8,16,32: a table and a plot of throughput by batch size.
    """
    from . import plots
    from .report import Report, latency_table, publish, sweep_table
    from .throughput import measure

    with user_errors():
        plots.check(output.plot)
        sizes = counts(num_prompts, "num-prompts")
        runs = measure(workload, asdict(engine), sizes)
        reports = {size: Report.of(run) for size, run in zip(sizes, runs, strict=True)}
        tables = [latency_table(reports[sizes[0]], "throughput")]
        if len(sizes) > 1:
            named = {str(size): report for size, report in reports.items()}
            tables = [sweep_table(named, "concurrent requests")]
        runs_found = [{"num_prompts": size, **each.as_dict()} for size, each in reports.items()]
        settings = asdict(workload) | asdict(engine)
        publish(tables, {"runs": runs_found}, settings, output.json_file)
        if output.plot and len(sizes) > 1:
            plots.draw_batches(reports, _title(workload, engine), output.plot)
        elif output.plot:
            plots.draw_latencies(runs[0], _title(workload, engine), output.plot)


@bench_app.command()
@with_options
def latency(
    workload: WorkloadOptions,
    engine: EngineOptions,
    output: OutputOptions,
    num_prompts: Annotated[int, typer.Option(help="Requests, sent one at a time.")] = 8,
) -> None:
    """Run one request at a time: TTFT, TPOT and inter-token latency (ITL)."""
    from . import plots
    from .report import Report, latency_table, publish
    from .throughput import measure

    with user_errors():
        plots.check(output.plot)
        at_least_one(num_prompts, "num-prompts")
        (seen,) = measure(workload, asdict(engine), [num_prompts], at_once=1)
        report = Report.of(seen)
        found = report.as_dict() | {"requests": [asdict(each) for each in seen]}
        settings = asdict(workload) | asdict(engine)
        publish([latency_table(report, "one at a time")], found, settings, output.json_file)
        if output.plot:
            plots.draw_latencies(seen, _title(workload, engine), output.plot)


@bench_app.command()
@with_options
def serve(
    workload: WorkloadOptions,
    engine: EngineOptions,
    output: OutputOptions,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Address of a running `octavo serve`; --model then selects the tokenizer. "
            "Default: start one with the options above.",
        ),
    ] = None,
    request_rate: Annotated[
        str,
        typer.Option(
            metavar="RATE[,RATE...]",
            help="Requests per second, as a Poisson process; inf sends all at once. A list "
            "measures each rate in turn.",
        ),
    ] = "1",
    num_prompts: Annotated[int, typer.Option(help="Requests (conversations).")] = 32,
    max_concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum requests in flight; waiting counts as latency."),
    ] = None,
    goodput_ttft_ms: Annotated[
        float | None, typer.Option(min=0, help="Maximum TTFT of a request that counts as goodput.")
    ] = None,
    goodput_tpot_ms: Annotated[
        float | None, typer.Option(min=0, help="Maximum TPOT of a request that counts as goodput.")
    ] = None,
) -> None:
    """Load a server over gRPC with open-loop arrivals; latencies count from the scheduled arrival.

    With --request-rate 0.5,1,2,4: a table and a plot of TTFT and TPOT by rate.
    """
    from . import plots
    from .report import publish
    from .serve_load import Bounds, load_tables, measure

    with user_errors():
        plots.check(output.plot)
        bounds = Bounds(goodput_ttft_ms, goodput_tpot_ms)
        found = measure(
            workload,
            asdict(engine),
            server,
            rates(request_rate, "request-rate"),
            at_least_one(num_prompts, "num-prompts"),
            max_concurrency,
            bounds,
        )
        points = [point for point, _ in found]
        runs = [point.as_dict() for point in points]
        settings = asdict(workload) | asdict(engine) | {"server": server}
        publish(load_tables(points), {"runs": runs}, settings, output.json_file)
        if output.plot and len(points) > 1:
            plots.draw_rates(points, _title(workload, engine), output.plot)
        elif output.plot:
            plots.draw_latencies(found[0][1], _title(workload, engine), output.plot)


@bench_app.command()
@with_options
def startup(
    engine: EngineOptions,
    output: OutputOptions,
    rounds: Annotated[int, typer.Option(help="Number of starts.")] = 3,
) -> None:
    """Time `octavo serve` from process start to its ready line, by startup phase."""
    from . import plots
    from .report import publish
    from .startup import measure, table

    with user_errors():
        plots.check(output.plot)
        starts = measure(asdict(engine), at_least_one(rounds, "rounds"))
        publish([table(starts)], {"starts": starts}, asdict(engine), output.json_file)
        if output.plot:
            plots.draw_starts(starts, f"octavo serve, {_model(engine)}", output.plot)


def _model(engine: EngineOptions) -> str:
    return engine.model or "the embedded model"


def _title(workload: WorkloadOptions, engine: EngineOptions) -> str:
    """Describe the run in a plot's title."""
    parts: list[Any] = [f"{workload.input_len} tokens in, {workload.output_len} out"]
    if workload.requests is not None:
        parts = [workload.requests.name]
    parts += [f"image {size}" for size in workload.image_size or ()]
    parts += [f"video {workload.video_size}"] if workload.video_size else []
    parts += [f"{workload.turns} turns"] if workload.turns > 1 else []
    how = f", {engine.quantization}" if engine.quantization else ""
    return f"{_model(engine)}{how}: " + ", ".join(parts)


@bench_app.command()
def kernels(
    paper: Annotated[
        bool, typer.Option("--paper", help="Estimate from shapes and compiled code, without a GPU.")
    ] = False,
    model: Annotated[
        list[str] | None, typer.Option(help="2B, 7B or 72B; may be repeated. Default: all.")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="With --paper: H100, H200, A100 or B200; may be repeated. Default: all."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all rows to this file.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="With --paper: write a Markdown table of all rows.")
    ] = None,
) -> None:
    """Check the Triton kernels on this machine's GPU against their reference implementations.

    Also compares their speed with torch's kernels and with the device's peak rates. With --paper,
    print each launch's required work and what its compiled code shows.
    """
    from .kernels.bench import run

    with user_errors():
        if not run(paper, model, gpu, json_file, markdown):
            raise typer.Exit(1)
