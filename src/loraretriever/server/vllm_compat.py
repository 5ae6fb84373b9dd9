"""vLLM's endpoints to load and unload adapters, for tools that know those: same paths, fields, statuses and texts.

Errors have the form that all of this server's errors have. vLLM forgets its adapters at its end, this pool does not.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.responses import PlainTextResponse, Response

from loraretriever.errors import AdapterNotFoundError
from loraretriever.server import auth, intake
from loraretriever.server.adapters import change_own, find_own, is_done, start_adding
from loraretriever.server.auth import Caller, require
from loraretriever.server.errors import ApiError
from loraretriever.server.intake import Offer, Place
from loraretriever.server.schemas import Text
from loraretriever.server.state import ServerState, State

router = APIRouter(tags=["vllm"])
Writing = Annotated[Caller, Depends(require("pool:write"))]
_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
LoraName = Annotated[Text, StringConstraints(max_length=512)]


class LoadBody(BaseModel):
    """POST /v1/load_lora_adapter. As in vLLM, fields that are not known are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    lora_name: LoraName
    lora_path: Annotated[Text, StringConstraints(max_length=4096)]
    load_inplace: bool = False


class UnloadBody(BaseModel):
    """POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    lora_name: LoraName


@router.post("/v1/load_lora_adapter", response_class=Response, responses=_TEXT)
async def load_lora_adapter(body: LoadBody, state: State, caller: Writing) -> PlainTextResponse:
    """Add an adapter from a folder below the server's adapter root, or from the Hugging Face hub."""
    await state.run(auth.admit, state, caller)
    if not body.lora_name or not body.lora_path:
        raise ApiError(400, "Both 'lora_name' and 'lora_path' must be provided.")
    place = await state.run(_find_place, state, caller, body)
    try:
        source = await state.run(intake.find_source, state, caller, body.lora_path)
    except ApiError as error:
        if error.code != intake.NO_SUCH_SOURCE:
            raise
        message = f"Loading lora {body.lora_name} failed: No adapter found for {body.lora_path}"
        raise ApiError(404, message, code="adapter_not_found", param="lora_path") from error
    _, outcome = await start_adding(state, Offer(place, source, anonymous=not caller.is_operator))
    if not await is_done(state, outcome):
        raise ApiError(503, "the adapter is still being added; see GET /v1/jobs", code="loading", retry_after=5.0)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=Response, responses=_TEXT)
async def unload_lora_adapter(body: UnloadBody, state: State, caller: Writing) -> PlainTextResponse:
    """Remove an adapter from the pool."""
    name = body.lora_name
    if not name:
        raise ApiError(400, "'lora_name' needs to be provided to unload a LoRA adapter.")
    try:
        await change_own(state, caller, name, state.retriever.pool.remove)
    except AdapterNotFoundError as error:
        message = f"The lora adapter '{name}' cannot be found."
        raise ApiError(404, message, code="adapter_not_found", param="lora_name") from error
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _find_place(state: ServerState, caller: Caller, body: LoadBody) -> Place:
    """Where the adapter is to go; an own one of that name is in the way, unless it is to be replaced."""
    if not body.load_inplace:
        try:
            find_own(state.retriever.pool.view(caller.view), caller, body.lora_name)
        except (AdapterNotFoundError, ApiError):  # a shared one is not in the way of an own one
            pass
        else:
            raise ApiError(
                400,
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter in "
                "place, set 'load_inplace' to True.",
                param="lora_name",
            )
    return intake.find_place(state, caller, body.lora_name, None)
