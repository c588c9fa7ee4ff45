"""Results of a soak and the checks that they must pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .samples import Sample, growth

MAX_GROWTH = 0.3  # MB per minute
MAX_SHOWN = 20  # failures printed
# Allowed increase of an idle server since it settled: pools start threads and helpers on first use.
# A leak per request is far larger after an hour.
SLACK = {"processes": 1, "descriptors": 8, "threads": 4}


@dataclass(frozen=True)
class SoakReport:
    samples: tuple[Sample, ...]  # under load
    censuses: tuple[Sample, ...]  # of the idle server, from once settled to the end
    counts: Counter[str]  # cases by name, and "failed KIND"
    failures: list[str]
    judged: tuple[float, float]  # window in which growth is measured, in seconds
    exit_code: int | None  # set if the server exited by itself

    @property
    def growth(self) -> float:
        """Growth of `Sample.steady` under load after the warm-up, in MB per minute."""
        return growth(self.samples, lambda sample: sample.steady, self.judged[0])

    def problems(self) -> list[str]:
        """Return the failed checks; empty for a good run."""
        found = list(self._lost())
        if self.growth >= MAX_GROWTH:
            found.append(f"resident memory grows by {self.growth:.2f} MB/min")
        if self.exit_code is not None:
            found.append(f"the server exited with status {self.exit_code}")
        for kind in ("good", "bad", "leaving"):
            if number := self.counts[f"failed {kind}"]:
                found.append(f"{number} cases of kind {kind!r} failed")
        return found

    def _lost(self) -> Iterator[str]:
        """Compare the idle server at the end with the idle server once settled."""
        first, last = self.censuses[0], self.censuses[-1]
        for role in sorted({*first.roles, *last.roles}):
            pairs = {
                "processes": (first.count(role), last.count(role)),
                "descriptors": (first.num_descriptors(role), last.num_descriptors(role)),
                "threads": (first.num_threads(role), last.num_threads(role)),
            }
            for name, (before, after) in pairs.items():
                if after > before + SLACK[name]:
                    yield f"{role}: {after} {name}, up from {before} once settled"
        for name in (
            'octavo_kv_cache_blocks{state="used"}',
            'octavo_encoder_cache_tokens{state="held"}',
        ):
            if last.metrics.get(name):
                yield f"{name} is {last.metrics[name]:.0f} on the idle server"

    def as_dict(self) -> dict[str, Any]:
        return {
            "growth_mb_per_minute": self.growth,
            "growth_by_role": {role: self._growth_of(role) for role in self._roles},
            "counts": dict(self.counts),
            "failures": self.failures,
            "problems": self.problems(),
            "samples": [each.as_dict() for each in self.samples],
            "censuses": [each.as_dict() for each in self.censuses],
        }

    @property
    def _roles(self) -> list[str]:
        return sorted({role for each in self.samples for role in each.roles})

    def _growth_of(self, role: str) -> float:
        return growth(self.samples, lambda sample: sample.resident(role), self.judged[0])

    def as_text(self) -> str:
        begin, end = (seconds / 60 for seconds in self.judged)
        lines = [f"resident memory, minutes {begin:.0f} to {end:.0f}: {self.growth:+.3f} MB/min"]
        lines += [f"  {role}: {self._growth_of(role):+.3f} MB/min" for role in self._roles]
        for census in self.censuses:
            parts = [
                f"{census.count(role)} {role} ({census.resident(role) / 1e6:.1f} MB, "
                f"{census.num_descriptors(role)} descriptors, {census.num_threads(role)} threads)"
                for role in census.roles
            ]
            lines.append(f"idle at minute {census.at / 60:.1f}: {'; '.join(parts)}")
        lines.append(
            "cases: " + ", ".join(f"{n} {name}" for name, n in sorted(self.counts.items()))
        )
        lines += [f"failure: {text}" for text in self.failures[:MAX_SHOWN]]
        lines += [f"PROBLEM: {text}" for text in self.problems()] or ["no problem found"]
        return "\n".join(lines)
