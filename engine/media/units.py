"""The encode units of a request, in prompt order, as they are made.

A thread makes them; the step thread takes them. A video's later frames are still being decoded
while its first are computed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator

from ..input_error import InputError
from .item import UnitContent

log = logging.getLogger("octavo.engine")


class UnitStream:
    """Units that come from `source`; `run` or `finish` goes through it, once."""

    def __init__(self, source: Generator[UnitContent, None, None]) -> None:
        self._source = source
        self._ready: deque[UnitContent] = deque()
        self._is_cancelled = False
        self.is_done = False  # no more units come than `take` gives
        self.error: InputError | None = None  # set before the stream is done
        self.on_arrival: Callable[[], None] = lambda: None  # called by the thread that makes them

    def finish(self) -> tuple[UnitContent, ...]:
        """Makes all that are left and gives them, in the caller's thread. Raises `InputError`."""
        return tuple(self._source)

    def run(self) -> None:
        """Makes all that are left, in the caller's thread. An error is kept for who takes them."""
        try:
            while not self._is_cancelled and (unit := next(self._source, None)) is not None:
                self._ready.append(unit)
                self.on_arrival()
        except InputError as error:
            self.error = error
        except Exception:  # a fault of ours: the request's alone all the same
            log.exception("a video's frames could not be made ready")
            self.error = InputError("prompt", "its video could not be made ready")
        finally:
            self._source.close()  # and with it the files
            self.is_done = True
            self.on_arrival()

    def take(self) -> list[UnitContent]:
        """What has come since the last call."""
        return [self._ready.popleft() for _ in range(len(self._ready))]

    def cancel(self) -> None:
        """Nobody wants the rest: `run` stops after the unit in hand."""
        self._is_cancelled = True
