"""The application for Ray Serve: `serve run loraretriever.cluster.ray_app:app pool=DIR`."""

from __future__ import annotations

import dataclasses
import math
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraretriever.config import (
    ClusterSettings,
    ServerSettings,
    Settings,
    load_cluster_settings,
    load_server_settings,
    load_settings,
    named_by_environment,
    read_settings_file,
)
from loraretriever.errors import InvalidInputError, require_extra
from loraretriever.server.run import Plan

with require_extra("ray"):
    from ray import serve
    from ray.serve import Application, Deployment
    from ray.serve.config import AutoscalingConfig

from loraretriever.cluster.ingress import Ingress
from loraretriever.cluster.replica import EngineReplica

_INGRESS_REQUESTS = 4096  # that one ingress handles at once
_ROOM = 1.25  # requests at a replica per row of its batch: the next ones are there when rows become free
_HEALTH_SECONDS, _HEALTH_TIMEOUT = 10.0, 30.0
_LEAST_LOOK_BACK, _LOOK_BACK = 12.0, 30.0  # seconds that autoscaling looks back; Ray Serve wants above 10, and takes 30
_CLOSE_SECONDS = 10.0  # beyond what requests have, for the pool to be closed


def app(args: Mapping[str, Any]) -> Application:
    """What Ray Serve runs.

    Args:
        args: `pool`, `config` (a TOML file), and fields of `Settings`, `ServerSettings` and `ClusterSettings`. They
            come before the environment, and that before the file.

    Raises:
        InvalidInputError: no pool is named, a setting is unknown or out of range, or there are `workers`.
    """
    given = dict(args)
    path = given.pop("config", None) or named_by_environment("CONFIG")
    file = None if path is None else read_settings_file(Path(path))
    pool = given.pop("pool", None) or named_by_environment("POOL") or (file and file.pool)
    if not pool:
        raise InvalidInputError(
            'no pool is named; expected the argument pool=DIR, LORARETRIEVER_POOL in the environment, or pool = "DIR" '
            "at the beginning of the file that config names."
        )
    kinds = Settings, ServerSettings, ClusterSettings
    parts = [{name: given.pop(name) for name in _names(kind) if name in given} for kind in kinds]
    if given:
        raise InvalidInputError(
            f"the application got {min(given)!r}, which is no setting; expected pool, config or one of "
            f"{', '.join(name for kind in kinds for name in _names(kind))}."
        )
    settings, server, cluster = parts
    plan = Plan(str(pool), load_settings(file, **settings), load_server_settings(file, **server))
    return build(plan, load_cluster_settings(file, **cluster))


def build(plan: Plan, cluster: ClusterSettings) -> Application:
    """The application of these settings.

    Raises:
        InvalidInputError: the server is to have several worker processes, which Ray has in its own way.
    """
    if plan.server.workers != 1:
        raise InvalidInputError(
            f"workers is {plan.server.workers}; expected 1 on a cluster, where ingresses and replicas take their place."
        )
    plan = _absolute(plan)
    engine = _engine(plan, cluster).bind(plan, plan.settings.slots)
    if cluster.ingresses > 1:  # those of one host share a folder for their figures, and a file for the limits of keys
        plan = replace(plan, shared=Path(tempfile.gettempdir()) / f"loraretriever-figures-{secrets.token_hex(8)}")
    return _ingress(plan, cluster).bind(plan, engine, cluster.affinity)


def _absolute(plan: Plan) -> Plan:
    """The plan with whole paths: replicas may run in other folders."""
    settings, server = plan.settings, plan.server
    models: dict[str, Any] = {
        name: str(Path(value).absolute())
        for name in ("base_model", "encoder")
        if (value := getattr(settings, name)) is not None and Path(value).is_dir()
    }
    routers = tuple(folder.absolute() for folder in settings.routers)
    root = None if server.adapter_root is None else server.adapter_root.absolute()
    pool = plan.pool if "://" in plan.pool else str(Path(plan.pool).absolute())
    settings = replace(settings, **models, routers=routers)
    return replace(plan, pool=pool, settings=settings, server=replace(server, adapter_root=root))


def _names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _engine(plan: Plan, cluster: ClusterSettings) -> Deployment:
    settings = plan.settings
    room = math.ceil(_ROOM * settings.batch_size)
    number: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.max_replicas is not None:
        target = cluster.target_requests or settings.batch_size
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=cluster.replicas,
                max_replicas=cluster.max_replicas,
                target_ongoing_requests=target,
                upscale_delay_s=cluster.upscale_seconds,
                downscale_delay_s=cluster.downscale_seconds,
                look_back_period_s=_look_back(cluster),
            )
        }
    return serve.deployment(
        name="Engine",
        max_ongoing_requests=room,
        max_queued_requests=settings.queue,
        ray_actor_options={"num_cpus": cluster.replica_cpus, "num_gpus": cluster.replica_gpus},
        **_care(plan),
        **number,
    )(EngineReplica)


def _look_back(cluster: ClusterSettings) -> float:
    """Of how many seconds the mean is taken: no more than the shorter delay, or what was before would delay it more."""
    return max(_LEAST_LOOK_BACK, min(_LOOK_BACK, cluster.upscale_seconds, cluster.downscale_seconds))


def _ingress(plan: Plan, cluster: ClusterSettings) -> Deployment:
    return serve.deployment(
        name="Ingress",
        num_replicas=cluster.ingresses,
        max_ongoing_requests=_INGRESS_REQUESTS,
        ray_actor_options={"num_cpus": 1},
        **_care(plan),
    )(serve.ingress()(Ingress))


def _care(plan: Plan) -> dict[str, Any]:
    """How Ray Serve looks after replicas, and how long they have to end."""
    return {
        "health_check_period_s": _HEALTH_SECONDS,
        "health_check_timeout_s": _HEALTH_TIMEOUT,
        "graceful_shutdown_timeout_s": plan.server.shutdown_seconds + _CLOSE_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }
