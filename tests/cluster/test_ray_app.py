"""The application's arguments and settings; no cluster runs here."""

from __future__ import annotations

import dataclasses
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from loraretriever.cluster import ray_app
from loraretriever.config import ClusterSettings, load_cluster_settings, read_settings_file
from loraretriever.errors import InvalidInputError
from loraretriever.server.run import Plan

ROOT = Path(__file__).parents[2]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an application would be built of."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(ray_app, "build", lambda plan, cluster: seen.update(plan=plan, cluster=cluster))
    monkeypatch.delenv("LORARETRIEVER_POOL", raising=False)
    return seen


def deployments(app: Any) -> dict[str, Any]:
    ingress = app._bound_deployment
    engine = ingress.init_args[1]._bound_deployment
    return {ingress.name: ingress, engine.name: engine}


def test_arguments_come_before_the_environment_and_that_before_the_file(
    built: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.toml"
    file.write_text('pool = "p"\nk = 4\nslots = 5\nqueue = 6\n[server]\ndefault_tokens = 7\n[cluster]\nreplicas = 2\n')
    monkeypatch.setenv("LORARETRIEVER_CONFIG", str(file))
    monkeypatch.setenv("LORARETRIEVER_SLOTS", "8")
    monkeypatch.setenv("LORARETRIEVER_MAX_REPLICAS", "9")
    ray_app.app({"queue": "16", "affinity": "false"})  # as text, as they come from the command line
    plan, cluster = built["plan"], built["cluster"]
    assert plan.pool == str(tmp_path / "p")
    assert (plan.settings.k, plan.settings.slots, plan.settings.queue) == (4, 8, 16)
    assert plan.server.default_tokens == 7
    assert (cluster.replicas, cluster.max_replicas, cluster.affinity) == (2, 9, False)
    ray_app.app({"pool": "elsewhere"})
    assert built["plan"].pool == "elsewhere"


def test_what_is_wrong_is_said(built: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="LORARETRIEVER_POOL"):
        ray_app.app({})
    with pytest.raises(InvalidInputError, match="'colour'.*base_model.*replicas"):
        ray_app.app({"pool": "p", "colour": "red"})
    with pytest.raises(InvalidInputError, match="replicas is 'many'"):
        ray_app.app({"pool": "p", "replicas": "many"})
    with pytest.raises(InvalidInputError, match="max_replicas is 1; expected at least replicas, which is 2"):
        load_cluster_settings(replicas=2, max_replicas=1)
    (tmp_path / "a.toml").write_text("[cluster]\nreplica = 2\n")
    with pytest.raises(InvalidInputError, match="cluster.replica is no setting"):
        read_settings_file(tmp_path / "a.toml")


def test_there_are_as_many_replicas_as_the_settings_say(tmp_path: Path) -> None:
    app = ray_app.app({"pool": str(tmp_path), "replicas": 3, "replica_cpus": 2, "replica_gpus": 0.5, "ingresses": 2})
    found = deployments(app)
    assert found["Engine"].num_replicas == 3
    assert found["Engine"].ray_actor_options == {"num_cpus": 2, "num_gpus": 0.5}
    assert found["Ingress"].num_replicas == 2
    (plan, *_) = found["Ingress"].init_args
    assert isinstance(plan, Plan) and plan.shared is not None, "ingresses of one host add their figures up"
    assert found["Engine"].init_args[0].shared is None


def test_a_range_of_replicas_is_autoscaled(tmp_path: Path) -> None:
    app = ray_app.app({"pool": str(tmp_path), "replicas": 2, "max_replicas": 5, "batch_size": 12, "queue": 100})
    engine = deployments(app)["Engine"]
    scaling = engine._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 12)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s, scaling.look_back_period_s) == (30, 600, 30)
    assert (engine.max_ongoing_requests, engine.max_queued_requests) == (15, 100)
    args = {"max_replicas": 5, "target_requests": 4.5, "upscale_seconds": 5, "downscale_seconds": 20}
    scaling = deployments(ray_app.app({"pool": str(tmp_path), **args}))["Engine"]._deployment_config.autoscaling_config
    assert scaling.target_ongoing_requests == 4.5
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s, scaling.look_back_period_s) == (5, 20, 12)


def test_places_are_whole_for_replicas_run_in_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    app = ray_app.app(
        {"pool": "p", "base_model": "base", "encoder": "org/encoder", "routers": "r", "adapter_root": "a"}
    )
    plan = deployments(app)["Engine"].init_args[0]
    assert plan.pool == str(tmp_path / "p")
    assert (plan.settings.base_model, plan.settings.encoder) == (str(tmp_path / "base"), "org/encoder")
    assert (plan.settings.routers, plan.server.adapter_root) == ((tmp_path / "r",), tmp_path / "a")


def test_worker_processes_are_for_servers_without_ray(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="workers is 2"):
        ray_app.app({"pool": str(tmp_path), "workers": 2})


def test_the_example_is_what_ray_serve_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORARETRIEVER_POOL", raising=False)
    schema = ServeDeploySchema(**yaml.safe_load((ROOT / "examples" / "ray-serve.yaml").read_text(encoding="utf-8")))
    (application,) = schema.applications
    module, _, name = application.import_path.partition(":")
    assert getattr(import_module(module), name) is ray_app.app
    found = deployments(ray_app.app(application.args))
    assert {deployment.name for deployment in application.deployments} <= found.keys()


@pytest.mark.parametrize("field", dataclasses.fields(ClusterSettings), ids=lambda field: field.name)
def test_each_setting_is_explained_with_its_default(field: dataclasses.Field[Any]) -> None:
    text = (ROOT / "docs" / "ray.md").read_text(encoding="utf-8")
    default = getattr(ClusterSettings(), field.name)
    shown = f"{default}".lower().removesuffix(".0")
    row = re.search(rf"^\| `{field.name}` \| ([^|]+) \|", text, re.M)
    assert row and row[1] == shown
