"""Requests as JSON Lines: workload files, and the format that passes requests between processes.

A line is a prompt as accepted by `LLM.generate`, with optional benchmark fields:

    {"prompt": "Describe this.", "max_tokens": 32}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, ...]}]}
    {"prompt_token_ids": [1, 2, 3], "images": ["a.png"], "videos": [["0.png", "1.png"]], "after": 0}

Images are paths (relative to the file's folder) or data URIs; a video is a list of frames. `after`
is the 0-based index of an earlier line whose request must have finished first.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.input.chat_template import ChatTemplate
from octavo.engine.input.conversation import read_conversation
from octavo.engine.input.tokenizer import TextTokenizer
from octavo.engine.media.decode.opening import open_here
from octavo.engine.media.source import MediaAccess, open_source
from octavo.engine.media.task import MediaTask

from .workload import BenchRequest, Frames

ANY, LIMITS = MediaAccess(), MediaLimits()
FIELDS = ("prompt", "messages", "prompt_token_ids", "images", "videos", "max_tokens", "after")


def to_line(request: BenchRequest) -> str:
    """Return the request as a line, with its images as PNG data URIs."""
    return json.dumps(
        {
            "prompt_token_ids": request.prompt_token_ids,
            "images": [_data_uri(image) for image in request.images],
            "videos": [[_data_uri(frame) for frame in video] for video in request.videos],
            "max_tokens": request.max_tokens,
            "after": request.after,
        }
    )


def png(image: Image.Image) -> bytes:
    """Encode as PNG with fast compression: random pixels do not compress anyway."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _data_uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def read_requests(path: Path, model_dir: Path, max_tokens: int) -> list[BenchRequest]:
    """Read the requests of a file, with prompts tokenized for the given checkpoint.

    `max_tokens` applies to lines without one. Raises ValueError naming the line.
    """
    reader = _Reader(path.parent, model_dir, max_tokens)
    found: list[BenchRequest] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            raise ValueError(f"{path}:{number}: empty line")
        try:
            found.append(reader.read(json.loads(line), len(found)))
        except ValueError as error:  # includes InputError and JSONDecodeError
            raise ValueError(f"{path}:{number}: {error}") from None
    if not found:
        raise ValueError(f"{path}: no requests in the file")
    return found


class _Reader:
    def __init__(self, folder: Path, model_dir: Path, max_tokens: int) -> None:
        self._folder, self._max_tokens = folder, max_tokens
        self._tokenizer = TextTokenizer(model_dir)
        self._template = ChatTemplate(model_dir, self._tokenizer)

    def read(self, line: Any, index: int) -> BenchRequest:
        """Parse line `index`. Raises ValueError naming the field."""
        if not isinstance(line, dict):
            raise ValueError(f"must be an object, not {type(line).__name__}")
        for name in line:
            if name not in FIELDS:
                raise ValueError(f"{name}: unknown field; allowed: {', '.join(FIELDS)}")
        token_ids, images, videos = self._prompt(line)
        images = [*images, *_list(line, "images")]
        videos = [*videos, *_list(line, "videos")]
        max_tokens = line.get("max_tokens", self._max_tokens)
        if type(max_tokens) is not int or max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens!r}: must be an integer >= 1")
        after = line.get("after")
        if after is not None and (type(after) is not int or not 0 <= after < index):
            raise ValueError(f"after={after!r}: must be the 0-based index of an earlier line")
        return BenchRequest(
            tuple(token_ids),
            tuple(self._image(source, f"images[{i}]") for i, source in enumerate(images)),
            tuple(self._frames(source, f"videos[{i}]") for i, source in enumerate(videos)),
            max_tokens,
            after,
        )

    def _prompt(self, line: dict[str, Any]) -> tuple[Sequence[int], list[Any], list[Any]]:
        """Return the token ids, and the images and videos from messages."""
        kinds = [name for name in FIELDS[:3] if name in line]
        if len(kinds) != 1:
            raise ValueError("pass exactly one of prompt, messages and prompt_token_ids")
        if kinds == ["prompt_token_ids"]:
            token_ids = line["prompt_token_ids"]
            if not isinstance(token_ids, list) or not all(
                type(token) is int for token in token_ids
            ):
                raise ValueError("prompt_token_ids: must be a list of integers")
            return token_ids, [], []
        if kinds == ["prompt"]:
            if not isinstance(line["prompt"], str):
                raise ValueError("prompt: must be a string")
            return self._tokenizer.encode_marked(line["prompt"]), [], []
        conversation = read_conversation(line["messages"])
        media: dict[str, list[Any]] = {"image": [], "video": []}
        for part in conversation.media:
            if part.source is None or len(part.part) != 2:
                raise ValueError(f"{part.field}: must contain only {part.kind}; remove the rest")
            media[part.kind].append(part.source)
        return self._template.encode(conversation), media["image"], media["video"]

    def _image(self, source: Any, field: str) -> Image.Image:
        if isinstance(source, str) and not source.startswith(("data:", "file://")):
            source = str(self._folder / source)
        file = open_source(source, ANY, field, MediaTask(LIMITS))
        with open_here("image", file, LIMITS, field) as reader:
            size = reader.header
            return Image.fromarray(next(reader.frames([0], size.height, size.width)).pixels)

    def _frames(self, source: Any, field: str) -> Frames:
        if not isinstance(source, list) or not source:
            raise ValueError(f"{field}: must be a list of images; video files are not supported")
        return tuple(self._image(frame, f"{field}[{i}]") for i, frame in enumerate(source))


def _list(line: dict[str, Any], name: str) -> Iterable[Any]:
    found = line.get(name, [])
    if not isinstance(found, list):
        raise ValueError(f"{name}: must be a list")
    return found
