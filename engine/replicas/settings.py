"""What `serve run octavo.engine.replicas:app NAME=VALUE ...` and a Serve config's `args` say."""

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
    """How many replicas, and what each is given. All other names are the engine's."""

    min_replicas: int = 1
    max_replicas: int = 1  # more than `min_replicas`: by the load
    target_ongoing_requests: float | None = None  # of a replica, running and waiting: what scaling
    # aims at; None: three quarters of max_num_seqs
    cpus_per_rank: int = 1  # each rank's cores, and its threads
    max_imbalance: int = 8  # requests beyond the idlest replica's that one may have for what it
    # holds of their prompts
    num_ingress: int = 1  # processes that take requests in
    api_key_file: Path | None = None  # as `octavo serve --api-key-file`, on every node
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        return int(self.engine.get("tensor_parallel_size", 1))

    @property
    def num_gpus(self) -> int:
        """Of a replica: one a rank, on CUDA."""
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
    "isolate_media": "always on: callers are from outside",
    "trace_file": "one file for many replicas would be nobody's",
    "workers": "a replica's ranks share a host; a group of several machines is an `octavo serve`'s",
    "worker_tls": "there are no workers of other machines here",
}


def read_settings(args: Mapping[str, Any]) -> ReplicaSettings:
    """Values may be texts, as the command line has them. Raises `ConfigError`."""
    own: dict[str, Any] = {}
    # On a device of its own: a replica that asks Ray for no GPU must not take one.
    engine: dict[str, Any] = {"device": "cpu", "allowed_media_paths": ()}
    for name, given in args.items():
        value = _value(given) if name != "model" else given
        if name in NOT_HERE:
            raise ConfigError(f"{name}: {NOT_HERE[name]}; leave it out")
        if name in OWN:
            own[name] = Path(value) if name == "api_key_file" else value
        elif name in ENGINE:
            engine[name] = tuple(value) if isinstance(value, list) else value
        else:
            known = ", ".join(sorted((OWN | ENGINE) - NOT_HERE.keys()))
            raise ConfigError(f"{name}: unknown; settings are {known}")
    if engine["device"] not in ("cpu", "cuda"):
        raise ConfigError(f"device={engine['device']!r}: say cpu or cuda; Ray is asked for as many")
    settings = ReplicaSettings(**own, engine=engine)
    _check(settings)
    EngineConfig(**{name: value for name, value in engine.items() if name not in ("hub", "model")})
    return settings


def _check(settings: ReplicaSettings) -> None:
    for name in ("min_replicas", "max_replicas", "cpus_per_rank", "num_ingress", "max_imbalance"):
        value = getattr(settings, name)
        least = 0 if name == "max_imbalance" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name}={value!r}: must be a whole number from {least} on")
    if settings.max_replicas < settings.min_replicas:
        text = f"must be at least min_replicas={settings.min_replicas}"
        raise ConfigError(f"max_replicas={settings.max_replicas}: {text}")
    target = settings.target_ongoing_requests
    if target is not None and (isinstance(target, str) or not 0 < target < float("inf")):
        raise ConfigError(f"target_ongoing_requests={target!r}: must be a number over 0")


def _value(given: Any) -> Any:
    """`4`, `0.5`, `true` and `["a.com"]` of a command line as what they are."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError:
        return given
