"""`GET /engine/snapshot`: the engine's state, for the page's live view.

The page polls instead of holding a stream open: hidden pages cost nothing, slow steps or clients
lower the polling rate, and draining need not wait for open connections.
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

MIN_AGE = 0.2  # seconds; newer snapshots are reused for all clients
SNAPSHOT_TIMEOUT = 3.0  # seconds to wait for the step thread
MAX_DIGITS = 18  # of a step number


class LiveView:
    """Live view of one engine."""

    def __init__(self, engine: AsyncLLM, is_known: bool) -> None:
        """Serve `engine`. `is_known`: all clients are authenticated, by key or certificate."""
        self._engine, self._is_known = engine, is_known
        self._lock = asyncio.Lock()  # concurrent requests share one snapshot
        self._made_at = -MIN_AGE
        self._snapshot: Snapshot | None = None
        self._runs: list[int] = []

    @property
    def routes(self) -> list[Route]:
        return [Route("/engine/snapshot", self.snapshot)]

    async def snapshot(self, request: Request) -> Response:
        """Return the snapshot as JSON. `?after=STEP` returns only later steps.

        Request names are hidden from clients that may not drain the server (`Control.Drain`),
        because a name is enough to abort its request. With API keys or client certificates, all
        clients see names; without, only clients on this machine.
        """
        after = _read_step(request.query_params.get("after", "0"))
        snapshot, runs = await self._latest()
        with_names = self._is_known or _is_local(request)
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
        """Return the latest snapshot and its block runs; take a new one if older than `MIN_AGE`."""
        async with self._lock:
            if self._snapshot is None or time.monotonic() - self._made_at >= MIN_AGE:
                try:
                    made = await asyncio.wait_for(self._engine.snapshot(), SNAPSHOT_TIMEOUT)
                except TimeoutError:
                    text = (
                        "the engine is in a long step, or its workers are restarting; retry later"
                    )
                    raise RequestRejected("UNAVAILABLE", text) from None
                self._runs = await asyncio.to_thread(made.runs)
                self._snapshot, self._made_at = made, time.monotonic()
            return self._snapshot, self._runs


def _read_step(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > MAX_DIGITS:
        raise InputError("after", f"{truncated_repr(text)}: must be a step number")
    return int(text)


def _is_local(request: Request) -> bool:
    """Return whether the request comes from this machine."""
    host = request.client.host if request.client else ""
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _write_row(row: RequestRow, with_names: bool) -> dict[str, Any]:
    """Convert a row. The engine's request id is NAME#NUMBER or NAME#NUMBER[INDEX]."""
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
    """Return [step, milliseconds, encoder tokens, prefill tokens, decode tokens]."""
    return [step.step_id, round(step.seconds * 1e3, 3), *step[3:]]
