"""`octavo bench media`, the command."""

from __future__ import annotations

from typing import Annotated

import typer

from octavo.engine.cli.errors import user_errors

from ..options import JsonFile


def media(
    rounds: Annotated[
        int, typer.Option(min=1, help="Pairs of runs of each row: ours, bare, ours, bare, ...")
    ] = 9,
    json_file: JsonFile = None,
) -> None:
    """Time images and videos from their bytes to hashed units against bare Pillow and PyAV, which
    decode and resize the same frames to the same size and check and hash nothing; decoding in a
    process of its own, as `octavo serve` does, against decoding in this one; and a pool of threads
    against one."""
    from ..report import publish
    from . import speed as bench

    with user_errors():
        found = [bench.measure(case, rounds) for case in bench.cases()]
        rows = {"rows": [row.as_dict() for row in found]}
        publish([bench.table(found)], rows, {"rounds": rounds}, json_file)
