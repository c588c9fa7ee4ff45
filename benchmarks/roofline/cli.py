"""The `octavo bench roofline` command."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.engine.cli.errors import user_errors
from octavo.engine.cli.options import Dtype, Hub, Model, Quantization

from ..options import IMAGE, JsonFile, size

if TYPE_CHECKING:
    from .run import RooflineWorkload


def roofline(
    model: Model = None,
    hub: Hub = "huggingface",
    batch: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 16,
    input_len: Annotated[int, typer.Option(min=1, help="Text tokens per prompt.")] = 128,
    context: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens already in each request's KV cache (random values), to measure attention "
            "over long contexts without prefilling them.",
        ),
    ] = 0,
    image_size: Annotated[
        str | None,
        typer.Option(
            metavar=IMAGE, help="Add a random image to each prompt; sides are multiples of 28."
        ),
    ] = None,
    quantization: Quantization = None,
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
) -> None:
    """Time each stage of a run on this CPU against its limit.

    The limits are bytes at the read bandwidth and operations at the matrix peak, both measured
    first. Needs about 3 GB of memory in addition to the model.
    """
    from ..report import publish
    from . import run as bench
    from .report import tables

    with user_errors():
        image = size(image_size, "image-size", IMAGE, "448x448") if image_size else None
        workload = bench.RooflineWorkload(
            batch, input_len, context, (image[0], image[1]) if image else None
        )
        found = bench.run_model(model, hub, workload, dtype, quantization)
        settings = {"model": model, "dtype": dtype, "quantization": quantization}
        publish(
            tables(found, _roofline_title(model, quantization, workload)),
            found.as_dict(),
            settings | asdict(workload),
            json_file,
        )


def _roofline_title(model: str | None, quantization: str | None, work: RooflineWorkload) -> str:
    parts = [f"{work.batch} requests", f"{work.input_len} tokens in"]
    parts += [f"{work.context} cached"] if work.context else []
    parts += ["image {}x{}".format(*work.image_size)] if work.image_size else []
    how = f", {quantization}" if quantization else ""
    return f"{model or 'the embedded model'}{how}: {', '.join(parts)}"
