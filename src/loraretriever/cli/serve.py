"""`loraretriever serve`: the HTTP server."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraretriever import console
from loraretriever.cli.options import (
    BaseModelOption,
    DeviceOption,
    DtypeOption,
    EncoderOption,
    EngineOption,
    JsonOption,
    KOption,
    RetrieverOption,
    StrategyOption,
    ThresholdOption,
    VllmUrlOption,
    WeightingOption,
)
from loraretriever.config import load_cluster_settings, load_server_settings, load_settings, read_settings_file
from loraretriever.errors import InvalidInputError, require_extra

if TYPE_CHECKING:
    from loraretriever.config import ClusterSettings
    from loraretriever.server.run import Plan

_log = logging.getLogger(__name__)


def serve(
    pool: Annotated[
        str | None,
        typer.Option(
            envvar="LORARETRIEVER_POOL",
            help="The pool's folder, or its URL.",
            metavar="DIR_OR_URL",
            show_default="that of --config",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(envvar="LORARETRIEVER_CONFIG", help="TOML file with settings, also such as have no option here."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen at; 0.0.0.0: all of this machine.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[int | None, typer.Option(help="0: any free one.", show_default="8000")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes, each with models of its own.", show_default="1")
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Serve on Ray: one of this machine's own, or that of RAY_ADDRESS.")
    ] = False,
    replicas: Annotated[
        int | None, typer.Option(help="With --cluster: engines, each with a model of its own.", show_default="1")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="With --cluster: engines at most, when many requests run.", show_default="none")
    ] = None,
    engine: EngineOption = None,
    vllm_url: VllmUrlOption = None,
    base_model: BaseModelOption = None,
    encoder: EncoderOption = None,
    retriever: RetrieverOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    k: KOption = None,
    threshold: ThresholdOption = None,
    strategy: StrategyOption = None,
    weighting: WeightingOption = None,
    slots: Annotated[int | None, typer.Option(help="Adapters in memory at once.", show_default="32")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts in one batch at most.", show_default="32")] = None,
    queue: Annotated[int | None, typer.Option(help="Prompts that may wait.", show_default="1024")] = None,
    cache_mib: Annotated[
        int | None, typer.Option(help="MiB of memory for keys and values.", show_default="2048")
    ] = None,
    adapter_root: Annotated[
        Path | None, typer.Option(help="Adapters may be added from folders below this one.", show_default="none")
    ] = None,
    allow_hub: Annotated[
        bool | None,
        typer.Option("--allow-hub/--no-hub", help="Adapters may be added from the hub.", show_default="allowed"),
    ] = None,
    default_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer, if the request names no number.", show_default="512")
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds after which a request ends.", show_default="600")
    ] = None,
    shutdown_seconds: Annotated[
        float | None, typer.Option(help="Seconds that running requests have at the end.", show_default="30")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
    log_format: Annotated[
        str | None, typer.Option(help="json, text; auto: text on a terminal.", show_default="auto")
    ] = None,
    log_prompts: Annotated[
        bool | None, typer.Option("--log-prompts", help="Put prompts into the log.", show_default="no")
    ] = None,
    otlp_endpoint: Annotated[str | None, typer.Option(help="Where traces go.", show_default="nowhere")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may call the server (repeatable).")
    ] = None,
    root_path: Annotated[
        str | None, typer.Option(help="Path that a proxy takes away before it passes requests on.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a pool over HTTP, by OpenAI's API. Stops at SIGTERM or Ctrl-C, after running requests; twice: at once."""
    file = None if config is None else read_settings_file(config)
    settings = load_settings(
        file, base_model=base_model, encoder=encoder, retriever=retriever, device=device, dtype=dtype, k=k,
        threshold=threshold, strategy=strategy, weighting=weighting, slots=slots, batch_size=batch_size, queue=queue,
        cache_mib=cache_mib, engine=engine, vllm_urls=vllm_url or None,
    )  # fmt: skip
    server = load_server_settings(
        file, host=host, port=port, workers=workers, adapter_root=adapter_root, allow_hub=allow_hub,
        default_tokens=default_tokens, request_timeout=request_timeout, shutdown_seconds=shutdown_seconds,
        log_level=log_level, log_format=log_format, log_prompts=log_prompts, otlp_endpoint=otlp_endpoint,
        cors_origins=cors_origin or None, root_path=root_path,
    )  # fmt: skip
    spread = load_cluster_settings(file, replicas=replicas, max_replicas=max_replicas) if cluster else None
    if not cluster and (replicas or max_replicas):
        raise InvalidInputError("--replicas and --max-replicas are for Ray; add --cluster, or use --workers instead.")
    place = pool or (file and file.pool)
    if not place:
        raise InvalidInputError(
            'no pool is named; expected --pool DIR_OR_URL, LORARETRIEVER_POOL in the environment, or pool = "DIR" '
            "at the beginning of the file that --config names."
        )
    with require_extra("serve"):
        for package in ("fastapi", "httptools", "prometheus_client", "python_multipart", "uvicorn", "uvloop"):
            import_module(package)
    from loraretriever.server.run import Plan

    plan = Plan(place, settings, server)
    if spread is None:
        _serve(plan, as_json)
    else:
        _serve_on_ray(plan, spread, as_json)


def _serve(plan: Plan, as_json: bool) -> None:
    from loraretriever.server import logs
    from loraretriever.server.processes import serve_in_workers
    from loraretriever.server.run import serve_here
    from loraretriever.server.sockets import listen, url_of

    has_keys = _check_pool(plan)
    with listen(plan.server.host, plan.server.port) as listener:
        logs.configure(plan.server.log_level, plan.server.log_format)
        url = url_of(listener)
        _log.info("listening at %s; loading the models", url)
        on_ready = _announcer(plan, url, has_keys, as_json)
        if plan.server.workers == 1:
            serve_here(plan, listener, on_ready)
        else:
            serve_in_workers(plan, listener, on_ready)


def _serve_on_ray(plan: Plan, cluster: ClusterSettings, as_json: bool) -> None:
    from loraretriever.cluster.local import serve_on_ray
    from loraretriever.server import logs
    from loraretriever.server.sockets import listen, url_of

    has_keys = _check_pool(plan)
    with listen(plan.server.host, plan.server.port) as listener:  # whether the port is free, and which one 0 means
        url = url_of(listener)
        plan = replace(plan, server=replace(plan.server, port=listener.getsockname()[1]))
    logs.configure(plan.server.log_level, plan.server.log_format)
    _log.info("starting Ray; the server will listen at %s", url)
    serve_on_ray(plan, cluster, _announcer(plan, url, has_keys, as_json, replicas=cluster.replicas))


def _check_pool(plan: Plan) -> bool:
    """Whether the pool has keys. Without any, only this machine may be served.

    Raises:
        PoolError: there is no pool.
        InvalidInputError: other machines would be served without keys.
    """
    from loraretriever.pool import Pool, shown_location
    from loraretriever.server.sockets import is_loopback, resolve_address

    _, (address, _) = resolve_address(plan.server.host, plan.server.port)
    with Pool.open(plan.pool) as opened:
        console.print_problems(opened.problems)
        has_keys = opened.keys.exist()
    place = shown_location(plan.pool)
    if is_loopback(address):
        return has_keys
    if not has_keys:
        raise InvalidInputError(
            f"the pool {place} has no API keys, and everybody could use a server at {plan.server.host}; make a "
            f"key with: loraretriever keys create LABEL --pool {place}, "
            "or serve this machine only, with --host 127.0.0.1."
        )
    console.print_note(
        f"serving other machines at {plan.server.host} without TLS: keys and prompts can be read on the way unless a "
        "proxy with TLS stands before this server."
    )
    return has_keys


def _announcer(plan: Plan, url: str, has_keys: bool, as_json: bool, **more: int) -> Callable[[], None]:
    """Tells on standard output that the server is ready."""
    from loraretriever.pool import shown_location

    place = shown_location(plan.pool)

    def announce() -> None:
        if as_json:
            told = {"url": url, "pool": place, "workers": plan.server.workers, "keys": has_keys}
            console.print_json({**told, **more, "pid": os.getpid()})
        else:
            console.print_plain(f"serving {place} at {url}")
            if not has_keys:
                console.print_plain("no API keys are configured: programs on this machine may do everything")

    return announce
