"""Every error in the form that OpenAI's clients expect: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from loraretriever.errors import (
    AdapterNotFoundError,
    AdmissionError,
    InvalidInputError,
    LoraRetrieverError,
    ModelLoadError,
    OverloadedError,
    PoolAwayError,
)
from loraretriever.server.metrics import Reason

_log = logging.getLogger(__name__)
STOPPING = "the server is stopping; send the request again to another one, or later."
RETRY_SECONDS = 1.0  # after which a request that met a full queue may try again

# status -> (type, code), by OpenAI's names where it has one
_KINDS: dict[int, tuple[str, str | None]] = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("permission_error", "insufficient_scope"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "request_timeout"),
    409: ("conflict_error", "conflict"),
    413: ("invalid_request_error", "too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    422: ("invalid_request_error", "adapter_refused"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("server_error", "overloaded"),
}


REJECTIONS: Mapping[str | None, Reason] = {  # codes of the errors that count as rejected requests
    "rate_limit_exceeded": "rate_limit",
    "overloaded": "overloaded",
    "too_large": "too_large",
    "loading": "loading",
    "stopping": "stopping",
}


class ErrorDetail(BaseModel):
    """What went wrong. `param`: the field that it is about; `code`: a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


RESPONSES: dict[int | str, dict[str, Any]] = {  # for the OpenAPI document
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered as it is."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer now."},
}


class ApiError(Exception):
    """An answer other than the one that was asked for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """`retry_after`: seconds; the header Retry-After has them as a whole number, at least 1."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind, code = _KINDS.get(self.status, ("server_error" if self.status >= 500 else "invalid_request_error", None))
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code or code},
        }

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def to_api_error(error: Exception) -> ApiError:
    """What a client is told of an error; what happened inside the server stays in its log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AdapterNotFoundError):
        return ApiError(404, str(error), code="adapter_not_found")
    if isinstance(error, AdmissionError):
        return ApiError(422, str(error))
    if isinstance(error, InvalidInputError):
        return ApiError(400, str(error))
    if isinstance(error, OverloadedError):
        return ApiError(503, str(error), retry_after=RETRY_SECONDS)
    if isinstance(error, ModelLoadError):
        _log.error("a model cannot be loaded: %s", error)
        return ApiError(503, "a model that this needs cannot be loaded; the server's log says why.", code="loading")
    if isinstance(error, PoolAwayError):
        _log.error("%s", error)
        message = "the pool cannot be reached now; send the request again soon."
        return ApiError(503, message, code="pool_away", retry_after=RETRY_SECONDS)
    if isinstance(error, LoraRetrieverError):
        _log.error("%s: %s", type(error).__name__, error)
        return ApiError(500, "the server failed to do this; its log says why. The same request may be sent again.")
    _log.error("an unexpected error", exc_info=error)
    return ApiError(500, "the server failed; its log says why. The same request may be sent again.")


def from_http(error: HTTPException) -> ApiError:
    """Errors of the framework: no such path, wrong method."""
    code = None
    message = str(error.detail)
    if error.status_code == 404:
        message = "there is nothing at this path; see /openapi.json for what there is."
    return ApiError(error.status_code, message, code=code)


def from_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request, with the name of its field."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    name = ".".join(place) or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}.")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this field is unknown here; leave it out"
    return ApiError(400, f"{name or 'the request'}: {message}", param=name)


def install(app: FastAPI) -> None:
    """Let the application answer all errors in this form."""

    async def known(request: Request, error: Exception) -> Response:
        return answer(request, to_api_error(error))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = answer(request, from_http(error))
        response.headers.update(error.headers or {})
        return response

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(request, from_validation(error))

    def answer(request: Request, error: ApiError) -> Response:
        reason = REJECTIONS.get(error.body()["error"]["code"])
        if reason is not None and request.url.path != "/ready":  # nobody wanted an answer there
            request.app.state.server.metrics.rejected(reason)
        return error.response()

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(LoraRetrieverError, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(Exception, known)
