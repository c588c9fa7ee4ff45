"""Limit the cost of parsing a protobuf message, before parsing it.

Parsing holds the GIL, and an empty submessage takes two bytes on the wire and 64 in memory: 16 MB
of them take 0.7 s and 0.5 GB. So the fields are counted first, skipping the contents of strings and
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

SMALL = 1 << 17  # bytes; any such message is parsed within a few milliseconds
MAX_FIELDS = 300_000
MAX_PACKED = 4 << 20  # bytes of packed numbers
MAX_TEXT = 32 << 20  # bytes of strings, except `url`, which may be a data URI

_LENGTH = 2  # wire type of strings, bytes, messages and packed numbers
_FIXED = {1: 8, 5: 4}  # wire type -> bytes


class TooManyFields(ValueError):
    """The message exceeds a limit of `check_wire`."""


def check_wire(data: bytes, descriptor: Descriptor) -> None:
    """Raise `TooManyFields` if a message exceeds `MAX_FIELDS`, `MAX_PACKED` or `MAX_TEXT`.

    Malformed data ends the check; the parser reports it.
    """
    if len(data) <= SMALL:
        return
    num_packed = num_text = 0
    for count, (packed, text) in enumerate(_fields(data, descriptor), 1):
        num_packed, num_text = num_packed + packed, num_text + text
        if count > MAX_FIELDS:
            raise TooManyFields(f"the message has over {MAX_FIELDS} fields, the maximum")
        if num_packed > MAX_PACKED:
            raise TooManyFields(f"the message has over {MAX_PACKED} bytes of packed numbers")
        if num_text > MAX_TEXT:
            raise TooManyFields(f"the message has over {MAX_TEXT} bytes of text")


def _fields(data: bytes, descriptor: Descriptor) -> Iterator[tuple[int, int]]:
    """Yield (bytes of packed numbers, bytes of text) of each field, including nested messages."""
    parts: list[tuple[int, int, Mapping[int, Any]]] = [(0, len(data), _by_number(descriptor))]
    while parts:
        at, end, fields = parts.pop()
        while at < end:
            tag, at = _varint(data, at)
            kind, found = tag & 7, fields.get(tag >> 3)
            packed = text = 0
            if kind == _LENGTH:
                size, at = _varint(data, at)
                size = min(size, max(0, end - at))
                if found is not None and found.message_type is not None:
                    parts.append((at, at + size, _by_number(found.message_type)))
                elif found is not None and found.type == FieldDescriptor.TYPE_STRING:
                    text = size if found.name != "url" else 0
                elif found is not None and found.type != FieldDescriptor.TYPE_BYTES:
                    packed = size
                at += size
            elif kind == 0:
                _, at = _varint(data, at)
            elif kind in _FIXED:
                at += _FIXED[kind]
            elif kind not in (3, 4):  # start or end of a group, which has no length
                return
            yield packed, text


def _by_number(descriptor: Descriptor) -> Mapping[int, Any]:
    return descriptor.fields_by_number


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a varint and the offset after it. A truncated one gives the end of the data."""
    number = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    return 0, len(data)
