"""`octavo bench`: what it measures and how its results are shown.

The commands import what they need when they run: `octavo --help` is to be quick.
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

bench_app = typer.Typer(help="Measures the engine.", no_args_is_help=True, rich_markup_mode=None)
bench_app.command()(roofline)
bench_app.command()(media)
bench_app.command()(streams)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@bench_app.command()
def scheduler(
    num_requests: Annotated[int, typer.Option(help="Requests, all decoding.")] = 256,
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 1024,
    as_json: AsJson = False,
) -> None:
    """Time the scheduler alone: schedule() and update() of a step in which all requests decode."""
    from .scheduler_latency import run

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
            help="Requests (conversations), all there from the start; several numbers measure one "
            "after another.",
        ),
    ] = "16",
) -> None:
    """Run prompts through the engine: requests and tokens a second, TTFT, TPOT.

    With --num-prompts 1,2,4,8,16,32 a table and a plot of throughput against batch size.
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
            tables = [sweep_table(named, "requests at once")]
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
    num_prompts: Annotated[int, typer.Option(help="Requests, one after another.")] = 8,
) -> None:
    """Run one request at a time: time to first token, time per token, between tokens."""
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
            help="A running `octavo serve` (--model is then whose tokens the prompts are of). "
            "Default: one is started with the options above.",
        ),
    ] = None,
    request_rate: Annotated[
        str,
        typer.Option(
            metavar="RATE[,RATE...]",
            help="Requests that arrive in a second, as a Poisson process; inf: all at once. "
            "Several rates measure one after another.",
        ),
    ] = "1",
    num_prompts: Annotated[int, typer.Option(help="Requests (conversations).")] = 32,
    max_concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Requests on their way at once; others wait, and that counts."),
    ] = None,
    goodput_ttft_ms: Annotated[
        float | None, typer.Option(min=0, help="A good answer's most time to its first token.")
    ] = None,
    goodput_tpot_ms: Annotated[
        float | None, typer.Option(min=0, help="A good answer's most time per token after it.")
    ] = None,
) -> None:
    """Load a server over gRPC: arrivals wait for no answer, latencies count from when each was due.

    With --request-rate 0.5,1,2,4 a table and a plot of TTFT and TPOT against the rate.
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
    rounds: Annotated[int, typer.Option(help="Starts.")] = 3,
) -> None:
    """Time `octavo serve` from the start of its process to its ready line, and where that goes."""
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
    """What was run, for a plot."""
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
    from .kernels.bench import run

    with user_errors():
        if not run(paper, model, gpu, json_file, markdown):
            raise typer.Exit(1)
