"""The server in a replica of Ray Serve: routes and composes here, and lets replicas of the engine answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraretriever.cluster.engine import RayEngine
from loraretriever.config import Settings
from loraretriever.errors import LoraRetrieverError
from loraretriever.models import quiet_libraries
from loraretriever.pipeline import LoraRetriever
from loraretriever.pool import Pool
from loraretriever.retrieve.loading import load_retriever
from loraretriever.server import logs, tracing
from loraretriever.server.app import create_app
from loraretriever.server.run import Plan
from loraretriever.server.sockets import is_loopback
from loraretriever.server.state import ServerState

_LOOK_SECONDS = 0.05


class Ingress:
    """The whole server, without a model. Ray Serve makes it, runs its application, and looks after it."""

    def __init__(self, plan: Plan, engine: DeploymentHandle[Any], affinity: bool) -> None:
        """Open the pool; the application loads the rest when it is started.

        Args:
            plan: as for a process that serves.
            engine: of the deployment of `EngineReplica`.
            affinity: see `RayEngine`.
        """
        logs.configure(plan.server.log_level, plan.server.log_format)
        quiet_libraries()
        self._close_tracing = tracing.configure(plan.server.otlp_endpoint)
        watches = serve.get_replica_context().rank.rank == 0

        def load_engine(pool: Pool, settings: Settings) -> RayEngine:
            base_model = settings.base_model or pool.base_model
            return RayEngine(engine, pool, base_model, affinity=affinity, watches=watches)

        self._retriever = LoraRetriever(Pool.open(plan.pool), plan.settings, load_retriever, load_engine)
        self._app = create_app(self._retriever, plan.server, multiprocess_dir=plan.shared)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Ray Serve asks for the application."""
        return _Door(self._app, self._app.state.server)

    def check_health(self) -> None:
        """Called by Ray Serve every few seconds.

        Raises:
            LoraRetrieverError: the models could not be loaded.
        """
        error = self._app.state.server.loading_error
        if error is not None:
            raise LoraRetrieverError(f"the models cannot be loaded: {error}")

    def __del__(self) -> None:
        """Ray Serve calls it when the application has ended."""
        if hasattr(self, "_app"):
            self._retriever.close()
            self._close_tracing()


class _Door:
    """Between Ray Serve's proxy and the application."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._when_loaded(send))
        else:
            await self._app(_with_peer(scope), receive, _without_id(send))

    def _when_loaded(self, send: Send) -> Send:
        """Holds the message back after which the replica gets requests; models that cannot be loaded end it."""

        async def hold(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                while not self._state.is_loaded:
                    if self._state.loading_error is not None:
                        message = {"type": "lifespan.startup.failed", "message": str(self._state.loading_error)}
                        break
                    await asyncio.sleep(_LOOK_SECONDS)
            await send(message)

        return hold


def _with_peer(scope: Scope) -> Scope:
    """The request with a header that says for whom the proxy passes it on, if that is another machine.

    A pool without keys serves this machine only. The server knows by this header who asks.
    """
    host, *_ = scope.get("client") or ("unknown",)
    if _is_here(host):
        return scope
    return {**scope, "headers": [*scope["headers"], (b"forwarded", f'for="{host}"'.encode())]}


def _is_here(host: str) -> bool:
    try:
        return is_loopback(host)
    except ValueError:  # no address
        return False


def _without_id(send: Send) -> Send:
    """Answers without the request's id, which the proxy adds."""

    async def pass_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers: Iterable[tuple[bytes, bytes]] = message.get("headers", ())
            message = {**message, "headers": [each for each in headers if each[0] != b"x-request-id"]}
        await send(message)

    return pass_on
