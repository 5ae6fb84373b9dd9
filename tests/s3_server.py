"""An S3 server for tests, which can be told to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

BUCKET = "adapters"
Fault = Callable[[str, str], str | None]  # from method and path to what goes wrong
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}


class S3Server:
    """moto's server on a free port of this machine, with a bucket.

    `fault` is asked about each request: "500" and "503" are answered, "truncated" sends half of the object as if it
    were all, "broken" ends the connection in the middle, "wrong" changes a byte.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.fault: Fault = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self._make_bucket()

    def reset(self) -> None:
        """Fail no longer, and forget what was asked."""
        self.fault = lambda method, path: None
        self.requests.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _make_bucket(self) -> None:
        from urllib.request import Request, urlopen

        urlopen(Request(f"{self.url}/{BUCKET}", method="PUT"), timeout=60).close()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        fault = self.fault(method, path)
        if fault in ("500", "503"):
            start(f"{fault} Out of order", [("Content-Length", "0")])
            return [b""]
        if fault is None:
            return self._app(environ, start)  # type: ignore[no-any-return]
        told: list[Any] = []
        body = b"".join(self._app(environ, lambda status, headers, error=None: told.extend((status, headers))))
        headers = {name.lower(): value for name, value in told[1]}
        if fault == "truncated":
            body = body[: len(body) // 2]
            headers["content-length"] = str(len(body))
        elif fault == "broken":
            headers["content-length"] = str(len(body))
            body = body[: len(body) // 2]
        elif fault == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        start(told[0], list(headers.items()))
        return [body]
