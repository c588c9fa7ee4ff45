"""The application that Ray Serve runs: an ingress, and replicas that it routes to."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from .ingress import Ingress
from .replica import EngineReplica
from .router import PrefixRouter
from .settings import ReplicaSettings, read_settings

HEALTH_PERIOD = 2.0  # seconds
REPORT_PERIOD = 1.0  # seconds between two reports of what a replica holds
GRACE = 30.0  # seconds that running requests get when a replica is stopped
INGRESS_REQUESTS = 1000  # that one ingress has at once; it only passes them on


def app(args: dict[str, Any]) -> Application:
    """`args`: the fields of `ReplicaSettings` and of `octavo.AsyncLLM`. Raises `ConfigError`."""
    settings = read_settings(args)
    replicas = serve.deployment(EngineReplica, **_options(settings)).bind(
        settings.engine, settings.cpus_per_rank, settings.api_key_file
    )
    ingress = serve.deployment(
        Ingress,
        num_replicas=settings.num_ingress,
        max_ongoing_requests=INGRESS_REQUESTS,
        graceful_shutdown_timeout_s=GRACE,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(replicas, settings.api_key_file)


def _options(settings: ReplicaSettings) -> dict[str, Any]:
    """A replica's place, number and router.

    All its ranks' devices are in one bundle of its placement group: ranks of a group share a host,
    and Ray tells a replica by CUDA_VISIBLE_DEVICES, which its workers inherit, which GPUs are its.
    """
    cpus, gpus = settings.cpus_per_rank * settings.num_ranks, settings.num_gpus
    bundle = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    options: dict[str, Any] = {
        "name": "EngineReplica",
        "max_ongoing_requests": 2 * settings.max_num_seqs,  # more wait at the ingress
        "graceful_shutdown_timeout_s": GRACE,
        "health_check_period_s": HEALTH_PERIOD,
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus},
        "placement_group_bundles": [bundle],
        "placement_group_strategy": "STRICT_PACK",
        "request_router_config": RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={"max_imbalance": settings.max_imbalance},
            request_routing_stats_period_s=REPORT_PERIOD,
        ),
    }
    if settings.max_replicas > settings.min_replicas:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target,
        )
    else:
        options["num_replicas"] = settings.min_replicas
    return options
