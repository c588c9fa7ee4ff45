"""Adapt `Rendezvous` to the store interface of torch.distributed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from ....proto import worker_pb2 as pb
from .rendezvous import Rendezvous

POLL = 0.02  # seconds between two checks for a value that another rank sets


class RendezvousStore(dist.Store):
    """`dist.Store` over a `Rendezvous`. Torch calls it from its own threads."""

    def __init__(self, rendezvous: Rendezvous) -> None:
        super().__init__()
        self._rendezvous = rendezvous
        self._timeout = timedelta(minutes=5)

    def _value(self, key: str) -> bytes | None:
        return self._rendezvous.ask(pb.StoreRequest(key=key, get=pb.Nothing()))

    def set(self, key: str, value: str | bytes) -> None:
        self._rendezvous.ask(pb.StoreRequest(key=key, set=_bytes(value)))

    def get(self, key: str) -> bytes:
        """Wait for a key and return its value. Raises `RuntimeError` after the store's timeout."""
        deadline = time.monotonic() + self._timeout.total_seconds()
        while (value := self._value(key)) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no rank has set {key!r}")
            time.sleep(POLL)
        return value

    def add(self, key: str, value: int) -> int:
        return int(self._rendezvous.ask(pb.StoreRequest(key=key, add=value)) or 0)

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        swap = pb.Swap(expected=_bytes(expected), desired=_bytes(desired))
        return self._rendezvous.ask(pb.StoreRequest(key=key, swap=swap)) or b""

    def check(self, keys: Sequence[str]) -> bool:
        return all(self._value(key) is not None for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        before = self._timeout
        self._timeout = timeout or before
        try:
            for key in keys:
                self.get(key)
        finally:
            self._timeout = before

    def delete_key(self, key: str) -> bool:
        return self._rendezvous.ask(pb.StoreRequest(key=key, delete=pb.Nothing())) is not None

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    def has_extended_api(self) -> bool:
        return False


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
