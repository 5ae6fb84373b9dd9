"""A small application served as the real one is: `python server_app.py WORKERS [MODE]`, in processes of their own."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from fastapi import FastAPI

from loraretriever.config import ServerSettings, Settings
from loraretriever.errors import LoraRetrieverError, ModelLoadError
from loraretriever.server.processes import serve_in_workers
from loraretriever.server.run import Plan, serve_here
from loraretriever.server.sockets import listen, url_of


@contextmanager
def open_app(plan: Plan) -> Iterator[FastAPI]:
    """What it does in this place of the pool says the mode: `fail` and `die` do not start."""
    logging.basicConfig(level="INFO", stream=sys.stderr)
    if plan.pool == "fail":
        raise ModelLoadError("no such model")
    if plan.pool == "die":
        os._exit(9)
    app = FastAPI()
    app.state.server = SimpleNamespace(is_loaded=True, loading_error=None, is_stopping=False)
    waiting, go_on = asyncio.Event(), asyncio.Event()

    @app.get("/pid")
    async def pid() -> int:
        return os.getpid()

    @app.get("/shared")
    async def shared() -> list[str]:
        return [str(plan.shared), *(os.listdir(plan.shared) if plan.shared else [])]

    @app.get("/threads")
    async def threads() -> str | None:
        return os.environ.get("OMP_NUM_THREADS")

    @app.get("/wait")
    async def wait() -> str:
        waiting.set()
        await go_on.wait()
        return "done"

    @app.get("/waiting")
    async def is_waiting() -> str:
        await waiting.wait()
        return "yes"

    @app.get("/go-on")
    async def let_go() -> str:
        go_on.set()
        return "ok"

    yield app


def main() -> None:
    workers, mode = int(sys.argv[1]), sys.argv[2]
    plan = Plan(mode, Settings(), ServerSettings(workers=max(workers, 1), shutdown_seconds=60))
    with listen("127.0.0.1", 0) as listener:

        def on_ready() -> None:
            sys.stdout.write(json.dumps({"url": url_of(listener)}) + "\n")
            sys.stdout.flush()

        try:
            (serve_in_workers if workers else serve_here)(plan, listener, on_ready, open_app)
        except LoraRetrieverError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
