"""Error reporting and exit statuses of commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def user_errors() -> Iterator[None]:
    """Print errors as one line on stderr; exit with 1 for a dead engine, else with 2."""
    from ..client.client import ClientError
    from ..errors import EngineDead
    from ..worker.group import WorkerGroupError

    try:
        yield
    except (EngineDead, WorkerGroupError) as error:
        print(f"octavo: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except (ValueError, OSError, ClientError) as error:
        print(f"octavo: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
