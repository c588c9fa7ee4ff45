"""Settings of `serve run octavo.engine.replicas:app NAME=VALUE ...` and of a Serve config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config.engine_config import EngineConfig
from ..errors import ConfigError


@dataclass(frozen=True)
class ReplicaSettings:
    """Settings of the replicas. All other names are engine settings."""

    min_replicas: int = 1
    max_replicas: int = 1  # above `min_replicas`: autoscaling by load
    # Autoscaling target: running and waiting requests per replica. None: 0.75 * max_num_seqs.
    target_ongoing_requests: float | None = None
    cpus_per_rank: int = 1  # cores and threads of each rank
    # How many more requests than the least loaded replica one may get for its cached prefixes.
    max_imbalance: int = 8
    num_ingress: int = 1  # ingress processes
    api_key_file: Path | None = None  # as `octavo serve --api-key-file`; must exist on every node
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        return int(self.engine.get("tensor_parallel_size", 1))

    @property
    def num_gpus(self) -> int:
        """GPUs per replica: one per rank on CUDA."""
        return self.num_ranks if self.engine["device"] == "cuda" else 0

    @property
    def max_num_seqs(self) -> int:
        return int(self.engine.get("max_num_seqs", EngineConfig.max_num_seqs))

    @property
    def target(self) -> float:
        return self.target_ongoing_requests or max(1.0, 0.75 * self.max_num_seqs)


OWN = {each.name for each in fields(ReplicaSettings)} - {"engine"}
ENGINE = {each.name for each in fields(EngineConfig)} | {"hub"}
NOT_HERE = {
    "isolate_media": "is always on: clients are not trusted",
    "trace_file": "is not supported: replicas cannot share one file",
    "workers": "are not supported: ranks of a replica share a host; use `octavo serve` instead",
    "worker_tls": "is not supported: there are no remote workers",
}


def read_settings(args: Mapping[str, Any]) -> ReplicaSettings:
    """Read settings. Values may be strings from a command line. Raises `ConfigError`."""
    own: dict[str, Any] = {}
    # Default to the CPU: a replica that requests no GPU from Ray must not use one.
    engine: dict[str, Any] = {"device": "cpu", "allowed_media_paths": ()}
    for name, given in args.items():
        value = _value(given) if name != "model" else given
        if name in NOT_HERE:
            raise ConfigError(f"{name}: {NOT_HERE[name]}; remove it")
        if name in OWN:
            own[name] = Path(value) if name == "api_key_file" else value
        elif name in ENGINE:
            engine[name] = tuple(value) if isinstance(value, list) else value
        else:
            known = ", ".join(sorted((OWN | ENGINE) - NOT_HERE.keys()))
            raise ConfigError(f"{name}: unknown setting; allowed are {known}")
    if engine["device"] not in ("cpu", "cuda"):
        raise ConfigError(f"device={engine['device']!r}: must be cpu or cuda, to reserve it in Ray")
    settings = ReplicaSettings(**own, engine=engine)
    _check(settings)
    EngineConfig(**{name: value for name, value in engine.items() if name not in ("hub", "model")})
    return settings


def _check(settings: ReplicaSettings) -> None:
    for name in ("min_replicas", "max_replicas", "cpus_per_rank", "num_ingress", "max_imbalance"):
        value = getattr(settings, name)
        minimum = 0 if name == "max_imbalance" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigError(f"{name}={value!r}: must be an integer >= {minimum}")
    if settings.max_replicas < settings.min_replicas:
        text = f"must be at least min_replicas={settings.min_replicas}"
        raise ConfigError(f"max_replicas={settings.max_replicas}: {text}")
    target = settings.target_ongoing_requests
    if target is not None and (isinstance(target, str) or not 0 < target < float("inf")):
        raise ConfigError(f"target_ongoing_requests={target!r}: must be a number > 0")


def _value(given: Any) -> Any:
    """Parse command line values such as `4`, `0.5`, `true` and `["a.com"]` as JSON."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError:
        return given
