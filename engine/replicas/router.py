"""Prefix-aware routing: send a request to the replica that has cached most of its prompt.

A replica with too many requests is skipped. Ray Serve creates a router in every process that has a
handle of the deployment.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .calls import Call
from .held import links_in
from .prefix import Prefix

MAX_SENT = 1 << 16  # remembered hashes of routed requests
# Seconds in which a routed prefix counts as cached, whatever the replica reports: the request may
# be waiting, and reports may be that old.
ROUTE_TTL = 10.0
MEDIA_TOKENS = 256  # assumed for an image or video of unknown size
CHARACTERS = 4  # assumed per token of text
MIN_CACHED = 16  # cached tokens worth routing for: one block


class PrefixRouter(RequestRouter):
    """Request router that prefers replicas with cached prefixes.

    `max_imbalance`: how many more requests than the least loaded replica one may have if it has
    cached the whole prompt; proportionally fewer if it has cached a part.
    """

    def initialize_state(self, max_imbalance: int = 8) -> None:
        self.max_imbalance = max_imbalance
        self._sent: OrderedDict[bytes, dict[ReplicaID, float]] = (
            OrderedDict()
        )  # hash -> replica -> time of routing
        self._reports: dict[
            ReplicaID, tuple[bytes, frozenset[bytes]]
        ] = {}  # last report, as bytes and parsed

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the best replica, then two random ones.

        Serve picks the least loaded replica of a list, and tries the next list if all are full.
        """
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # all replicas were candidates
        others = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        best = self._best(candidate_replicas, _prefix(pending_request))
        return [others] if best is None else [[best], others]

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

    def _best(self, candidates: list[RunningReplica], prefix: Prefix) -> RunningReplica | None:
        """Return the replica with most cached tokens, or None; the less loaded one if equal.

        None if less than a block is cached, or if its load exceeds `max_imbalance`.
        """
        if not prefix.links or not candidates:
            return None
        scores = [(self._score(prefix, each), -self._queue_len(each)) for each in candidates]
        at = max(range(len(scores)), key=scores.__getitem__)
        score, queue_len = scores[at][0], -scores[at][1]
        idlest = -max(negative for _, negative in scores)
        share = min(1.0, score / _num_tokens(prefix))
        is_busy = queue_len - idlest > self.max_imbalance * share
        return None if score < MIN_CACHED or is_busy else candidates[at]

    def _score(self, prefix: Prefix, replica: RunningReplica) -> int:
        """Estimate the cached tokens of a prompt on a replica.

        Counts the prefix, and media after it whose embeddings are cached.
        """
        report = replica.routing_stats
        links, media = self._links(replica, report.get("links", b"")), report.get("media", {})
        held = [link for link in prefix.links if self._has(replica, link.hash, links)]
        last = held[-1] if held else None
        score = last.text_end // CHARACTERS if last else 0
        for index, digest in enumerate(prefix.media):
            is_in_prefix = last is not None and index < last.media_end
            if is_in_prefix or self._has(replica, digest, media):
                score += media.get(digest, MEDIA_TOKENS)
        return score

    def _has(self, replica: RunningReplica, key: bytes, held: Any) -> bool:
        if key in held:
            return True
        sent = self._sent.get(key, {}).get(replica.replica_id)
        return sent is not None and time.monotonic() - sent < ROUTE_TTL

    def _links(self, replica: RunningReplica, report: bytes) -> frozenset[bytes]:
        """Return the hashes of a report, parsing each report once."""
        known = self._reports.get(replica.replica_id)
        if known is None or known[0] != report:
            known = self._reports[replica.replica_id] = report, links_in(report)
        return known[1]

    def _queue_len(self, replica: RunningReplica) -> int:
        """Return the cached queue length, or 0. If unknown, Serve asks the replica itself."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _prefix(pending_request: PendingRequest | None) -> Prefix:
    if pending_request is None or not pending_request.args:
        return Prefix()
    call = pending_request.args[0]
    return call.prefix if isinstance(call, Call) else Prefix()


def _num_tokens(prefix: Prefix) -> int:
    """Estimate the tokens of a prompt; at least `MIN_CACHED`."""
    return max(MIN_CACHED, prefix.num_characters // CHARACTERS + MEDIA_TOKENS * len(prefix.media))
