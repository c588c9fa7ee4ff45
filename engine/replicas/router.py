"""Which replica a request goes to: the one that holds most of its prefix and media, unless it has
too much to do. Ray Serve asks this class in every process that has a handle of the deployment."""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .calls import Call
from .held import links_in
from .prefix import Prefix

MAX_SENT = 1 << 16  # links and digests whose way is remembered
SETTLE = 10.0  # seconds in which what was sent counts as held, whatever the replica reports: its
# prompt may wait, and reports are that old
MEDIA_TOKENS = 256  # taken for an image or video that no replica has told the size of
CHARACTERS = 4  # of text for a token


class PrefixRouter(RequestRouter):
    """`max_imbalance`: requests that the replica with the prefix may have beyond the idlest one."""

    def initialize_state(self, max_imbalance: int = 8) -> None:
        self.max_imbalance = max_imbalance
        self._sent: OrderedDict[bytes, dict[ReplicaID, float]] = OrderedDict()  # when, to whom
        self._reports: dict[ReplicaID, tuple[bytes, frozenset[bytes]]] = {}  # as they came, read

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The best, then two of the others at random: Serve takes the idler one of a list, and goes
        on to the next list where none has room."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # every replica was on offer
        others = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        best = self._best(candidate_replicas, pending_request)
        if best is None or self._is_busy(best, candidate_replicas):
            return [others]
        return [[best], others]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        prefix = _prefix(pending_request)
        now = time.monotonic()
        for key in (*(link.hash for link in prefix.links), *prefix.media):
            self._sent.setdefault(key, {})[replica_id] = now
            self._sent.move_to_end(key)
        while len(self._sent) > MAX_SENT:
            self._sent.popitem(last=False)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._reports.pop(replica_id, None)

    def _best(
        self, candidates: list[RunningReplica], pending_request: PendingRequest | None
    ) -> RunningReplica | None:
        """Of those that hold something, the one that holds most; of equals the idler one."""
        prefix = _prefix(pending_request)
        if not prefix.links:
            return None
        scores = [(self._score(prefix, each), each) for each in candidates]
        scores = [(score, each) for score, each in scores if score > 0]
        if not scores:
            return None
        return max(scores, key=lambda pair: (pair[0], -self._queue_len(pair[1])))[1]

    def _score(self, prefix: Prefix, replica: RunningReplica) -> int:
        """Tokens that need no computing there, roughly: of the prefix, and of the images and videos
        behind it whose embeddings are there."""
        report = replica.routing_stats
        links, media = self._links(replica, report.get("links", b"")), report.get("media", {})
        held = [link for link in prefix.links if self._has(replica, link.hash, links)]
        last = held[-1] if held else None
        score = last.text_end // CHARACTERS + 1 if last else 0
        for index, digest in enumerate(prefix.media):
            is_in_prefix = last is not None and index < last.media_end
            if is_in_prefix or self._has(replica, digest, media):
                score += media.get(digest, MEDIA_TOKENS)
        return score

    def _has(self, replica: RunningReplica, key: bytes, held: Any) -> bool:
        if key in held:
            return True
        sent = self._sent.get(key, {}).get(replica.replica_id)
        return sent is not None and time.monotonic() - sent < SETTLE

    def _links(self, replica: RunningReplica, report: bytes) -> frozenset[bytes]:
        """Of a report; each is read once."""
        known = self._reports.get(replica.replica_id)
        if known is None or known[0] != report:
            known = self._reports[replica.replica_id] = report, links_in(report)
        return known[1]

    def _is_busy(self, best: RunningReplica, candidates: list[RunningReplica]) -> bool:
        idlest = min(self._queue_len(each) for each in candidates)
        return self._queue_len(best) - idlest > self.max_imbalance

    def _queue_len(self, replica: RunningReplica) -> int:
        """As this process knows it; Serve asks the replica itself where nothing is known."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _prefix(pending_request: PendingRequest | None) -> Prefix:
    if pending_request is None or not pending_request.args:
        return Prefix()
    call = pending_request.args[0]
    return call.prefix if isinstance(call, Call) else Prefix()
