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
ROUTE_TTL = 10.0  # seconds in which what was sent counts as held, whatever the replica reports: its
# prompt may wait, and reports are that old
MEDIA_TOKENS = 256  # taken for an image or video that no replica has told the size of
CHARACTERS = 4  # of text for a token
LEAST = 16  # tokens held that are worth going there for: a block


class PrefixRouter(RequestRouter):
    """`max_imbalance`: requests that a replica which holds a whole prompt may have beyond the
    idlest one; one that holds half of it, half as many."""

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
        """The one that holds most; of equals the idler one. None where that is less than a block,
        or has more requests than what it holds is worth waiting for."""
        if not prefix.links or not candidates:
            return None
        scores = [(self._score(prefix, each), -self._queue_len(each)) for each in candidates]
        at = max(range(len(scores)), key=scores.__getitem__)
        score, queue_len = scores[at][0], -scores[at][1]
        idlest = -max(negative for _, negative in scores)
        share = min(1.0, score / _num_tokens(prefix))
        is_busy = queue_len - idlest > self.max_imbalance * share
        return None if score < LEAST or is_busy else candidates[at]

    def _score(self, prefix: Prefix, replica: RunningReplica) -> int:
        """Tokens that need no computing there, roughly: of the prefix, and of the images and videos
        behind it whose embeddings are there."""
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
        """Of a report; each is read once."""
        known = self._reports.get(replica.replica_id)
        if known is None or known[0] != report:
            known = self._reports[replica.replica_id] = report, links_in(report)
        return known[1]

    def _queue_len(self, replica: RunningReplica) -> int:
        """As this process knows it; Serve asks the replica itself where nothing is known."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _prefix(pending_request: PendingRequest | None) -> Prefix:
    if pending_request is None or not pending_request.args:
        return Prefix()
    call = pending_request.args[0]
    return call.prefix if isinstance(call, Call) else Prefix()


def _num_tokens(prefix: Prefix) -> int:
    """Of the prompt, roughly; never 0."""
    return max(LEAST, prefix.num_characters // CHARACTERS + MEDIA_TOKENS * len(prefix.media))
