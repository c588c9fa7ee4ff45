"""`octavo worker`: a rank of a group that an engine elsewhere drives; and the engine's options."""

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
        help="HOST:PORT of each rank's `octavo worker`, with commas between: they share each "
        "layer, as with --tensor-parallel-size. Default: processes of this machine."
    ),
]
WorkerTls = Annotated[
    Path | None,
    typer.Option(
        help="Mutual TLS with the workers, which other machines take: a folder of tls.crt and "
        "tls.key, the engine's own, and ca.crt, which signed the workers' (PEM; the names of a "
        "Kubernetes secret)."
    ),
]


def worker(
    listen: Annotated[
        str, typer.Option(help="HOST:PORT to listen on for the engine; port 0 takes a free one.")
    ] = "127.0.0.1:7000",
    rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The worker's place in `octavo serve --workers`, from 0. Default: the variable "
            "RANK, as torchrun sets it; the port is then LOCAL_RANK higher.",
        ),
    ] = None,
    local_rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The number of its GPU on this machine. Default: the variable LOCAL_RANK, or 0.",
        ),
    ] = None,
    model: Model = None,
    hub: Hub = "huggingface",
    tls: Annotated[
        Path | None,
        typer.Option(
            help="Mutual TLS: a folder of tls.crt and tls.key, the worker's own, and ca.crt, which "
            "signed the engine's."
        ),
    ] = None,
    log_format: LogFormat = "text",
) -> None:
    """Be one rank of a group of workers: `octavo serve --workers` on some machine drives it.

    Off loopback it takes mutual TLS. It serves one engine at a time; when that ends, or is out of
    reach for some seconds, the worker starts anew and waits for the next. Prints a line on stdout
    whenever it waits: ready worker=HOST:PORT rank=R pid=N. Logs go to stderr.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read when gRPC is imported: as in cli_serve
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
        keeper = Supervisor(address, rank, local, resolve_model(model, hub), tls)
    raise typer.Exit(keeper.run())


def _number(name: str, default: int | None) -> int:
    """Of the environment. Raises ValueError."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        found = f"; there it is {text!r}" if text else ""
        raise ValueError(f"--rank: give it, or the variable {name} as torchrun does{found}")
    return int(text)
