"""`octavo worker`: one rank of a remote engine's worker group; and the options for such groups."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .errors import user_errors
from .options import Hub, LogFormat, Model

Workers = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated HOST:PORT of each rank's `octavo worker`, for tensor parallelism "
        "over several machines. Default: worker processes on this machine."
    ),
]
WorkerTls = Annotated[
    Path | None,
    typer.Option(
        help="Folder with PEM files for mutual TLS with the workers, required for other machines: "
        "tls.crt and tls.key of the engine, and ca.crt, the CA of the workers' certificates (the "
        "file names of a Kubernetes secret)."
    ),
]


def worker(
    listen: Annotated[
        str, typer.Option(help="HOST:PORT to listen on for the engine; port 0 selects a free one.")
    ] = "127.0.0.1:7000",
    rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The worker's index in `octavo serve --workers`, from 0. Default: the environment "
            "variable RANK, as set by torchrun; LOCAL_RANK is then added to the port.",
        ),
    ] = None,
    local_rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Index of its GPU on this machine. Default: LOCAL_RANK, or 0.",
        ),
    ] = None,
    model: Model = None,
    hub: Hub = "huggingface",
    tls: Annotated[
        Path | None,
        typer.Option(
            help="Folder with PEM files for mutual TLS: tls.crt and tls.key of the worker, and "
            "ca.crt, the CA of the engine's certificate."
        ),
    ] = None,
    log_format: LogFormat = "text",
) -> None:
    """Run one rank of a worker group for `octavo serve --workers` on another machine.

    Requires mutual TLS except on loopback. A worker serves one engine at a time; when the engine
    exits or is unreachable for some seconds, the worker restarts and waits for the next one.
    Prints one line on stdout whenever it is waiting: ready worker=HOST:PORT rank=R pid=N. Logs go
    to stderr.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC reads it on import
    from ..config.hub import resolve_model
    from ..utils.logs import set_up_logs
    from ..worker.remote.address import Address
    from ..worker.remote.supervisor import Supervisor

    with user_errors():
        set_up_logs(log_format)
        address = Address.parse(listen, "--listen")
        local = _number("LOCAL_RANK", 0) if local_rank is None else local_rank
        if rank is None:
            rank = _number("RANK", None)
            address = Address(address.host, address.port + local) if address.port else address
        supervisor = Supervisor(address, rank, local, resolve_model(model, hub), tls)
    raise typer.Exit(supervisor.run())


def _number(name: str, default: int | None) -> int:
    """Return an integer environment variable. Raises ValueError."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        found = f", which is {text!r}" if text else ""
        raise ValueError(f"--rank is required, or set the environment variable {name}{found}")
    return int(text)
