"""The manifests of docs/kubernetes and the config docs/replicas.yaml: the schemas' word on them and
our own commands' on what they are told."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml
from ray.serve.schema import ServeDeploySchema

from octavo.engine.cli import app
from octavo.engine.replicas.settings import read_settings

DOCS = Path(__file__).resolve().parent.parent / "docs"
VERSION = "1.33"
WORKLOADS = ("Deployment", "StatefulSet")


def read(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DOCS / "kubernetes" / name).read_text()))


def check(resource: dict[str, Any]) -> None:
    kubernetes_validate.validate(resource, VERSION, strict=True)


PLAIN = [each for name in ("serve.yaml", "group.yaml") for each in read(name)]
(RAY_SERVICE,) = read("rayservice.yaml")
PODS = [each["spec"]["template"]["spec"] for each in PLAIN if each["kind"] in WORKLOADS]


def name_of(resource: dict[str, Any]) -> str:
    return f"{resource['kind']}-{resource['metadata']['name']}"


@pytest.mark.parametrize("resource", PLAIN, ids=name_of)
def test_the_schema_takes_it(resource: dict[str, Any]) -> None:
    check(resource)


def test_the_schema_refuses_what_is_wrong() -> None:
    wrong = copy.deepcopy(PLAIN[0])
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenessprobe"):
        check(wrong)


def test_pods_of_the_ray_cluster_are_pods() -> None:
    """KubeRay's own schema is not in the package; of its resource these parts are Kubernetes'."""
    cluster = RAY_SERVICE["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len(groups) == 2
    for group in groups:
        spec = group["template"]["spec"]
        check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec})


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod["containers"][0]["name"])
def test_commands_know_their_options(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    program, name = container["command"]
    assert program == "octavo"
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    asked = command.make_context(name, list(container["args"])).params
    assert asked["model"].startswith("Qwen/Qwen2-VL-")
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for option in ("api_key_file", "tls", "worker_tls"):
        path = asked.get(option)
        assert path is None or any(str(path).startswith(mount) for mount in mounts), option
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for option, port in (("port", "grpc"), ("http_port", "http"), ("metrics_port", "metrics")):
        if port in ports:
            assert asked[option] == ports[port]
    if name == "worker":
        assert asked["listen"] == f"0.0.0.0:{ports['worker']}"


def test_parts_find_each_other() -> None:
    named = {
        mount["name"]
        for pod in PODS
        for each in pod["containers"]
        for mount in each["volumeMounts"]
    }
    assert named == {volume["name"] for pod in PODS for volume in pod["volumes"]}
    labels = [
        each["spec"]["template"]["metadata"]["labels"]
        for each in PLAIN
        if each["kind"] in WORKLOADS
    ]
    for service in (each for each in PLAIN if each["kind"] == "Service"):
        assert service["spec"]["selector"] in labels
    (workers,) = (each for each in PLAIN if each["kind"] == "StatefulSet")
    (engine,) = (pod for pod in PODS if pod["containers"][0]["name"] == "engine")
    name, service = workers["metadata"]["name"], workers["spec"]["serviceName"]
    addresses = [f"{name}-{rank}.{service}:7000" for rank in range(workers["spec"]["replicas"])]
    assert f"--workers={','.join(addresses)}" in engine["containers"][0]["args"]


@pytest.mark.parametrize(
    "text",
    [(DOCS / "replicas.yaml").read_text(), RAY_SERVICE["spec"]["serveConfigV2"]],
    ids=["replicas.yaml", "rayservice.yaml"],
)
def test_rays_schema_and_ours_take_the_serve_config(text: str) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(import_module(module), name))
    read_settings(application.args)
    for path in config.grpc_options.grpc_servicer_functions:
        module, _, name = path.rpartition(".")
        assert callable(getattr(import_module(module), name))
