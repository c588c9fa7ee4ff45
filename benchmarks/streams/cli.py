"""The `octavo bench streams` command."""

from __future__ import annotations

from typing import Annotated

import typer

from octavo.engine.cli.errors import user_errors

from ..options import JsonFile


def streams(
    num_streams: Annotated[
        list[int] | None,
        typer.Option("--streams", help="Concurrent streams; may be repeated. Default: 64 and 500."),
    ] = None,
    sleep_ms: Annotated[
        list[float] | None,
        typer.Option(min=0.1, help="Duration of a worker's step, in ms. Default: 20."),
    ] = None,
    door: Annotated[
        list[str] | None, typer.Option(help="API server: grpc or http. Default: both.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="Measured time, from when all streams have started.")
    ] = 8.0,
    json_file: JsonFile = None,
) -> None:
    """Time the overhead that the API servers add to each step and each token.

    Many concurrent streams are read by separate processes from a server whose worker only sleeps.
    """
    from ..report import publish
    from . import run as bench

    with user_errors():
        for kind in door or ():
            if kind not in bench.KINDS:
                raise ValueError(f"--door {kind}: must be grpc or http")
        found = [
            bench.measure(kind, count, sleep, seconds)
            for kind in door or bench.KINDS
            for count in num_streams or (64, 500)
            for sleep in sleep_ms or (20.0,)
        ]
        publish([bench.table(found)], {"runs": [each.as_dict() for each in found]}, {}, json_file)
