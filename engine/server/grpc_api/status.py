"""gRPC statuses with the details that `octavo.proto` describes."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from ....proto import octavo_pb2 as pb
from ...errors import RequestError

DETAILS = "grpc-status-details-bin"
# Encoded bytes. gRPC drops a status with more than about 8,000 bytes of metadata.
MAX_TEXT = 2000
_SAMPLING = pb.SamplingParams.DESCRIPTOR.fields_by_name
_PATHS = {"messages": "conversation.messages", "prompt_token_ids": "token_ids.ids"}


async def abort(context: grpc.aio.ServicerContext, fault: RequestError) -> NoReturn:
    """End a call with a status. Raises AbortError, or CancelledError if the client is gone."""
    code, text = grpc.StatusCode[fault.code], short(fault.message)
    details = ((DETAILS, details_of(fault, text).SerializeToString()),)
    try:
        await context.abort(code, text, details)
    except grpc.aio.InternalError:  # it could not be sent: the client has disconnected
        raise asyncio.CancelledError from None
    raise AssertionError("context.abort returned")


def details_of(fault: RequestError, text: str) -> status_pb2.Status:
    code = grpc.StatusCode[fault.code].value[0]
    status = status_pb2.Status(code=code, message=text)
    status.details.append(_packed(pb.Failure(code=fault.code, retryable=fault.retryable)))
    if fault.field:
        request = error_details_pb2.BadRequest()
        request.field_violations.add(field=path_of(fault.field), description=text)
        status.details.append(_packed(request))
    return status


def failure_of(fault: RequestError) -> pb.Failure:
    """Return the failure event that ends a stream."""
    field = path_of(fault.field) if fault.field else ""
    text = short(fault.message)
    return pb.Failure(code=fault.code, text=text, retryable=fault.retryable, field=field)


def path_of(field: str) -> str:
    """Return a field's path in the request message."""
    first = field.split("[")[0].split(".")[0]
    if first in _SAMPLING:
        return f"sampling.{field}"
    return _PATHS.get(first, first) + field[len(first) :]


def short(text: str) -> str:
    """Truncate a text to `MAX_TEXT` encoded bytes.

    gRPC percent-encodes all but printable ASCII: three bytes for each UTF-8 byte.
    """
    remaining = MAX_TEXT
    for at, character in enumerate(text):
        is_plain = " " <= character <= "~" and character != "%"
        remaining -= 1 if is_plain else 3 * len(character.encode("utf-8", "replace"))
        if remaining < 0:
            return text[:at] + "…"
    return text


def _packed(message: pb.Failure | error_details_pb2.BadRequest) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
