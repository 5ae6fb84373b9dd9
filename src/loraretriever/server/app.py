"""The application: what is where, and what happens at its beginning and its end."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import loraretriever
from loraretriever.config import ServerSettings
from loraretriever.pipeline import LoraRetriever
from loraretriever.server import (
    adapters,
    chat,
    embeddings,
    feedback,
    health,
    jobs,
    limits,
    models,
    routing,
    stats,
    vllm_compat,
)
from loraretriever.server.bodies import BodyLimit
from loraretriever.server.errors import RESPONSES, install
from loraretriever.server.jobs import JobRunner
from loraretriever.server.limits import Limiter
from loraretriever.server.metrics import Metrics
from loraretriever.server.observe import ObserveMiddleware
from loraretriever.server.page import add_page
from loraretriever.server.state import ServerState
from loraretriever.server.streaming import Courier
from loraretriever.types import Request, Sampling

_log = logging.getLogger(__name__)
_PART_SECONDS = 30.0
_WARM_UP = "Is everything there?"
_EXPOSED = ("composition", "hits", "fallback", "retrieve-ms")


def create_app(retriever: LoraRetriever, settings: ServerSettings, *, multiprocess_dir: Path | None = None) -> FastAPI:
    """The server over an opened pool, which the caller closes after the application's end.

    Args:
        retriever: its models are loaded in the background when the application starts.
        settings: see `ServerSettings`; what concerns processes and addresses plays no part here.
        multiprocess_dir: where the worker processes of one server share what they count; None: there is one.
    """
    metrics = Metrics(multiprocess_dir)
    limiter = Limiter(retriever.pool.state_folder / limits.FILE if multiprocess_dir is not None else None)
    state = ServerState(retriever, settings, metrics, limiter, JobRunner(retriever.pool, on_state=metrics.job))
    app = FastAPI(
        title="LoraRetriever",
        version=loraretriever.__version__,
        docs_url=None,  # it would load its assets from elsewhere
        redoc_url=None,
        lifespan=_lifespan,
        telemetry={"tracing": False},  # `ObserveMiddleware` makes the spans
        responses=RESPONSES,
    )
    app.root_path = settings.root_path  # of the constructor's argument FastAPI warns: uvicorn's would change the paths
    app.state.server = state
    for module in (health, chat, models, embeddings, routing, feedback, adapters, jobs, vllm_compat):
        app.include_router(module.router)
    if settings.metrics:
        app.include_router(stats.router)
    if settings.page:
        add_page(app)
    install(app)
    app.openapi = functools.partial(_openapi, app.openapi)  # type: ignore[method-assign]
    upload = "/v1/adapters"
    app.add_middleware(
        BodyLimit, settings.max_body_mib, settings.max_upload_mib, upload_path=upload, part_seconds=_PART_SECONDS
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", *(f"x-lora-{name}" for name in _EXPOSED)],
        )
    app.add_middleware(ObserveMiddleware, metrics=metrics, log_prompts=settings.log_prompts)
    return app


def _openapi(original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """FastAPI's document, with the form of errors, and how keys are sent."""
    document = original()
    for operations in document["paths"].values():
        for operation in operations.values():
            for status in RESPONSES:  # errors are JSON, whatever the answer itself is
                (content,) = operation["responses"][status]["content"].values()
                operation["responses"][status]["content"] = {"application/json": content}
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}, {}]
    return document


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: ServerState = app.state.server
    state.courier = Courier(asyncio.get_running_loop())
    state.metrics.start()
    loading = threading.Thread(target=_load, args=(state,), name="loading", daemon=True)
    loading.start()
    watching = asyncio.ensure_future(_watch_folder(state))
    try:
        yield
    finally:
        state.is_stopping = True
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await state.run(state.jobs.close, state.seconds_to_stop)
        await asyncio.get_running_loop().run_in_executor(None, loading.join)
        state.close()
        state.limiter.close()
        state.metrics.close()


def _load(state: ServerState) -> None:
    """Load the models, and run both once: the first request shall not wait for it."""
    retriever = state.retriever
    try:
        engine = retriever.engine
        state.metrics.follow(engine.stats, retriever.pool, retriever.pool.base_model)
        retriever.route([_WARM_UP])
        list(engine.run([Request(_WARM_UP, sampling=Sampling(max_tokens=2))]))
    except Exception as error:
        state.loading_error = error
        _log.error("the models cannot be loaded: %s", error, exc_info=error)
    else:
        state.is_loaded = True
        _log.info("ready")


async def _watch_folder(state: ServerState) -> None:
    """Look at a plain folder again now and then: adapters that are put there are served without a restart."""
    pool = state.retriever.pool
    while pool.is_plain:
        await asyncio.sleep(state.settings.refresh_seconds)
        try:
            await state.run(pool.refresh)
        except Exception as error:
            _log.warning("the pool's folder cannot be read: %s", error)
