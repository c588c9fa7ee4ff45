"""Options of `octavo serve` for those who watch it."""

from __future__ import annotations

from dataclasses import dataclass
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
