"""What the engine is at, for the page's live view: `GET /engine/snapshot`.

The page asks again and again, rather than being sent a stream: who does not look costs nothing, a
slow step or reader makes the questions fewer, and draining waits for no open connection.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict
from ipaddress import ip_address
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ....scheduler.params import truncated_repr
from ...async_llm import AsyncLLM
from ...errors import InputError
from ...observability.snapshot import RequestRow, Snapshot
from ...observability.stats import StepRecord
from ..errors import RequestRejected

MIN_AGE = 0.2  # seconds that a snapshot serves for all who ask
SNAPSHOT_TIMEOUT = 3.0  # seconds for the step thread to come by
MAX_DIGITS = 18  # of a step's number


class LiveView:
    """Of one engine."""

    def __init__(self, engine: AsyncLLM, is_known: bool) -> None:
        """`is_known`: everybody who comes has shown a key or a certificate."""
        self._engine, self._is_known = engine, is_known
        self._lock = asyncio.Lock()  # who asks meanwhile gets the same
        self._made_at = -MIN_AGE
        self._snapshot: Snapshot | None = None
        self._runs: list[int] = []

    @property
    def routes(self) -> list[Route]:
        return [Route("/engine/snapshot", self.snapshot)]

    async def snapshot(self, request: Request) -> Response:
        """`?after=STEP`: tells of later steps alone.

        By a request's name anybody can abort it. So names are for whoever may drain the server
        (`Control.Drain`): who has a key or a certificate, and on a server that asks for neither who
        is on this machine. Others see numbers."""
        after = _read_step(request.query_params.get("after", "0"))
        snapshot, runs = await self._latest()
        with_names = self._is_known or _is_here(request)
        body = {
            "names_are_shown": with_names,
            "block_size": snapshot.block_size,
            "load": asdict(snapshot.load),
            "requests": [_write_row(row, with_names) for row in snapshot.requests],
            "blocks": runs,
            "steps": [_write_step(each) for each in snapshot.steps if each.step_id > after],
        }
        text = json.dumps(body, separators=(",", ":"))
        headers = {"cache-control": "no-store"}
        return Response(text, 200, headers, "application/json")

    async def _latest(self) -> tuple[Snapshot, list[int]]:
        """At most one is made in `MIN_AGE` seconds, however many look."""
        async with self._lock:
            if self._snapshot is None or time.monotonic() - self._made_at >= MIN_AGE:
                try:
                    made = await asyncio.wait_for(self._engine.snapshot(), SNAPSHOT_TIMEOUT)
                except TimeoutError:
                    text = "the engine is in a long step, or its workers are away"
                    raise RequestRejected("UNAVAILABLE", text) from None
                self._runs = await asyncio.to_thread(made.runs)
                self._snapshot, self._made_at = made, time.monotonic()
            return self._snapshot, self._runs


def _read_step(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > MAX_DIGITS:
        raise InputError("after", f"{truncated_repr(text)}: must be the number of a step")
    return int(text)


def _is_here(request: Request) -> bool:
    """Whether it comes from this machine."""
    host = request.client.host if request.client else ""
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _write_row(row: RequestRow, with_names: bool) -> dict[str, Any]:
    """The engine's name is NAME#NUMBER or NAME#NUMBER[INDEX]."""
    name, _, rest = row.request_id.rpartition("#")
    number, _, answer = rest.partition("[")
    fields = {each: value for each, value in asdict(row).items() if each != "request_id"}
    return {
        "name": name if with_names else None,
        "number": int(number),
        "answer": int(answer.removesuffix("]") or 0),
        **fields,
    }


def _write_step(step: StepRecord) -> list[float]:
    """[step, milliseconds, tokens encoded, of prompts, of outputs]"""
    return [step.step_id, round(step.seconds * 1e3, 3), *step[3:]]
