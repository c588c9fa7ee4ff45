"""What `octavo bench kernels` is asked for, checked and passed on."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from .resources import MODELS


def run(
    paper: bool,
    models: list[str] | None,
    gpus: list[str] | None,
    json_file: Path | None,
    markdown_file: Path | None,
) -> bool:
    """False where a kernel is wrong. Raises ValueError for what it does not know."""
    chosen = checked("--model", models, MODELS)
    if paper:
        from . import paper as kernel_paper

        names = [gpu.name for gpu in kernel_paper.GPUS]
        kernel_paper.run(chosen, checked("--gpu", gpus, names), json_file, markdown_file)
        return True
    for option, value in (("--gpu", gpus), ("--markdown", markdown_file)):
        if value:
            raise ValueError(f"{option}: only with --paper; a run takes the GPU that is here")
    from . import gpu as kernel_gpu

    return kernel_gpu.run(chosen, json_file)


def checked(option: str, values: list[str] | None, known: Collection[str]) -> list[str]:
    """All that is known where nothing is asked for."""
    for value in values or ():
        if value not in known:
            raise ValueError(f"{option} {value!r}: must be one of {', '.join(known)}")
    return list(values or known)
