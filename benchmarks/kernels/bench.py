"""Entry point of `octavo bench kernels`: checks the options and runs the benchmark."""

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
    """Run the benchmark; return False if a kernel is wrong. Raises ValueError naming the option."""
    chosen = checked("--model", models, MODELS)
    if paper:
        from . import paper as kernel_paper

        names = [gpu.name for gpu in kernel_paper.GPUS]
        kernel_paper.run(chosen, checked("--gpu", gpus, names), json_file, markdown_file)
        return True
    for option, value in (("--gpu", gpus), ("--markdown", markdown_file)):
        if value:
            raise ValueError(f"{option}: requires --paper; without it, the local GPU is used")
    from . import gpu as kernel_gpu

    return kernel_gpu.run(chosen, json_file)


def checked(option: str, values: list[str] | None, known: Collection[str]) -> list[str]:
    """Validate `values` against `known`; return all known values if there are none."""
    for value in values or ():
        if value not in known:
            raise ValueError(f"{option} {value!r}: must be one of {', '.join(known)}")
    return list(values or known)
