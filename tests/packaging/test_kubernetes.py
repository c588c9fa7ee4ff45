"""The manifests of docs/kubernetes and the config docs/replicas.yaml: the schemas' word on them and
our own commands' on what they are told."""

from __future__ import annotations

import copy
import re
import subprocess
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
import kubernetes_validate
import pytest
import typer.main
import yaml
from ray.serve.schema import ServeDeploySchema

from octavo.engine.cli.main import app
from octavo.engine.config.engine_config import EngineConfig
from octavo.engine.errors import ConfigError
from octavo.engine.replicas.settings import read_settings
from octavo.engine.utils.tls import group_tls
from octavo.engine.worker.remote import join
from octavo.proto import worker_pb2 as worker_pb
from octavo.proto import worker_pb2_grpc

DOCS = Path(__file__).resolve().parents[2] / "docs"
VERSION = "1.33"
WORKLOADS = ("Deployment", "StatefulSet")


def read(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DOCS / "kubernetes" / name).read_text()))


def check(resource: dict[str, Any]) -> None:
    kubernetes_validate.validate(resource, VERSION, strict=True)


RAY_SERVICE, RAY_POLICY = read("rayservice.yaml")
PLAIN = [*(each for name in ("serve.yaml", "group.yaml") for each in read(name)), RAY_POLICY]
RAY_GROUPS = [
    RAY_SERVICE["spec"]["rayClusterConfig"]["headGroupSpec"],
    *RAY_SERVICE["spec"]["rayClusterConfig"]["workerGroupSpecs"],
]
PODS = [each["spec"]["template"]["spec"] for each in PLAIN if each["kind"] in WORKLOADS]


def name_of(resource: dict[str, Any]) -> str:
    return f"{resource['kind']}-{resource['metadata']['name']}"


@pytest.mark.parametrize("resource", PLAIN, ids=name_of)
def test_the_schema_takes_it(resource: dict[str, Any]) -> None:
    check(resource)


def test_the_schema_rejects_what_is_wrong() -> None:
    wrong = copy.deepcopy(PLAIN[0])
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenessprobe"):
        check(wrong)


def test_pods_of_the_ray_cluster_are_pods() -> None:
    """KubeRay's own schema is not in the package; of its resource these parts are Kubernetes'."""
    assert len(RAY_GROUPS) == 2
    for group in RAY_GROUPS:
        pod = copy.deepcopy(group["template"])
        pod["metadata"]["name"] = "a"
        (mount,) = _container(group)["volumeMounts"]
        assert mount["mountPath"] == "/keys"  # any node may have an ingress or a replica
        check({"apiVersion": "v1", "kind": "Pod", **pod})


def test_rays_own_ports_are_closed_to_strangers() -> None:
    """Whoever reaches them runs code. A token is asked for, and only the cluster's own pods reach
    them, and the operator the dashboard's."""
    assert RAY_SERVICE["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    (labels,) = {tuple(each["template"]["metadata"]["labels"].items()) for each in RAY_GROUPS}
    cluster = {"podSelector": {"matchLabels": dict(labels)}}
    assert RAY_POLICY["spec"]["podSelector"] == cluster["podSelector"]
    assert RAY_POLICY["spec"]["policyTypes"] == ["Ingress"]
    within, operator, anyone = RAY_POLICY["spec"]["ingress"]
    assert within == {"from": [cluster]}
    assert operator["from"][0]["podSelector"]["matchLabels"]
    assert operator["ports"] == [{"port": 8265}]
    served = {port["containerPort"] for port in _container(RAY_GROUPS[1])["ports"]}
    assert anyone == {"ports": [{"port": port} for port in sorted(served)]}


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (found,) = group["template"]["spec"]["containers"]
    return found


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


def _workers() -> list[str]:
    """The hosts that group.yaml's engine calls."""
    (engine,) = (pod for pod in PODS if pod["containers"][0]["name"] == "engine")
    (told,) = (each for each in engine["containers"][0]["args"] if each.startswith("--workers="))
    return [each.partition(":")[0] for each in told.removeprefix("--workers=").split(",")]


def _certificate(folder: Path, names: str) -> Path:
    """A CA, and one that it signed; `names` as openssl takes them."""
    script = f"""
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 \\
  -subj "/CN=octavo group" -keyout ca.key -out ca.crt
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=worker" \\
  -keyout tls.key -out worker.csr
printf "{names}" > worker.ext
openssl x509 -req -in worker.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 1 \\
  -extfile worker.ext -out tls.crt
"""
    subprocess.run(["bash", "-e", "-c", script], cwd=folder, check=True, capture_output=True)
    return folder


class _Membership(worker_pb2_grpc.MembershipServicer):
    def Join(self, request: Any, context: Any) -> worker_pb.JoinReply:
        return worker_pb.JoinReply(fingerprint="same")


@contextmanager
def _worker(tls: Path) -> Iterator[str]:
    cert, key, ca = group_tls(tls).read()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    worker_pb2_grpc.add_MembershipServicer_to_server(_Membership(), server)  # type: ignore[no-untyped-call]
    credentials = grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def _join(tls: Path, host: str) -> None:
    """As an engine does for which `host` is this machine's name."""
    with pytest.MonkeyPatch.context() as patch, _worker(tls) as address:
        patch.setattr(join, "OPTIONS", [*join.OPTIONS, ("grpc.default_authority", host)])
        patch.setattr(join, "fingerprint", lambda model: "same")
        patch.setattr(join, "JOIN_TIMEOUT", 20.0)
        config = EngineConfig(workers=(address,), worker_tls=tls)
        join.RemoteWorkers(config, "engine", 1).join(True, threading.Event())


def test_the_certificate_of_the_group_serves_by_the_names_that_the_engine_calls(
    tmp_path: Path,
) -> None:
    (names,) = re.findall(r"subjectAltName=\S+", (DOCS / "kubernetes" / "group.yaml").read_text())
    tls, hosts = _certificate(tmp_path, names), _workers()
    assert len(hosts) == 2
    for host in hosts:
        _join(tls, host)


def test_a_certificate_that_gRPC_takes_for_no_call_is_reported_at_once(
    tmp_path: Path,
) -> None:
    """TLS itself takes this wildcard, and each call is then refused."""
    tls = _certificate(tmp_path, "subjectAltName=DNS:*.octavo-worker")
    told = r"worker of rank 0 \(127.0.0.1:\d+\): TLS: its certificate does not contain the host"
    with pytest.raises(ConfigError, match=told):
        _join(tls, _workers()[0])


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
    settings = read_settings(application.args)
    if config.grpc_options.grpc_servicer_functions:  # Ray opens that port to the whole network
        assert settings.api_key_file is not None
    for path in config.grpc_options.grpc_servicer_functions:
        module, _, name = path.rpartition(".")
        assert callable(getattr(import_module(module), name))
