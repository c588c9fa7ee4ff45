"""The Ray Serve application: an ingress that routes to replicas."""

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
REPORT_PERIOD = 1.0  # seconds between two cache reports of a replica
GRACE = 30.0  # seconds for running requests when a replica is stopped
INGRESS_REQUESTS = 1000  # concurrent requests per ingress, which only forwards them


def app(args: dict[str, Any]) -> Application:
    """Build the application. Raises `ConfigError`.

    `args`: fields of `ReplicaSettings` and settings of `octavo.AsyncLLM`.
    """
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
    """Return a replica's placement, scaling and router options.

    The devices of all ranks are in one bundle of its placement group, because ranks share a host.
    Ray assigns GPUs with CUDA_VISIBLE_DEVICES, which the workers inherit.
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
