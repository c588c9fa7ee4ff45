"""The one map from errors to codes, for callers, the log and the metrics."""

from __future__ import annotations

from ..scheduler.admission import AdmissionError, QueueFull
from .engine import DuplicateRequest, EngineDead
from .grammar import GrammarQueueFull
from .input_error import InputError

# The first that an error is; whatever is none of them is a fault of ours: INTERNAL.
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (QueueFull, "RESOURCE_EXHAUSTED"),
    (GrammarQueueFull, "RESOURCE_EXHAUSTED"),
    (DuplicateRequest, "ALREADY_EXISTS"),
    (InputError, "INVALID_ARGUMENT"),
    (AdmissionError, "INVALID_ARGUMENT"),
    (EngineDead, "UNAVAILABLE"),
)


def code_of(error: BaseException) -> str:
    """Of what was raised."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), "INTERNAL")
