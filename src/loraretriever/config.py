"""Settings: from arguments, the environment and a TOML file, in this order.

The environment is read here; only the command line's `--pool` and `--config` name their own variables, too.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from loraretriever.errors import InvalidInputError

ENVIRONMENT_PREFIX = "LORARETRIEVER_"
_OTHER_VARIABLES = {ENVIRONMENT_PREFIX + name for name in ("POOL", "CACHE", "CONFIG")}
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
# LoraRetriever (arXiv 2402.09997), section 3.2: the instruction put before samples and prompts alike.
PAPER_INSTRUCTION = "Represent the sentence for similar task retrieval: "


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _is_server(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise ValueError("expected the address of a vLLM server, such as http://127.0.0.1:8001")
    return text.rstrip("/").removesuffix("/v1")


_Servers = Annotated[tuple[Annotated[str, AfterValidator(_is_server)], ...], BeforeValidator(_split_commas)]
_Folders = Annotated[tuple[Path, ...], BeforeValidator(_split_commas)]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Settings:
    """How a LoraRetriever works. Each field can be set by the environment: `LORARETRIEVER_` and its name in capitals.

    `base_model` None takes the pool's; `encoder` None the pool's, or else `DEFAULT_ENCODER`. `retriever` is `hybrid`,
    some of its parts (`dense`, `sparse`, `dense+sparse`), or `paper`. `instruction` None: the paper's for the paper's
    formula, else none. The base model answers where the fit is below `threshold`; None takes the retriever's, which
    for the hybrid lets through all but the share `false_fallback` of prompts like the pool's samples, if their
    cosines were lower by `drift`, as those of prompts in other words are (0: no allowance). With `fallback` "mixture"
    the k hits answer there too, all with the same weight: for pools where every prompt is close to some task. Of the k
    hits those are used that together have the share `coverage` of the weight. `weighting_temperature` divides the
    logits that become weights. `precision` of the hybrid's encoder is `int8`, `float32`, or `auto`: `int8` on a CPU
    that has instructions for it (VNNI); `max_tokens` the most that it reads of a prompt. The sizes from `slots` to
    `queue`, and `routers`, folders of trained ones with commas between them, are those of `engine.local.LocalEngine`.
    Of a shared pool's adapters, the cache folder may hold `disk_mib`.

    With `engine` "vllm", vLLM answers: the servers at `vllm_urls` (with commas between them; `vllm_key` is their API
    key), or without any vLLM in this process, with `slots` adapters of rank `vllm_rank` at most. A server that sends
    nothing for `vllm_timeout` seconds is asked whether it lives. Weights are rounded to multiples of `weight_step` (0:
    not at all), so that compositions come again; None: 0.05 where vLLM needs an adapter made for each composition, else
    0. With `vllm_reduce` a mixture of too large a rank is reduced to the largest. Composed adapters take
    `vllm_cache_mib` on the disk.

    vLLM's plug-in reads the last four settings: with `vllm_lanes` vLLM composes adapters in its batch, and none are
    made, for `vllm_slots` adapters at once (0: vLLM's --max-loras); `vllm_names` names are known at a time.
    """

    base_model: str | None = None
    retriever: str = "hybrid"
    encoder: str | None = None
    instruction: str | None = None
    precision: Literal["auto", "float32", "int8"] = "auto"
    max_tokens: int = Field(default=64, ge=8)
    k: int = Field(default=3, ge=1)
    threshold: float | None = Field(default=None, allow_inf_nan=False)
    false_fallback: float = Field(default=0.01, ge=0, lt=1)
    drift: float = Field(default=0.07, ge=0, lt=1)
    coverage: float = Field(default=0.95, gt=0, le=1)
    fallback: Literal["base", "mixture"] = "base"
    strategy: str = "mixture"
    weighting: str = "score"
    weighting_temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    device: str = "cpu"
    dtype: str = "auto"
    slots: int = Field(default=32, ge=1)
    batch_size: int = Field(default=32, ge=1)
    step_tokens: int = Field(default=256, ge=1)
    cache_mib: int = Field(default=2048, ge=1)
    prefix_mib: int = Field(default=256, ge=0)
    host_mib: int = Field(default=1024, ge=0)
    disk_mib: int = Field(default=16384, ge=0)
    queue: int = Field(default=1024, ge=1)
    routers: _Folders = ()
    engine: Literal["local", "vllm"] = "local"
    weight_step: float | None = Field(default=None, ge=0, le=0.5)
    vllm_urls: _Servers = ()
    vllm_key: str | None = Field(default=None, repr=False)
    vllm_timeout: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    vllm_rank: int = Field(default=64, ge=1)
    vllm_reduce: bool = False
    vllm_cache_mib: int = Field(default=4096, ge=0)
    vllm_lanes: bool = False
    vllm_slots: int = Field(default=0, ge=0)
    vllm_names: int = Field(default=1000, ge=1)


def _is_origin(text: str) -> str:
    parts = urlsplit(text)
    if text != "*" and (parts.scheme not in ("http", "https") or text != f"{parts.scheme}://{parts.netloc}"):
        raise ValueError("expected * or an origin such as https://app.example.com, without a path")
    return text


def _is_http_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError("expected an address that begins with http:// or https://")
    return text


def _is_root_path(text: str) -> str:
    if text and (not text.startswith("/") or text.endswith("/")):
        raise ValueError("expected nothing, or a path that begins with a slash and ends without one, such as /models")
    return text


_Origins = Annotated[tuple[Annotated[str, AfterValidator(_is_origin)], ...], BeforeValidator(_split_commas)]
_Seconds = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class ServerSettings:
    """How the server works. Each field can be set by the environment: `LORARETRIEVER_` and its name in capitals.

    `port` 0 takes any free one. Each of the `workers` is a process with models of its own. Adapters may be added from
    folders below `adapter_root` (None: from none), and from the Hugging Face hub if `allow_hub`. A request gets an
    answer of `default_tokens` tokens at most when it names no number, and ends after `request_timeout` seconds. Its
    body may have `max_body_mib`, the files of an adapter `max_upload_mib`, and it may hold `max_prompts` prompts. When
    the server is told to stop, running requests have `shutdown_seconds` to end. A plain folder of adapters is looked
    at again every `refresh_seconds`. `log_prompts` puts prompts and answers into the log. Traces go to
    `otlp_endpoint`. `metrics` and `page` turn /metrics and the page at / on and off. Pages of `cors_origins` may call
    the server from a browser. `root_path` is the path that a proxy puts before ours and takes away.
    """

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    workers: int = Field(default=1, ge=1, le=256)
    adapter_root: Path | None = None
    allow_hub: bool = True
    request_timeout: _Seconds = Field(default=600.0, gt=0)
    default_tokens: int = Field(default=512, ge=1)
    max_body_mib: int = Field(default=4, ge=1)
    max_upload_mib: int = Field(default=1024, ge=1)
    max_prompts: int = Field(default=64, ge=1)
    shutdown_seconds: _Seconds = Field(default=30.0, ge=0)
    refresh_seconds: _Seconds = Field(default=2.0, gt=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "text"] = "auto"
    log_prompts: bool = False
    otlp_endpoint: Annotated[str, AfterValidator(_is_http_url)] | None = None
    metrics: bool = True
    page: bool = True
    cors_origins: _Origins = ()
    root_path: Annotated[str, AfterValidator(_is_root_path)] = ""


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class ClusterSettings:
    """How the server is spread over a Ray cluster. Each field can be set by the environment, as those of the server.

    There are `replicas` of the engine, or more, up to `max_replicas` (None: never), so that each has about
    `target_requests` (None: the engine's batch size) at once. Replicas are added when there have been too few for
    `upscale_seconds`, and taken away when there have been too many for `downscale_seconds`. A replica has a copy of the
    base model, `replica_cpus` threads and `replica_gpus` GPUs. With `affinity` requests prefer replicas where their
    adapters are at hand. `ingresses` route and compose.
    """

    replicas: int = Field(default=1, ge=1, le=1024)
    max_replicas: int | None = Field(default=None, ge=1, le=1024)
    target_requests: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    upscale_seconds: _Seconds = Field(default=30.0, ge=0)
    downscale_seconds: _Seconds = Field(default=600.0, ge=0)
    replica_cpus: int = Field(default=1, ge=1)
    replica_gpus: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    affinity: bool = True
    ingresses: int = Field(default=1, ge=1, le=256)


@dataclasses.dataclass(frozen=True, slots=True)
class SettingsFile:
    """What a TOML file holds: `pool`, fields of `Settings`, and in tables those of the server's and the cluster's."""

    path: Path
    pool: str | None
    settings: Mapping[str, Any]
    server: Mapping[str, Any]
    cluster: Mapping[str, Any]


_FIELDS = tuple(field.name for field in dataclasses.fields(Settings))
_SERVER_FIELDS = tuple(field.name for field in dataclasses.fields(ServerSettings))
_CLUSTER_FIELDS = tuple(field.name for field in dataclasses.fields(ClusterSettings))


def read_settings_file(path: Path) -> SettingsFile:
    """Read a TOML file. Relative paths in it are relative to its folder; so are models that are folders there.

    Raises:
        InvalidInputError: the file cannot be read, or has a key that is no setting.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"cannot read the settings in {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise InvalidInputError(f"{path} is not TOML in UTF-8: {error}.") from error
    server, cluster = (_table(path, name, values.pop(name, {})) for name in ("server", "cluster"))
    _check_keys(path, "", values, ("pool", *_FIELDS, "[server]", "[cluster]"))
    _check_keys(path, "server.", server, _SERVER_FIELDS)
    _check_keys(path, "cluster.", cluster, _CLUSTER_FIELDS)
    folder = path.absolute().parent
    pool = values.pop("pool", None)
    if pool is not None and not isinstance(pool, str):
        raise InvalidInputError(f"{path}: pool is {pool!r}; expected the pool's folder, or its URL.")
    if isinstance(server.get("adapter_root"), str):
        server["adapter_root"] = str(folder / Path(server["adapter_root"]).expanduser())
    for name in ("base_model", "encoder"):
        if isinstance(values.get(name), str) and (folder / Path(values[name]).expanduser()).is_dir():
            values[name] = str(folder / Path(values[name]).expanduser())
    routers = _split_commas(values.get("routers"))
    if isinstance(routers, list) and all(isinstance(router, str) for router in routers):  # else it is refused later
        values["routers"] = [str(folder / Path(router).expanduser()) for router in routers]
    if pool and "://" not in pool:
        pool = str(folder / Path(pool).expanduser())
    return SettingsFile(path, pool, values, server, cluster)


def load_settings(file: SettingsFile | None = None, /, **overrides: Any) -> Settings:
    """Settings from the file, then from the environment, then from the overrides that are not None.

    Raises:
        InvalidInputError: an unknown name, or a value of the wrong type or range.
    """
    return _load(Settings, _placed(file.settings, f" in {file.path}") if file else {}, overrides)


def load_server_settings(file: SettingsFile | None = None, /, **overrides: Any) -> ServerSettings:
    """The server's settings, as `load_settings`.

    Raises:
        InvalidInputError: an unknown name, or a value of the wrong type or range.
    """
    return _load(ServerSettings, _placed(file.server, f" of [server] in {file.path}") if file else {}, overrides)


def load_cluster_settings(file: SettingsFile | None = None, /, **overrides: Any) -> ClusterSettings:
    """The cluster's settings, as `load_settings`.

    Raises:
        InvalidInputError: an unknown name, a value of the wrong type or range, or fewer replicas at most than at least.
    """
    settings = _load(ClusterSettings, _placed(file.cluster, f" of [cluster] in {file.path}") if file else {}, overrides)
    if settings.max_replicas is not None and settings.max_replicas < settings.replicas:
        raise InvalidInputError(
            f"max_replicas is {settings.max_replicas}; expected at least replicas, which is {settings.replicas}."
        )
    return settings


_Loaded = TypeVar("_Loaded", Settings, ServerSettings, ClusterSettings)
_Placed = dict[str, tuple[Any, str]]  # name -> value, where it was found


def _placed(values: Mapping[str, Any], place: str) -> _Placed:
    return {name: (value, place) for name, value in values.items()}


def _load(kind: type[_Loaded], from_file: _Placed, overrides: Mapping[str, Any]) -> _Loaded:
    _check_environment()
    names = [field.name for field in dataclasses.fields(kind)]
    merged = dict(from_file)
    for name in names:
        variable = _variable(name)
        if variable in os.environ:
            merged[name] = os.environ[variable], f" in the environment ({variable})"
    merged |= _placed({name: value for name, value in overrides.items() if value is not None}, "")
    try:
        return TypeAdapter(kind).validate_python({name: value for name, (value, _) in merged.items()})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        value, place = merged[name]
        raise InvalidInputError(
            f"setting {name}{place} is {value!r}: {first['msg']}. Known settings: {', '.join(names)}."
        ) from error


def named_by_environment(name: Literal["POOL", "CONFIG"]) -> str | None:
    """The pool or the settings file that the environment names."""
    return os.environ.get(ENVIRONMENT_PREFIX + name) or None


def ray_address() -> str | None:
    """The Ray cluster that the environment names, by Ray's own variable."""
    return os.environ.get("RAY_ADDRESS") or None


def _table(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidInputError(f"{path}: {name} is {value!r}; expected a table, which begins with [{name}].")
    return value


def _check_keys(path: Path, prefix: str, values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in values:
        if name not in known:
            raise InvalidInputError(f"{path}: {prefix}{name} is no setting; expected one of {', '.join(known)}.")


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


def _check_environment() -> None:
    known = {*map(_variable, (*_FIELDS, *_SERVER_FIELDS, *_CLUSTER_FIELDS)), *_OTHER_VARIABLES}
    for name in os.environ:
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known:
            raise InvalidInputError(
                f"the environment has {name}={os.environ[name]!r}, which is no setting; expected one of "
                f"{', '.join(sorted(known))}. Unset it."
            )


def cache_folder() -> Path:
    """Folder for what can be made again: converted models, databases of read-only pools.

    `LORARETRIEVER_CACHE`, else `loraretriever` below `XDG_CACHE_HOME` or `~/.cache`.
    """
    chosen = os.environ.get(ENVIRONMENT_PREFIX + "CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loraretriever"
