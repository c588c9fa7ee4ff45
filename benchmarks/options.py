"""Command-line options shared by the benchmarks, as frozen dataclasses with one field per option.

`@with_options` expands the fields into a command's signature, where typer reads them, and passes
the command the dataclasses.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from octavo.engine.cli.options import (
    Device,
    Dtype,
    Hub,
    KvCacheDtype,
    KvCacheMemoryBytes,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    MaxPixels,
    Model,
    OverlapSteps,
    Quantization,
    TensorParallelSize,
    TraceFile,
)

if TYPE_CHECKING:
    from .workload import BenchRequest, Workload

Command = Callable[..., Any]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the results as JSON; - for stdout."),
]
IMAGE, VIDEO = "WIDTHxHEIGHT", "FRAMESxWIDTHxHEIGHT"


def with_options(command: Command) -> Command:
    """Expand each parameter whose type is in `GROUPS` into the options of that dataclass."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[type, list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if kind not in GROUPS:
            parameters.append(parameter.replace(annotation=kind))
            continue
        types = get_type_hints(kind, include_extras=True)
        groups[parameter.name] = kind, [field.name for field in fields(kind)]
        parameters += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=types[field.name],
            )
            for field in fields(kind)
        ]

    @functools.wraps(command)
    def flat(**given: Any) -> Any:
        made = {
            name: kind(**{field: given.pop(field) for field in names})
            for name, (kind, names) in groups.items()
        }
        return command(**given, **made)

    by_keyword = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    flat.__signature__ = inspect.Signature(by_keyword)  # type: ignore[attr-defined]
    flat.__annotations__ = {each.name: each.annotation for each in parameters}
    return flat


@dataclass(frozen=True)
class WorkloadOptions:
    """The workload: the fields of `workload.Workload`, or a file of requests."""

    input_len: Annotated[int, typer.Option(help="Text tokens per prompt.")] = 128
    output_len: Annotated[int, typer.Option(help="Tokens per output.")] = 64
    image_size: Annotated[
        list[str] | None,
        typer.Option(metavar=IMAGE, help="Add a random image to each prompt; may be repeated."),
    ] = None
    video_size: Annotated[
        str | None,
        typer.Option(metavar=VIDEO, help="Add a random video to each prompt."),
    ] = None
    share_media: Annotated[
        bool, typer.Option("--share-media", help="Use the same media in all prompts.")
    ] = False
    shared_prefix_len: Annotated[
        int, typer.Option(help="Text tokens of a prefix common to all prompts.")
    ] = 0
    turns: Annotated[
        int,
        typer.Option(
            help="Turns per conversation: each prompt is the previous one, an answer of "
            "--output-len random tokens, and --input-len new tokens."
        ),
    ] = 1
    requests: Annotated[
        Path | None,
        typer.Option(
            help="JSON Lines file of requests, used instead: prompt, messages or "
            "prompt_token_ids; optionally images, videos (lists of frames), max_tokens, after."
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random prompts.")] = 0

    def workload(self, num_prompts: int) -> Workload:
        """Return the workload. Raises ValueError naming the invalid option."""
        from .workload import Media, Workload

        for name in ("input_len", "output_len", "turns"):
            at_least_one(getattr(self, name), name.replace("_", "-"))
        if self.shared_prefix_len < 0:
            raise ValueError(f"--shared-prefix-len {self.shared_prefix_len}: must be 0 or more")
        sizes = [size(text, "image-size", IMAGE, "448x448") for text in self.image_size or ()]
        video = self.video_size and size(self.video_size, "video-size", VIDEO, "16x224x224")
        return Workload(
            self.input_len,
            self.output_len,
            at_least_one(num_prompts, "num-prompts"),
            Media(tuple((width, height) for width, height in sizes), _triple(video)),
            self.share_media,
            self.shared_prefix_len,
            self.turns,
            self.seed,
        )

    def make(self, model_dir: Path, num_prompts: int, number: int = 0) -> list[BenchRequest]:
        """Make the requests; each `number` gives different ones, unless they come from a file.

        Raises ValueError for an invalid option or file.
        """
        from .request_file import read_requests
        from .workload import Vocabulary

        workload = self.workload(num_prompts)
        if self.requests is not None:
            return read_requests(self.requests, model_dir, self.output_len)
        return workload.reseeded(number).requests(Vocabulary.of(model_dir))


@dataclass(frozen=True)
class EngineOptions:
    """The engine's settings, named as in `octavo serve`."""

    model: Model = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantization: Quantization = None
    kv_cache_dtype: KvCacheDtype = "auto"
    tensor_parallel_size: TensorParallelSize = 1
    max_model_len: MaxModelLen = None
    max_num_seqs: MaxNumSeqs = 64
    max_num_batched_tokens: MaxNumBatchedTokens = 2048
    overlap_steps: OverlapSteps = True
    kv_cache_memory_bytes: KvCacheMemoryBytes = None
    max_pixels: MaxPixels = None
    trace_file: TraceFile = None
    hub: Hub = "huggingface"


@dataclass(frozen=True)
class OutputOptions:
    """Outputs in addition to the table."""

    json_file: JsonFile = None
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Plot the results (.png, .svg or .pdf)."),
    ] = None


GROUPS = (WorkloadOptions, EngineOptions, OutputOptions)


def counts(text: str, option: str) -> list[int]:
    """Parse "1,2,4" into integers >= 1. Raises ValueError naming the option."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{option} {text}: must be an integer or a list such as 1,2,4") from None
    return [at_least_one(number, option) for number in found]


def rates(text: str, option: str) -> list[float]:
    """Parse "0.5,1,inf" into numbers > 0. Raises ValueError naming the option."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(rate > 0 for rate in found):
        raise ValueError(f"--{option} {text}: must be a number > 0 or a list such as 0.5,1,inf")
    return found


def at_least_one(value: int, option: str) -> int:
    if value < 1:
        raise ValueError(f"--{option} {value}: must be at least 1")
    return value


def size(text: str, option: str, pattern: str, example: str) -> tuple[int, ...]:
    """Parse "448x448" into integers; `pattern` is the option's metavar. Raises ValueError."""
    parts = pattern.count("x") + 1
    match = re.fullmatch("x".join([r"([1-9]\d{0,4})"] * parts), text)
    if match is None:
        raise ValueError(f"--{option} {text}: must be {pattern}, such as {example}")
    return tuple(map(int, match.groups()))


def _triple(found: Any) -> tuple[int, int, int] | None:
    return found or None
