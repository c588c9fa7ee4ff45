"""Options of `octavo serve` for those who watch it."""

from __future__ import annotations

from typing import Annotated

import typer

MetricsPort = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help="Serve Prometheus metrics there, on --host, without any key; 0 takes a free port. "
        "Default: they are not served.",
    ),
]
LogFormat = Annotated[
    str, typer.Option(help="Log lines: text, or json, one object a line with request ids.")
]
