"""The `octavo bench media` command."""

from __future__ import annotations

from typing import Annotated

import typer

from octavo.engine.cli.errors import user_errors

from ..options import JsonFile


def media(
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of alternating runs per row.")] = 9,
    json_file: JsonFile = None,
) -> None:
    """Time image and video preprocessing, from bytes to hashed units.

    Compares it with bare Pillow and PyAV, which decode and resize the same frames to the same size
    without checks and hashes; decoding in a separate process (as `octavo serve` does) with
    decoding in this one; and a thread pool with a single thread.
    """
    from ..report import publish
    from . import speed as bench

    with user_errors():
        found = [bench.measure(case, rounds) for case in bench.cases()]
        rows = {"rows": [row.as_dict() for row in found]}
        publish([bench.table(found)], rows, {"rounds": rounds}, json_file)
