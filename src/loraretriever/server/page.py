"""GET / and /static/...: the page, all of whose parts come from this package."""

from __future__ import annotations

import os
from importlib.resources import files

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # ask each time whether it has changed
    "cross-origin-opener-policy": "same-origin",
}


class _Files(StaticFiles):
    """Files with headers that let a browser load nothing from elsewhere."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(HEADERS)
        return response


def add_page(app: FastAPI) -> None:
    """Serve the page at / and its parts below /static."""
    parts = _Files(directory=str(files("loraretriever.server") / "static"))
    app.mount("/static", parts)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return await parts.get_response("index.html", request.scope)
