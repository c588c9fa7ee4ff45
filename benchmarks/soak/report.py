"""What a soak found, and whether that is good enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .samples import Sample, growth

MAX_GROWTH = 0.3  # MB a minute
MAX_SHOWN = 20  # failures
# What an idle server may have more of than once settled: pools start threads and helpers when they
# are first needed. What is lost with each request is far more after an hour.
SLACK = {"processes": 1, "descriptors": 8, "threads": 4}


@dataclass(frozen=True)
class SoakReport:
    samples: tuple[Sample, ...]  # under load
    censuses: tuple[Sample, ...]  # of the idle server: once settled, ..., at the end
    counts: Counter[str]  # cases by name, and "failed KIND"
    failures: list[str]
    judged: tuple[float, float]  # seconds of the window whose slope counts
    exit_code: int | None  # of a server that ended by itself

    @property
    def growth(self) -> float:
        """MB a minute of `Sample.steady`, under load, after the warm-up."""
        return growth(self.samples, lambda sample: sample.steady, self.judged[0])

    def problems(self) -> list[str]:
        """What must not be; empty for a good run."""
        found = list(self._lost())
        if self.growth >= MAX_GROWTH:
            found.append(f"resident memory grows by {self.growth:.2f} MB/min")
        if self.exit_code is not None:
            found.append(f"the server ended with status {self.exit_code}")
        for kind in ("good", "bad", "leaving"):
            if number := self.counts[f"failed {kind}"]:
                found.append(f"{number} cases of kind {kind!r} failed")
        return found

    def _lost(self) -> Iterator[str]:
        """Compare the idle server once settled with the idle server at the end."""
        first, last = self.censuses[0], self.censuses[-1]
        for role in sorted({*first.roles, *last.roles}):
            pairs = {
                "processes": (first.count(role), last.count(role)),
                "descriptors": (first.num_descriptors(role), last.num_descriptors(role)),
                "threads": (first.num_threads(role), last.num_threads(role)),
            }
            for name, (before, after) in pairs.items():
                if after > before + SLACK[name]:
                    yield f"{role}: {after} {name}, and {before} once settled"
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
