"""The endpoints below /v1/adapters: a pool that changes while it serves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from loraretriever.errors import AdapterNotFoundError, LoraRetrieverError
from loraretriever.pool import Job, PoolView
from loraretriever.pool.files import file_errors, staging_folder
from loraretriever.server import auth, intake
from loraretriever.server.adapter_schemas import (
    AdapterChange,
    AdapterDetails,
    AdapterList,
    AdapterObject,
    AdapterSource,
    AllSamples,
    DeletedAdapter,
    MoreSamples,
    SampleList,
    adapter_object,
    sample_list,
)
from loraretriever.server.auth import Caller, require
from loraretriever.server.errors import ApiError
from loraretriever.server.intake import Offer, Place
from loraretriever.server.jobs import JobObject, Progress, Result, job_object
from loraretriever.server.state import ServerState, State
from loraretriever.server.uploads import FILES, receive
from loraretriever.types import Adapter

T = TypeVar("T", bound=AdapterDetails)
router = APIRouter(tags=["adapters"])
Reading = Annotated[Caller, Depends(require("pool:read"))]
Writing = Annotated[Caller, Depends(require("pool:write"))]


@router.get("/v1/adapters", response_model_exclude_unset=True)
async def list_adapters(
    state: State,
    caller: Reading,
    tag: Annotated[list[str], Query(description="Only adapters with all of these tags.")] = [],  # noqa: B006 - copied
    query: Annotated[str, Query(description="Only adapters with this in name, description or tags.")] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(description="The last name of the page before.")] = "",
) -> AdapterList:
    """The adapters that the caller may use or change, by name."""

    def found() -> list[tuple[str, Adapter]]:
        view = state.retriever.pool.view(caller.view)
        named = sorted(((view.public(adapter), adapter) for adapter in view.list()), key=itemgetter(0))
        return [(name, each) for name, each in named if name > after and _matches(name, each, tag, query)]

    adapters = await state.run(found)
    page = [_object(caller, name, adapter) for name, adapter in adapters[:limit]]
    return AdapterList(object="list", data=page, has_more=len(adapters) > limit)


@router.get("/v1/adapters/{name}", response_model_exclude_unset=True)
async def get_adapter(name: str, state: State, caller: Reading) -> AdapterObject:
    """One adapter."""
    adapter = await state.run(state.retriever.pool.view(caller.view).find, name)
    return _object(caller, name, adapter)


_UPLOAD_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        part: {"type": "string", "format": "binary", "description": file} for part, (file, _) in FILES.items()
    }
    | AdapterDetails.model_json_schema()["properties"],
    "required": ["config", "weights", "name"],
    "additionalProperties": False,
}


@router.post(
    "/v1/adapters",
    status_code=202,
    response_model=JobObject,
    responses={201: {"model": AdapterObject, "description": "With wait=true: the adapter is in the pool."}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": AdapterSource.model_json_schema()},
                "multipart/form-data": {"schema": _UPLOAD_SCHEMA},
            },
        }
    },
)
async def add_adapter(
    request: Request,
    state: State,
    caller: Writing,
    wait: Annotated[bool, Query(description="Answer when it is in the pool.")] = False,
) -> Response:
    """Add an adapter, or a new revision of one: by its files, from a folder of the server, or from the hub."""
    await state.run(auth.admit, state, caller)
    state.jobs.check_takes(caller.tenant)
    kept = ExitStack()
    try:
        offer = await _read_offer(request, state, caller, kept)
        job, outcome = await start_adding(state, offer, kept)
    finally:
        await state.run(kept.close)
    if wait and await is_done(state, outcome):
        view = state.retriever.pool.view(caller.view)
        adapter = await state.run(view.get, offer.place.name)
        found = _object(caller, view.public(adapter), adapter)
        return JSONResponse(found.model_dump(mode="json", exclude_unset=True), 201)
    location = f"{request.scope.get('root_path', '')}/v1/jobs/{job.id}"
    return JSONResponse(job_object(job, caller).model_dump(mode="json"), 202, {"location": location})


async def start_adding(state: ServerState, offer: Offer, kept: ExitStack | None = None) -> tuple[Job, Future[Result]]:
    """Begin a job that adds an adapter; at its end it closes what is `kept` for it."""

    def work(progress: Progress) -> Result:
        return intake.add(state, offer, progress)

    place, kept = offer.place, (kept or ExitStack()).pop_all()
    try:
        return await state.run(state.jobs.start, "add", place.tenant, place.name, work, kept.close)
    except BaseException:
        kept.close()
        raise


async def is_done(state: ServerState, outcome: Future[Result]) -> bool:
    """Wait for a job, as long as a request may take.

    Raises:
        ApiError: the one that the job ended with.
    """
    done, _ = await asyncio.wait([asyncio.wrap_future(outcome)], timeout=state.settings.request_timeout)
    for each in done:
        each.result()
    return bool(done)


@router.patch("/v1/adapters/{name}", response_model_exclude_unset=True)
async def change_adapter(name: str, body: AdapterChange, state: State, caller: Writing) -> AdapterObject:
    """Enable or disable an adapter, or describe it otherwise."""
    if not body.model_fields_set:
        raise ApiError(400, "nothing is to be changed; expected enabled, description or tags.")
    pool = state.retriever.pool

    def change(adapter: str) -> None:
        if body.enabled is not None:
            pool.set_enabled(adapter, body.enabled)
        if body.description is not None or body.tags is not None:
            pool.update(adapter, description=body.description, tags=body.tags)

    adapter = await change_own(state, caller, name, change)
    return _object(caller, name, await state.run(pool.view(caller.view).get, adapter.name))


@router.delete("/v1/adapters/{name}")
async def delete_adapter(name: str, state: State, caller: Writing) -> DeletedAdapter:
    """Remove an adapter. Requests that are being answered with it go on."""
    await change_own(state, caller, name, state.retriever.pool.remove)
    return DeletedAdapter(name=name)


@router.get("/v1/adapters/{name}/samples")
async def get_samples(name: str, state: State, caller: Reading) -> SampleList:
    """The prompts that an adapter is meant for, and those that it must not be chosen for."""
    return await state.run(_samples, state, caller, name)


@router.post("/v1/adapters/{name}/samples")
async def add_samples(name: str, body: MoreSamples, state: State, caller: Writing) -> SampleList:
    """Add samples, or counter samples; those that the adapter has count once."""
    pool = state.retriever.pool
    await change_own(state, caller, name, lambda adapter: pool.add_samples(adapter, body.samples, counter=body.counter))
    return await state.run(_samples, state, caller, name)


@router.put("/v1/adapters/{name}/samples")
async def replace_samples(name: str, body: AllSamples, state: State, caller: Writing) -> SampleList:
    """Replace all samples at once."""
    pool, counters = state.retriever.pool, body.counter_samples
    await change_own(state, caller, name, lambda adapter: pool.replace_samples(adapter, body.samples, counters))
    return await state.run(_samples, state, caller, name)


def find_own(view: PoolView, caller: Caller, name: str) -> Adapter:
    """An adapter that the caller may change.

    Raises:
        AdapterNotFoundError: there is none of that name that the caller may see.
        ApiError: it belongs to somebody else.
    """
    adapter = view.find(name)
    if not caller.is_operator and adapter.tenant != caller.tenant:
        message = f"adapter {name!r} is shared, and not this key's to change. Add one of that name to have your own."
        raise ApiError(403, message, code="adapter_shared")
    return adapter


async def change_own(state: ServerState, caller: Caller, name: str, change: Callable[[str], object]) -> Adapter:
    """Change an adapter by its name in the pool, and bring retrieval up to it; gives the adapter as it was.

    Raises:
        AdapterNotFoundError, ApiError: as `find_own`; what the change raises becomes an ApiError.
    """

    def make() -> Adapter:
        auth.admit(state, caller)
        view = state.retriever.pool.view(caller.view)
        adapter = find_own(view, caller, name)
        try:
            change(adapter.name)
        except AdapterNotFoundError as error:  # this one may tell of adapters that the caller may not see
            view.find(name)
            raise ApiError(409, f"adapter {name!r} was changed meanwhile; send the request again.") from error
        except LoraRetrieverError as error:
            raise intake.for_clients(state, error, Place(adapter.name, adapter.tenant)) from error
        intake.follow(state, adapter.tenant or "")
        return adapter

    return await state.run(make)


def _samples(state: ServerState, caller: Caller, name: str) -> SampleList:
    view = state.retriever.pool.view(caller.view)
    adapter = view.find(name)
    return sample_list(view.samples(adapter.name), view.counter_samples(adapter.name))


def _object(caller: Caller, name: str, adapter: Adapter) -> AdapterObject:
    return adapter_object(adapter, name, show_tenant=caller.is_operator)


def _matches(name: str, adapter: Adapter, tags: list[str], query: str) -> bool:
    text = "\n".join((name, adapter.description, *adapter.tags)).casefold()
    return set(tags) <= set(adapter.tags) and query.casefold() in text


async def _read_offer(request: Request, state: ServerState, caller: Caller, kept: ExitStack) -> Offer:
    """What is to be added. Files that are received stay until `kept` is closed."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        folder = await state.run(_make_folder, state, kept)
        details = _parsed(AdapterDetails, await receive(request, state, folder))
        if details.name is None:
            raise ApiError(400, "the adapter has no name; expected the field 'name'.", param="name")
        place = await state.run(intake.find_place, state, caller, details.name, details.tenant)
        return _offer(caller, place, folder, details)
    if kind != "application/json":
        message = f"the body is of type {kind!r:.80}; expected multipart/form-data with files, or application/json."
        raise ApiError(415, message)
    body = _parsed(AdapterSource, await request.body())
    source = await state.run(intake.find_source, state, caller, body.source)
    name = body.name or intake.default_name(source)
    place = await state.run(intake.find_place, state, caller, name, body.tenant)
    return _offer(caller, place, source, body, body.samples)


def _make_folder(state: ServerState, kept: ExitStack) -> Path:
    """A folder for an upload. What a killed process leaves is swept by the next one that makes such a folder."""
    with file_errors("make room for an upload"):
        folder = kept.enter_context(staging_folder(state.retriever.pool.state_folder)) / intake.UPLOAD_FOLDER
        folder.mkdir()
    return folder


def _offer(
    caller: Caller, place: Place, source: Path | str, details: AdapterDetails, samples: list[str] | None = None
) -> Offer:
    return Offer(
        place=place,
        source=source,
        samples=samples,
        description=details.description,
        tags=tuple(details.tags),
        allow_base_mismatch=details.allow_base_mismatch,
        anonymous=not caller.is_operator,
    )


def _parsed(model: type[T], body: bytes | dict[str, Any]) -> T:
    try:
        return model.model_validate_json(body) if isinstance(body, bytes) else model.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
