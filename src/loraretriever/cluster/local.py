"""`loraretriever serve --cluster`: a Ray of this machine's own, or one that is there already."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from loraretriever.config import ClusterSettings, ray_address
from loraretriever.errors import LoraRetrieverError, require_extra
from loraretriever.server.run import Plan

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_EXTRA_SECONDS = 20.0  # beyond what requests have, for replicas to end
_LOOK_SECONDS = 0.1
_NAME = "loraretriever"  # of the application
_OWN_ERROR = re.compile(r"loraretriever\.errors\.\w+: ")  # as it stands in a stack
# Ray reads these when it is imported. It would tell its makers of each cluster, and leave out lines of logs.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}


def serve_on_ray(plan: Plan, cluster: ClusterSettings, on_ready: Callable[[], None]) -> None:
    """Serve a pool on Ray until a signal ends it.

    RAY_ADDRESS names a cluster; without it, one is started on this machine, and ended with this program.

    Args:
        on_ready: called once, when all replicas have loaded their models.

    Raises:
        MissingExtraError: Ray is not installed.
        LoraRetrieverError: the application cannot be started.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with require_extra("ray"):
        import ray
        from ray import serve
    from loraretriever.cluster.ray_app import build

    application, stdout = build(plan, cluster), sys.stdout
    with (
        _interruptible() as hear_signals,
        TemporaryDirectory(prefix="loraretriever-ray-", ignore_cleanup_errors=True) as folder,
        redirect_stdout(sys.stderr),  # Ray tells there what happens to replicas
    ):
        try:
            logging.getLogger("ray").setLevel(logging.ERROR)  # what replicas say is passed on by other ways
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            _start_ray(ray, cluster, folder)
            hear_signals()  # Ray has taken SIGTERM over
            _deploy(serve, plan, application)
            with redirect_stdout(stdout):
                on_ready()
            while True:
                signal.pause()
        except KeyboardInterrupt:
            _log.info("stopping; running requests have %g s to finish", plan.server.shutdown_seconds)
        finally:
            _stop(ray, serve, plan)


def _start_ray(ray: Any, cluster: ClusterSettings, folder: str) -> None:
    address = ray_address()
    if address is not None:
        try:
            ray.init(address, configure_logging=False)
        except ConnectionError as error:
            raise LoraRetrieverError(
                f"no Ray cluster lets this program in at {address}, which RAY_ADDRESS names: {error}. Start one there "
                "with `ray start --head`, give this program the cluster's token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN), "
                "or unset RAY_ADDRESS for a Ray of this machine's own."
            ) from error
        return
    replicas = cluster.max_replicas or cluster.replicas
    wanted = replicas * cluster.replica_cpus + cluster.ingresses
    # Ray only counts processors. Fewer than are wanted would leave replicas waiting for ever.
    processors = max(wanted, os.cpu_count() or 1)
    ray.init("local", num_cpus=processors, include_dashboard=False, configure_logging=False, _temp_dir=folder)


def _deploy(serve: Any, plan: Plan, application: Any) -> None:
    """Start Serve, unless it runs, and the application; waits until all replicas have loaded their models."""
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(http_options={"host": plan.server.host, "port": plan.server.port}, logging_config=quiet)
    try:
        serve.run(application, name=_NAME, route_prefix="/")
    except RuntimeError as error:
        raise LoraRetrieverError(f"the replicas cannot be started: {_reason(serve, error)}") from error


def _reason(serve: Any, error: Exception) -> str:
    """Why replicas do not start: our own error at the end of what Ray Serve tells of them, or else all of it."""
    told = [each.message for each in serve.status().applications[_NAME].deployments.values()]
    found = [_OWN_ERROR.split(message)[-1] for message in told if _OWN_ERROR.search(message)]
    return found[0] if found else "\n".join([str(error), *filter(None, told)])


def _stop(ray: Any, serve: Any, plan: Plan) -> None:
    """End the application, after its requests, and Ray with it, where it is this program's own."""
    if not ray.is_initialized():
        return
    with suppress(Exception):  # whatever state Serve is in: there is nothing more to be done
        serve.delete(_NAME, _blocking=False)
        deadline = time.monotonic() + plan.server.shutdown_seconds + _EXTRA_SECONDS
        while _NAME in serve.status().applications and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
    ray.shutdown()


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Let the first signal interrupt what is done, and a second SIGINT end the process at once.

    Yields a function that sees to it again, should somebody else have taken the signals over.
    """
    is_stopping = False

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        if is_stopping:
            if number == signal.SIGINT:
                os._exit(128 + number)
            return
        is_stopping = True
        raise KeyboardInterrupt

    def hear_signals() -> None:
        for number in _SIGNALS:
            signal.signal(number, hear)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    hear_signals()
    try:
        yield hear_signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
