"""vLLM's plug-in: requests whose model is a composition of the pool are answered with it.

Two entry points. `register` (group `vllm.general_plugins`) lets vLLM find adapters by their pinned names
(`compose/pinned.py`); it needs VLLM_ALLOW_RUNTIME_LORA_UPDATING. `Endpoint` (group `vllm.endpoint_plugins`, which vLLM
loads where VLLM_PLUGINS names it) tells gateways what the server can do, and lets go of names that nobody uses. vLLM
imports this module in each of its processes, so it brings nothing heavy along, and opens the pool when it is asked for
the first adapter.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraretriever.errors import AdapterNotFoundError, InvalidInputError, LoraRetrieverError

if TYPE_CHECKING:
    from loraretriever.compose.folders import AdapterFolders
    from loraretriever.config import Settings
    from loraretriever.pool import Pool

INFO_PATH = "/loraretriever"
_NAME = "LoraRetriever"
_log = logging.getLogger("vllm.loraretriever")  # below vLLM's own logger, which prints


def register() -> None:
    """Let vLLM find adapters in the pool that LORARETRIEVER_POOL names. May be called several times."""
    from vllm.lora.resolver import LoRAResolverRegistry

    from loraretriever.config import load_settings, named_by_environment

    location = named_by_environment("POOL")
    if location is None:
        _log.warning("LORARETRIEVER_POOL is not set: no adapters are found; set it to a pool's folder or URL.")
        return
    if _NAME not in LoRAResolverRegistry.get_supported_resolvers():
        settings = load_settings()
        if settings.vllm_lanes:
            from loraretriever.cluster.vllm_lanes import install

            install(settings.vllm_slots)
        LoRAResolverRegistry.register_resolver(_NAME, PoolResolver(location, settings))


class PoolResolver:
    """Finds the adapters of pinned names; a `LoRAResolver` of vLLM's by its one method."""

    def __init__(self, location: str, settings: Settings) -> None:
        """Remember where the pool is; it is opened later."""
        self._location = location
        self.settings = settings
        self.max_rank: int | None = None  # of vLLM, once it is known
        self.slots: int | None = None
        self.names: set[str] = set()  # that were resolved, and not let go
        self._opening = threading.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """The adapter of a name, as a `LoRARequest`; None where the name is not in the pool.

        Raises:
            VLLMValidationError: the name is one of the pool's, and cannot be answered.
            GracefulHTTPError: the pool cannot be read now.
        """
        from vllm.exceptions import GracefulHTTPError, VLLMValidationError

        try:
            return await asyncio.to_thread(self._resolve, lora_name)
        except AdapterNotFoundError as error:
            _log.info("%s", error)
            return None
        except InvalidInputError as error:
            raise VLLMValidationError(str(error)) from error
        except LoraRetrieverError as error:
            _log.error("%s: %s", type(error).__name__, error)
            raise GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from error

    @property
    def folders(self) -> AdapterFolders:
        """What makes the adapters."""
        with self._opening:
            return self._folders

    def _resolve(self, name: str) -> Any:
        from vllm.lora.request import LoRARequest

        from loraretriever.compose.lanes import lane_path
        from loraretriever.compose.pinned import adapter_id, parse_pinned

        try:
            parse_pinned(name)
        except InvalidInputError:
            self._check_not_ours(name)
            return None
        if self.settings.vllm_lanes:
            path = lane_path(self.folders.lane(name, self.slots))
        else:
            path = str(self.folders.folder(name, self.max_rank))
        self.names.add(name)
        return LoRARequest(name, adapter_id(name), path)

    def touch(self, path: str) -> bool:
        """Note that an adapter that was found is used; whether its files are still there."""
        from loraretriever.compose.lanes import read_lane

        return all([self.folders.touch(Path(folder)) for folder in read_lane(path).folders])

    def _check_not_ours(self, name: str) -> None:
        """Refuse names that the pool has, but whose bytes may change.

        Raises:
            InvalidInputError: it is one.
        """
        from loraretriever.compose import compose_explicit
        from loraretriever.compose.canonical import parse_composition

        try:
            strategy, weights = parse_composition(name)
            composition = compose_explicit(strategy or "mixture", weights)
        except InvalidInputError:
            return
        pinned = self.folders.pinned(composition)
        raise InvalidInputError(
            f"the model {name!r:.200} is in the pool, but its adapters may change while vLLM keeps what it has of that "
            f"name; expected a name with their digests. Ask for {pinned}, or ask LoraRetriever's server."
        )

    @cached_property
    def _folders(self) -> AdapterFolders:
        from loraretriever.compose.folders import open_folders

        return open_folders(self._pool, self.settings.vllm_cache_mib)

    @cached_property
    def _pool(self) -> Pool:
        from loraretriever.pool import Pool

        return Pool.open(self._location)


class Endpoint:
    """An `EndpointPlugin` of vLLM's: a route that tells what gateways must know, and bounded names."""

    name = "loraretriever"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        """VLLM makes one, without arguments."""
        self._info: dict[str, Any] = {}

    def attach_router(self, app: Any) -> None:
        """Add the route."""

        async def info() -> dict[str, Any]:
            return self._info

        app.add_api_route(INFO_PATH, info, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Look at what vLLM was started with."""
        from vllm.lora.resolver import LoRAResolverRegistry
        from vllm.platforms import current_platform

        from loraretriever import __version__

        models = state.openai_serving_models
        has_pool = _NAME in LoRAResolverRegistry.get_supported_resolvers() and bool(args.enable_lora)
        slots, lanes = args.max_loras, False
        if has_pool:
            resolver: PoolResolver = LoRAResolverRegistry.get_resolver(_NAME)
            lanes, limit = resolver.settings.vllm_lanes, resolver.settings.vllm_names
            slots = resolver.settings.vllm_slots or slots if lanes else slots
            resolver.max_rank, resolver.slots = args.max_lora_rank, slots
            models.lora_requests = RecentNames(resolver, limit, models.lora_requests, models.lora_resolver_lock)
        served = models.base_model_paths[0].name
        self._info = {
            "version": __version__,
            "model": served,
            "max_length": models.model_config.max_model_len,
            "pool": has_pool,
            "max_rank": args.max_lora_rank,
            "slots": slots,
            "lanes": lanes,
            # On a CPU vLLM gives rows without an adapter that of the last slot, when others of their batch have one.
            "base": "base" if current_platform.is_cpu() and not lanes else served,
        }


class RecentNames(OrderedDict[str, Any]):
    """vLLM's names of adapters, in place of its dictionary, which keeps each name for ever.

    Of the names that the resolver found, those used last stay. A name is only known as long as its files are there:
    otherwise it is resolved again.
    """

    def __init__(self, resolver: PoolResolver, limit: int, names: dict[str, Any], locks: dict[str, Any]) -> None:
        """Begin with vLLM's own names; `locks` are those of vLLM, one for each name."""
        super().__init__()
        self._resolver = resolver
        self._limit = limit
        self._locks = locks
        self.update(names)

    def __contains__(self, name: object) -> bool:
        """Whether a name is known; it is used now, then."""
        if not super().__contains__(name):
            return False
        if name in self._resolver.names:
            if not self._resolver.touch(super().__getitem__(name).lora_path):
                del self[name]
                return False
            self.move_to_end(str(name))
        return True

    def __setitem__(self, name: str, request: Any) -> None:
        """Keep a name; others may have to go."""
        super().__setitem__(name, request)
        ours = self._resolver.names
        while len(ours) > self._limit:
            del self[next(each for each in self if each in ours)]

    def __delitem__(self, name: str) -> None:
        """Let a name go, and its lock, if nobody holds it."""
        super().__delitem__(name)
        self._resolver.names.discard(name)
        if (lock := self._locks.get(name)) is not None and not lock.locked():
            del self._locks[name]
