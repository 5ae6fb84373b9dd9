"""GET / and /static/...: the page, all of whose parts come from this package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import cast

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

router = APIRouter(include_in_schema=False)
_FOLDER = cast(Path, files("loraretriever.server") / "static")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
}


@router.get("/")
async def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/static/{name:path}")
async def asset(name: str) -> Response:
    """A part of the page."""
    return _file(name)


def _file(name: str) -> Response:
    path = (_FOLDER / name).resolve()
    if not path.is_relative_to(_FOLDER.resolve()) or path.suffix not in _TYPES or not path.is_file():
        raise HTTPException(404)
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=HEADERS)
