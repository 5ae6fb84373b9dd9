"""How an adapter comes into the pool through the server: as an upload, from a folder, or from the Hugging Face hub.

All ways end in `Pool.add`, and so in admission.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from loraretriever.errors import AdapterNotFoundError, LoraRetrieverError, PoolError
from loraretriever.pool import public_name, qualified_name
from loraretriever.pool.hub import HUB_ID, download_adapter
from loraretriever.pool.names import check_name
from loraretriever.pool.peft_config import CONFIG_FILE
from loraretriever.pool.samples import SAMPLES_FILE
from loraretriever.pool.weights import CARD_FILE, DEFAULT_MAX_BYTES, WEIGHTS_FILE
from loraretriever.server.auth import Caller
from loraretriever.server.errors import ApiError, to_api_error
from loraretriever.server.jobs import Progress, Result
from loraretriever.server.state import ServerState
from loraretriever.server.targets import AUTO, BASE

_log = logging.getLogger(__name__)
UPLOAD_FOLDER = "upload"  # inside of a staging folder; messages name it
NO_SUCH_SOURCE = "source_not_found"  # an error's code
_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, SAMPLES_FILE)
_IN_PATH = r"[^\s/'\"<>|:;,()]"
_PATH = re.compile(rf"(?<![\w/:.~-])(?:~|\.\.?)?/(?:{_IN_PATH}+/)*({_IN_PATH}+)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter goes: its name in the pool, and whom it belongs to (None: nobody)."""

    name: str
    tenant: str | None

    @property
    def public(self) -> str:
        """Its name for the tenant."""
        return public_name(self.name, self.tenant)


@dataclass(frozen=True, slots=True)
class Offer:
    """An adapter for the pool. `source`: a folder, or the id of a repository on the hub.

    `samples` None: those that come with it. `anonymous`: not from repositories that only this server may read.
    """

    place: Place
    source: Path | str
    samples: Sequence[str] | None = None
    description: str = ""
    tags: tuple[str, ...] = ()
    allow_base_mismatch: bool = False
    anonymous: bool = True


def find_place(state: ServerState, caller: Caller, name: str, tenant: str | None) -> Place:
    """Where an adapter of this name is to go: a revision of one that the owner has, or a new one.

    Args:
        name: as the caller knows it.
        tenant: whom the caller says that it belongs to; None: the caller's own, and for an operator nobody.

    Raises:
        ApiError: the caller may not give it to that tenant, or the name is taken.
        InvalidInputError: the name cannot be used.
    """
    if name in (AUTO, BASE):
        raise ApiError(400, f"the adapter name {name!r} has a meaning of its own here; give another.", param="name")
    pool = state.retriever.pool
    if caller.is_operator:
        if tenant is None and ":" in name:
            tenant, _, name = name.partition(":")
    elif tenant is not None and tenant != (caller.tenant or ""):
        raise ApiError(403, "only operators may name a tenant; leave it out.", param="tenant")
    else:
        tenant = caller.tenant or ""
    owner = tenant or None
    check_name(name)
    try:
        found = pool.view(owner or "").find(name)
        if found.tenant == owner:
            return Place(found.name, owner)
    except AdapterNotFoundError:
        pass
    if owner is not None:
        return Place(qualified_name(owner, name), owner)
    try:
        taken = pool.get(name)  # only the command line gives a tenant's adapter such a name
    except AdapterNotFoundError:
        return Place(name, None)
    if tenant is None:
        return Place(name, taken.tenant)
    raise ApiError(409, f"the name {name!r} is taken; give another.", param="name")


def find_folder(state: ServerState, caller: Caller, source: str) -> Path:
    """A folder below the settings' `adapter_root`.

    Raises:
        ApiError: there is none, it lies elsewhere, or this caller may not name folders.
    """
    root = state.settings.adapter_root
    if root is None or caller.tenant is not None:
        reason = "the server was started without an adapter root" if root is None else "this key belongs to a tenant"
        message = f"folders of the server cannot be named here: {reason}. Upload the files."
        raise ApiError(403, message, code="folders_not_allowed", param="source")
    try:
        root = root.resolve()
        folder = (root / source).resolve()
        inside = [folder, *((folder / name).resolve() for name in _FILES)]
        if not all(path.is_relative_to(root) for path in inside) or folder == root:
            message = f"{source!r:.200} is not below the server's adapter root, or has links that lead out of it."
            raise ApiError(403, message, code="outside_adapter_root", param="source")
        is_folder = folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise ApiError(400, f"{source!r:.200} cannot be the path of a folder.", param="source") from error
    if not is_folder:
        message = f"there is no folder {source!r:.200} below the server's adapter root."
        raise ApiError(400, message, code=NO_SUCH_SOURCE, param="source")
    return folder


def find_source(state: ServerState, caller: Caller, source: str) -> Path | str:
    """A folder below the adapter root, or else the id of a repository on the hub.

    Raises:
        ApiError: it is neither, or may not be used.
    """
    if HUB_ID.fullmatch(source) is None:
        return find_folder(state, caller, source)
    if state.settings.adapter_root is not None and caller.tenant is None:
        with suppress(ApiError):  # what looks like an id may be a folder
            return find_folder(state, caller, source)
    if not state.settings.allow_hub:
        message = "this server takes no adapters from the Hugging Face hub. Upload the files."
        raise ApiError(403, message, code="hub_not_allowed", param="source")
    return source


def default_name(source: Path | str) -> str:
    """The name of an adapter that is given none."""
    if isinstance(source, Path):
        return source.name
    return source.partition("@")[0].rpartition("/")[2]


def add(state: ServerState, offer: Offer, progress: Progress) -> Result:
    """Add an adapter to the pool, and bring retrieval up to it: the work of a job.

    Raises:
        ApiError: what went wrong, in words for the client.
    """
    place = offer.place
    most = state.settings.max_upload_mib << 20
    try:
        source, label = offer.source, None
        if isinstance(source, str):
            progress(0.05, "receiving")
            source = _download(source, most, offer.anonymous)
        elif source.name == UPLOAD_FOLDER:
            label = "upload"
        else:
            most = max(most, DEFAULT_MAX_BYTES)
        progress(0.3, "checking and adding")
        added = state.retriever.pool.add(
            source,
            name=place.name,
            samples=offer.samples,
            description=offer.description,
            tags=offer.tags,
            tenant=place.tenant,
            label=label,
            allow_base_mismatch=offer.allow_base_mismatch,
            max_bytes=most,
        )
    except Exception as error:
        raise for_clients(state, error, place) from error
    progress(0.7, "embedding")
    follow(state, place.tenant or "")
    adapter = added.adapter
    return {"change": added.change.value, "revision": adapter.revision, "digest": adapter.digest}


def _download(source: str, most: int, anonymous: bool) -> str:
    """Bring an adapter into the hub's cache; gives the id that names this very commit."""
    try:
        found = download_adapter(source, None, most, anonymous=anonymous)
    except PoolError as error:
        raise ApiError(400, str(error), code=NO_SUCH_SOURCE, param="source") from error
    exact = f"{found.repo}@{found.commit}"
    if Path(exact).exists():  # `Pool.add` would take what is in the working folder
        raise ApiError(400, f"{source!r:.200} cannot be used here. Upload the files.", param="source")
    return exact


def follow(state: ServerState, view: str | None) -> None:
    """Bring retrieval up to the pool, so that the next request need not."""
    try:
        state.retriever.follow(view)
    except LoraRetrieverError as error:  # the change is made; a request for an answer tells what is wrong
        _log.warning("retrieval cannot follow the pool: %s", error)


def for_clients(state: ServerState, error: Exception, place: Place) -> ApiError:
    """An error without the server's paths, and with the name by which its tenant knows the adapter."""
    told = to_api_error(error)
    pool = state.retriever.pool
    text = told.message
    for folder in (pool.state_folder, pool.location, state.settings.adapter_root, pool.base_model):
        if folder is not None and PurePath(folder).is_absolute():
            text = re.sub(rf"{re.escape(str(folder))}(?:/{_IN_PATH}+)*", lambda match: PurePath(match[0]).name, text)
    text = _PATH.sub(lambda match: match[1], text)
    if place.public != place.name:
        text = text.replace(place.name, place.public)
    text = text.replace("--allow-base-mismatch", "allow_base_mismatch")
    return ApiError(told.status, text, code=told.code, param=told.param, retry_after=told.retry_after)
