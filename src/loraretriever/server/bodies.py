"""Bounds on what clients send: the size of a body, and how long its parts may take."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraretriever.server.errors import ApiError

_MIB = 1 << 20


class BodyLimit:
    """Refuses bodies that are too large or come too slowly, before they are held in memory."""

    def __init__(self, app: ASGIApp, most_mib: int, upload_mib: int, upload_path: str, part_seconds: float) -> None:
        """Wrap an application.

        Args:
            app: what follows.
            most_mib: MiB of a body.
            upload_mib: MiB of a multipart body at `upload_path`.
            upload_path: where adapters are uploaded.
            part_seconds: between two parts of a body.
        """
        self._app = app
        self._most, self._upload = most_mib, upload_mib
        self._upload_path = upload_path
        self._part_seconds = part_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its body watched."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_upload = scope["path"] == self._upload_path and headers.get(b"content-type", b"").startswith(b"multipart/")
        mib = self._upload if is_upload else self._most
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > mib * _MIB:
            await ApiError(413, _too_large(mib)).response()(scope, receive, send)
            return
        received = 0
        is_whole = False

        async def watched() -> Message:
            nonlocal received, is_whole
            if is_whole:  # what follows is the end of the connection
                return await receive()
            try:
                async with asyncio.timeout(self._part_seconds):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"no part of the body came for {self._part_seconds:.0f} s.") from error
            received += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if received > mib * _MIB:
                raise HTTPException(413, _too_large(mib))
            return message

        await self._app(scope, watched, send)


def _too_large(mib: int) -> str:
    return f"the body is larger than {mib} MiB, which is the most that this server takes."
