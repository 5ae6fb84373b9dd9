"""The Helm chart: what it renders is valid for Kubernetes, hangs together, and says what the product knows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import typer
import yaml

from loraretriever.cli import app
from loraretriever.config import ServerSettings, Settings, load_server_settings, load_settings
from loraretriever.server import health

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "loraretriever"
STOP_SECONDS = 20  # that closing the models and the pool may take, beside what requests and jobs have
LEAST = {"baseModel": "org/model", "pool": {"secret": "pool"}}
VALUES: dict[str, dict[str, Any]] = {
    "least": LEAST,
    "all": {
        **LEAST,
        "storage": {"secret": "objects"},
        "hub": {"secret": "hub"},
        "serviceAccount": {"annotations": {"example.com/role": "reader"}},
        "gateway": {
            "autoscaling": {"enabled": False},
            "replicas": 3,
            "shutdownSeconds": 90,
            "settings": {"k": 2, "threshold": 0.5, "log_prompts": True, "otlp_endpoint": "http://collector:4318"},
            "service": {"type": "LoadBalancer", "port": 8080},
            "podAnnotations": {"example.com/scrape": "true"},
            "nodeSelector": {"pool": "cpu"},
            "tolerations": [{"key": "cpu", "operator": "Exists"}],
        },
        "vllm": {
            "replicas": 4,
            "gpus": 2,
            "settings": {"vllm_lanes": True, "vllm_names": 500},
            "apiKey": {"secret": "vllm"},
            "extraArgs": ["--max-model-len=8192"],
            "storageClass": "fast",
            "resources": {"requests": {"cpu": "8"}},
        },
        "networkPolicy": {"from": [{"namespaceSelector": {"matchLabels": {"team": "web"}}}]},
    },
    "open": {**LEAST, "networkPolicy": {"enabled": False}},
}
# Kubernetes' oldest version of Chart.yaml's range, and the newest one that there are schemas for.
VERSIONS = ("1.30", kubernetes_validate.latest_version().rpartition(".")[0])


def render(values: Mapping[str, Any], release: str = "demo") -> list[dict[str, Any]]:
    with helm.Chart.load(str(CHART)) as chart:
        rendered = chart.render(dict(values), name=release, namespace="prod")
    texts = (text for file, text in rendered.items() if file.endswith(".yaml"))
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


@pytest.fixture(scope="module", params=VALUES)
def documents(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render(VALUES[request.param])


@pytest.fixture(scope="module")
def full() -> list[dict[str, Any]]:
    return render(VALUES["all"])


def one(documents: list[dict[str, Any]], kind: str, end: str = "") -> dict[str, Any]:
    (found,) = (each for each in documents if each["kind"] == kind and each["metadata"]["name"].endswith(end))
    return found


def workloads(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one(documents, "Deployment", "-gateway"), one(documents, "StatefulSet", "-vllm")]


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = workload["spec"]["template"]["spec"]
    return pod


def container_of(workload: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod_of(workload)["containers"]
    found: dict[str, Any] = container
    return found


def env_of(workload: dict[str, Any]) -> dict[str, dict[str, Any]]:
    names = [each["name"] for each in container_of(workload)["env"]]
    assert len(set(names)) == len(names), "a variable is set twice"
    return {each["name"]: each for each in container_of(workload)["env"]}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_rendered_is_valid(documents: list[dict[str, Any]], version: str) -> None:
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
    names = [(each["kind"], each["metadata"]["name"]) for each in documents]
    assert len(set(names)) == len(names)


def test_the_validator_refuses_what_is_no_field(full: list[dict[str, Any]]) -> None:
    broken = {**one(full, "Deployment"), "replica": 3}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


def test_helm_finds_no_errors() -> None:
    assert helm.lint(str(CHART))["errors"] == []


@pytest.mark.parametrize(
    ("values", "message"),
    (
        ({**LEAST, "baseModel": ""}, "baseModel is missing"),
        ({**LEAST, "pool": {"secret": ""}}, "pool.secret is missing"),
        ({**LEAST, "gatway": {}}, "gatway"),
        ({**LEAST, "vllm": {"replicas": 0}}, "replicas"),
        ({**LEAST, "gateway": {"settings": {"Log-Format": "json"}}}, "Log-Format"),
    ),
)
def test_values_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm.HelmError, match=message):
        render(values)


def test_the_default_values_are_all_in_the_schema() -> None:
    with helm.Chart.load(str(CHART)) as chart:
        properties = yaml.safe_load((CHART / "values.schema.json").read_text(encoding="utf-8"))["properties"]
        assert chart.values.keys() <= properties.keys()
        for part in ("gateway", "vllm"):
            assert chart.values[part].keys() == properties[part]["properties"].keys()


# What the product knows


@pytest.mark.parametrize("variant", VALUES)
def test_the_gateways_arguments_and_variables_are_settings(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = one(render(VALUES[variant]), "Deployment")
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    name, *options = container_of(gateway)["args"]
    assert name == "serve"
    assert {option.partition("=")[0] for option in options} <= known
    for name in list(os.environ):
        if name.startswith("LORARETRIEVER_"):
            monkeypatch.delenv(name)
    for name, variable in env_of(gateway).items():
        monkeypatch.setenv(name, variable.get("value", "secret"))
    engine, server = load_settings(), load_server_settings()  # a name that is no setting is an error
    for field, value in VALUES[variant].get("gateway", {}).get("settings", {}).items():
        assert getattr(engine if hasattr(engine, field) else server, field) == value
    assert engine.vllm_key == ("secret" if "apiKey" in VALUES[variant].get("vllm", {}) else None)


def test_all_variables_are_known(full: list[dict[str, Any]]) -> None:
    fields = {
        f"LORARETRIEVER_{f.name.upper()}" for kind in (Settings, ServerSettings) for f in dataclasses.fields(kind)
    }
    for workload in workloads(full):
        ours = {name for name in env_of(workload) if name.startswith("LORARETRIEVER_")}
        assert ours <= fields | {"LORARETRIEVER_POOL", "LORARETRIEVER_CACHE"}


def test_vllm_loads_the_plug_in(full: list[dict[str, Any]]) -> None:
    env = env_of(one(full, "StatefulSet"))
    pyproject = (CHART.parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'[project.entry-points."vllm.general_plugins"]\n{env["VLLM_PLUGINS"]["value"]} =' in pyproject
    assert env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"]["value"] == "True"
    assert {"LORARETRIEVER_POOL", "LORARETRIEVER_VLLM_LANES", "LORARETRIEVER_VLLM_NAMES"} <= env.keys()


def test_probes_ask_what_is_there(documents: list[dict[str, Any]]) -> None:
    paths = {route.path for route in health.router.routes}  # type: ignore[attr-defined]
    gateway, vllm = (container_of(workload) for workload in workloads(documents))
    assert gateway["livenessProbe"]["httpGet"]["path"] == "/health"
    assert gateway["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert {"/health", "/ready"} <= paths
    for container in (gateway, vllm):
        (port,) = container["ports"]
        assert f"--port={port['containerPort']}" in container["args"]
        for probe in ("livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] == port["name"]
    assert vllm["startupProbe"]["failureThreshold"] * vllm["startupProbe"]["periodSeconds"] == 1800


def test_pods_have_the_time_that_they_need_to_stop(documents: list[dict[str, Any]]) -> None:
    gateway, vllm = workloads(documents)
    seconds = float(env_of(gateway)["LORARETRIEVER_SHUTDOWN_SECONDS"]["value"])
    before = container_of(gateway)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod_of(gateway)["terminationGracePeriodSeconds"] >= before + 2 * seconds + STOP_SECONDS
    (own,) = (arg for arg in container_of(vllm)["args"] if arg.startswith("--shutdown-timeout="))
    assert pod_of(vllm)["terminationGracePeriodSeconds"] > int(own.partition("=")[2])


# How it hangs together


def test_gateways_know_each_server_by_its_name(documents: list[dict[str, Any]]) -> None:
    gateway, vllm = workloads(documents)
    service = one(documents, "Service", "-vllm")
    assert service["spec"]["clusterIP"] == "None"
    assert vllm["spec"]["serviceName"] == service["metadata"]["name"]
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    urls = [arg.partition("=")[2] for arg in container_of(gateway)["args"] if arg.startswith("--vllm-url=")]
    assert urls == [f"http://{name}-{number}.{name}:{port}" for number in range(vllm["spec"]["replicas"])]


def selectors(documents: list[dict[str, Any]]) -> Iterator[tuple[str, Mapping[str, str]]]:
    for document in documents:
        name, spec = document["metadata"]["name"], document.get("spec", {})
        match document["kind"]:
            case "Service":
                yield name, spec["selector"]
            case "PodDisruptionBudget" | "Deployment" | "StatefulSet":
                yield name, spec["selector"]["matchLabels"]
            case "NetworkPolicy":
                yield name, spec["podSelector"]["matchLabels"]


def test_each_selector_finds_the_pods_of_its_name_alone(documents: list[dict[str, Any]]) -> None:
    labels = {each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"] for each in workloads(documents)}
    found = list(selectors(documents))
    assert len(found) >= 6
    for name, selector in found:
        assert [pods for pods, own in labels.items() if selector.items() <= own.items()] == [name]


def test_servers_let_gateways_in_and_nobody_else(full: list[dict[str, Any]]) -> None:
    gateway = one(full, "Deployment")["spec"]["template"]["metadata"]["labels"]
    (rule,) = one(full, "NetworkPolicy", "-vllm")["spec"]["ingress"]
    (peer,) = rule["from"]
    assert peer["podSelector"]["matchLabels"].items() <= gateway.items()
    assert (
        one(full, "NetworkPolicy", "-gateway")["spec"]["ingress"][0]["from"] == VALUES["all"]["networkPolicy"]["from"]
    )


def test_the_autoscaler_has_the_replicas_to_itself() -> None:
    scaled, fixed = render(LEAST), render(VALUES["all"])
    autoscaler = one(scaled, "HorizontalPodAutoscaler")["spec"]
    assert autoscaler["scaleTargetRef"]["name"] == one(scaled, "Deployment")["metadata"]["name"]
    assert "replicas" not in one(scaled, "Deployment")["spec"]
    assert one(fixed, "Deployment")["spec"]["replicas"] == 3
    assert not [each for each in fixed if each["kind"] == "HorizontalPodAutoscaler"]


def test_servers_get_gpus_beside_their_own_limits() -> None:
    for values, gpus, limits in ((LEAST, 1, {"memory": "64Gi"}), (VALUES["all"], 2, {"memory": "64Gi"})):
        server = container_of(one(render(values), "StatefulSet"))
        assert server["resources"]["limits"] == {"nvidia.com/gpu": gpus, **limits}
        assert server["resources"]["requests"]["memory"] == "32Gi"
        assert f"--tensor-parallel-size={gpus}" in server["args"]


# Security


def test_pods_have_no_rights_that_they_do_not_need(documents: list[dict[str, Any]]) -> None:
    account = one(documents, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    for workload in workloads(documents):
        pod, container = pod_of(workload), container_of(workload)
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False, "variables of services would be taken for settings"
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        writable = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/cache", "/tmp"} <= writable
        env = env_of(workload)
        for name in ("LORARETRIEVER_CACHE", "HF_HOME", "HOME"):
            assert env[name]["value"].startswith("/cache")


def test_the_gateways_user_is_that_of_the_image(full: list[dict[str, Any]]) -> None:
    dockerfile = (CHART.parents[2] / "Dockerfile").read_text(encoding="utf-8")
    assert f"USER {pod_of(one(full, 'Deployment'))['securityContext']['runAsUser']}\n" in dockerfile


def test_secrets_are_named_and_never_written(full: list[dict[str, Any]]) -> None:
    assert not [each for each in full if each["kind"] == "Secret"]
    for workload in workloads(full):
        env = env_of(workload)
        named = {name: each["valueFrom"]["secretKeyRef"]["name"] for name, each in env.items() if "valueFrom" in each}
        assert named.pop("LORARETRIEVER_POOL") == "pool"
        assert named.pop("HF_TOKEN") == "hub"
        assert list(named.values()) == ["vllm"]
        assert container_of(workload)["envFrom"] == [{"secretRef": {"name": "objects"}}]
