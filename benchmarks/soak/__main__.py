"""`python -P -m octavo.benchmarks.soak --minutes 60`: exits with status 1 if problems are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .run import Soak, SoakOptions


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="Duration of the load.")] = 60.0,
    warm_up: Annotated[
        float | None, typer.Option(help="Minutes excluded from the slope. Default: a third.")
    ] = None,
    rate: Annotated[float, typer.Option(min=0.1, help="Cases per second.")] = 8.0,
    processes: Annotated[int, typer.Option(min=1, help="Number of client processes.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads per process.")] = 6,
    case: Annotated[list[str] | None, typer.Option(help="Only these cases. Default: all.")] = None,
    serve: Annotated[
        list[str] | None, typer.Option(help="An argument of `octavo serve`. May be repeated.")
    ] = None,
    census_interval: Annotated[
        float, typer.Option(help="Minutes between samples of the idle server; 0: only two.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the requests.")] = 0,
    report: Annotated[
        Path | None, typer.Option("--json", help="Write all samples to this file.")
    ] = None,
    log_file: Annotated[
        Path | None, typer.Option(help="Write the server's log to this file.")
    ] = None,
) -> None:
    """Run valid, invalid and disconnecting clients against `octavo serve`; check its growth."""
    options = SoakOptions(
        minutes=minutes,
        warm_up=minutes / 3 if warm_up is None else warm_up,
        settled=min(10.0, minutes / 3),
        rate=rate,
        num_processes=processes,
        num_threads=threads,
        census_interval=census_interval,
        seed=seed,
        cases=tuple(case or ()),
        serve_arguments=tuple(serve or ()),
        log_file=log_file,
    )
    found = Soak(options, lambda line: print(line, flush=True)).run()
    if report is not None:
        report.write_text(json.dumps(found.as_dict()))
    print(found.as_text())
    raise typer.Exit(1 if found.problems() else 0)


if __name__ == "__main__":
    typer.run(main)
