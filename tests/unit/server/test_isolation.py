"""What a tenant gets does not depend on other tenants: every route of the server, byte for byte.

Two servers differ in one thing: a tenant, globex, has adapters in the second one, nearly the same as those of another,
acme. The same requests go to both, and the answers must be equal but for ids and times.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from loraretriever.config import ServerSettings
from tiny import lora_tensors, write_peft_folder
from unit.server.conftest import Served, make_pool, serving

HIDDEN, MISSING = "zzyzx", "qqqqq"  # globex has the first one in the second server; nobody has the other
PROMPT = "Write a query that counts the users."
OWN = [PROMPT, "Write a query for all orders.", "Select every customer by city."]
NEARLY = [PROMPT, "Write a query for all orders.", "Select every xylophone by city."]
SCOPES = ["generate", "route", "pool:read", "pool:write"]
CALLERS: dict[str, tuple[str | None, list[str]]] = {
    "acme": ("acme", SCOPES),  # has adapters
    "acme's administrator": ("acme", ["admin"]),
    "initech": ("initech", SCOPES),  # has none
    "nobody": (None, SCOPES),
}
# Of globex, and of nobody else.
SECRETS = ["globex", "xylophone", "classified", "trade secret", "turned-off"]


@dataclass(frozen=True)
class Case:
    """A request; `name` is the adapter that it names in the place where others name another."""

    operation: str
    path: str
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def key(self) -> str:
        """Tells it from others of its caller, but for the name."""
        text = f"{self.operation} {self.path} {json.dumps(self.options, default=repr, sort_keys=True)}"
        return text.replace(self.name, "NAME") if self.name else text


@dataclass(frozen=True)
class Answer:
    case: Case
    status: int
    headers: dict[str, str]
    text: str


@dataclass
class Walk:
    """What one server answered, by caller."""

    answers: dict[str, list[Answer]]
    operations: set[str]
    digests: list[str] = field(default_factory=list)  # of globex's adapters


def with_one_other_number() -> dict[str, np.ndarray]:
    tensors = lora_tensors(seed=5)
    first = next(iter(tensors))
    tensors[first] = tensors[first].copy()
    tensors[first][0, 0] += 1e-3
    return tensors


def reading(name: str) -> Iterator[Case]:
    """Requests that name an adapter, and change nothing."""
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3, "temperature": 0}
    for options in (
        {"model": name},
        {"model": f"mixture({name}=0.5,german=0.5)"},
        {"lora": {"adapters": [name]}},
        {"lora": {"adapters": {name: 1.0}}},
        {"lora": {"only": [name]}},
        {"lora": {"exclude": [name]}},
    ):
        yield Case("POST /v1/chat/completions", "/v1/chat/completions", {"json": chat | options}, name)
    completion = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "model": name}
    yield Case("POST /v1/completions", "/v1/completions", {"json": completion}, name)
    for options in ({"only": [name]}, {"exclude": [name], "explain": True}):
        yield Case("POST /v1/route", "/v1/route", {"json": {"input": PROMPT, **options}}, name)
    yield Case("POST /v1/embeddings", "/v1/embeddings", {"json": {"input": PROMPT, "model": name}}, name)
    for side in ("right", "wrong"):
        yield Case("POST /v1/feedback", "/v1/feedback", {"json": {"prompt": PROMPT, side: name}}, name)
    yield Case("GET /v1/models/{name}", f"/v1/models/{name}", {}, name)
    yield Case("GET /v1/adapters/{name}", f"/v1/adapters/{name}", {}, name)
    yield Case("GET /v1/adapters/{name}/samples", f"/v1/adapters/{name}/samples", {}, name)
    yield Case("GET /v1/adapters", f"/v1/adapters?query={name}", {}, name)


def writing(name: str) -> Iterator[Case]:
    """Requests that change an adapter, or remove it."""
    path = f"/v1/adapters/{name}"
    yield Case("PATCH /v1/adapters/{name}", path, {"json": {"description": "new", "tags": ["t"]}}, name)
    yield Case("POST /v1/adapters/{name}/samples", f"{path}/samples", {"json": {"samples": ["Any more?"]}}, name)
    yield Case("PUT /v1/adapters/{name}/samples", f"{path}/samples", {"json": {"samples": ["Only this."]}}, name)
    yield Case("DELETE /v1/adapters/{name}", path, {}, name)
    unload = {"json": {"lora_name": name}}
    yield Case("POST /v1/unload_lora_adapter", "/v1/unload_lora_adapter", unload, name)


def cases(folder: Path) -> Iterator[Case]:
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4, "temperature": 0}
    lora: list[dict[str, Any]] = [{}, {"explain": True}, {"k": 10, "strategy": "fusion"}, {"tags": ["classified"]}]
    for options in lora:
        yield Case("POST /v1/chat/completions", "/v1/chat/completions", {"json": chat | {"lora": options}})
        yield Case("POST /v1/route", "/v1/route", {"json": {"input": OWN, "map": True, **options}})
    yield Case("POST /v1/chat/completions", "/v1/chat/completions", {"json": chat | {"lora": {"tenant": "globex"}}})
    yield Case("POST /v1/chat/completions", "/v1/chat/completions", {"json": chat | {"stream": True, "logprobs": True}})
    yield Case(
        "POST /v1/completions", "/v1/completions", {"json": {"prompt": NEARLY, "max_tokens": 3, "temperature": 0}}
    )
    yield Case("POST /v1/route", "/v1/route", {"json": {"input": NEARLY, "k": 20, "explain": True}})
    yield Case("POST /v1/embeddings", "/v1/embeddings", {"json": {"input": NEARLY}})
    for path in (
        "/health",
        "/ready",
        "/metrics",
        "/v1/stats",
        "/v1/models",
        "/v1/map",
        "/v1/keys/me",
        "/v1/jobs",
        "/v1/feedback",
    ):
        yield Case(f"GET {path}", path)
    decision = {"json": {"ids": [1], "decision": "approve"}}
    yield Case("POST /v1/feedback/decisions", "/v1/feedback/decisions", decision)
    yield Case("GET /v1/jobs/{id}", f"/v1/jobs/{'0' * 32}")
    for query in ("", "?tag=classified", "?query=trade", "?limit=1", "?limit=1&after=german"):
        yield Case("GET /v1/adapters", f"/v1/adapters{query}")
    for name in ("sql", "german", "auto", HIDDEN, MISSING, f"globex:{HIDDEN}", f"globex:{MISSING}"):
        yield from reading(name)
    for name in (HIDDEN, MISSING, f"globex:{HIDDEN}", f"globex:{MISSING}"):
        yield from writing(name)
    yield from changes(folder)


def changes(folder: Path) -> Iterator[Case]:
    """A name that globex has, and the very files that globex has."""
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
        "samples": b'{"inputs": "What is the weather like?"}\n',
    }
    add, load = "POST /v1/adapters", "POST /v1/load_lora_adapter"
    for name in (HIDDEN, f"globex:{HIDDEN}", "sqll"):
        upload = {"files": files, "data": {"name": name}}
        yield Case(add, "/v1/adapters?wait=true", upload)
        yield Case(add, "/v1/adapters?wait=true", upload | {"data": {"name": name, "tenant": "globex"}})
        yield Case(add, "/v1/adapters", {"json": {"source": f"owner/{name}"}})
        yield Case(load, "/v1/load_lora_adapter", {"json": {"lora_name": name, "lora_path": "owner/x"}})
    yield Case("GET /v1/jobs", "/v1/jobs")
    yield from after_adding()


def after_adding() -> Iterator[Case]:
    """The names are the caller's own now."""
    for name in (HIDDEN, "sqll"):
        yield from reading(name)
        yield from writing(name)


def answer(client: httpx.Client, case: Case) -> Answer:
    method = case.operation.partition(" ")[0]
    got = client.request(method, case.path, **case.options)
    passing = {"date", "content-length", "x-request-id", "x-lora-retrieve-ms", "location"}
    headers = {name: value for name, value in got.headers.items() if name not in passing}
    return Answer(case, got.status_code, headers, masked(got.text))


def masked(text: str) -> str:
    text = re.sub(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", "ID", text)
    text = re.sub(r'"(created|updated|milliseconds|retrieve|queue|first_token|total)":\s*[0-9.e-]+', r'"\1":0', text)
    return text


def add_globex(served: Served, folder: Path, base: str) -> list[str]:
    """All that globex does: adapters, jobs, requests like those that others will send."""
    pool = served.retriever.pool
    key, _ = pool.keys.create("globex", SCOPES, "globex")
    nearly = write_peft_folder(folder / "nearly", base_model=base, tensors=with_one_other_number())
    off = write_peft_folder(folder / "off", base_model=base, seed=77)
    details: dict[str, Any] = {"tenant": "globex", "tags": ["classified"], "description": "A trade secret."}
    found = [pool.add(nearly, name="globex:sql", samples=NEARLY, **details).adapter]
    found.append(pool.add(off, name="globex:turned-off", samples=["Play the xylophone."], **details).adapter)
    pool.add(folder / "hidden", name=f"globex:{HIDDEN}", samples=["Tune the xylophone."], **details)
    pool.set_enabled("globex:turned-off", False)
    pool.jobs.fail(pool.jobs.create("add", "globex", "globex:sql").id, "the xylophone is out of tune", "classified")
    with served.client(key) as client:
        for case in cases(folder / "hidden"):
            if case.operation.startswith("POST /v1/c") or case.operation == "POST /v1/route":
                client.post(case.path, **case.options)
        answer = client.post("/v1/route", json={"input": "Select every xylophone by city."}).json()
        assert answer["data"][0]["hits"][0]["adapter"] == "sql", "globex has what others must not notice"
    return [adapter.digest for adapter in found]


def walk(folder: Path, models: Path, with_globex: bool) -> Walk:
    base = str(models / "base")
    pool = make_pool(folder, models, ("german", "math"))
    own = write_peft_folder(folder / "own", base_model=base, tensors=lora_tensors(seed=5))
    hidden = write_peft_folder(folder / "hidden", base_model=base, seed=8)
    with serving(pool, models, ServerSettings(allow_hub=False)) as served:
        store, found = served.retriever.pool.keys, Walk({}, set())
        served.retriever.pool.add(own, name="acme:sql", tenant="acme", samples=OWN)
        if with_globex:
            found.digests = add_globex(served, folder, base)
        for caller, (tenant, scopes) in CALLERS.items():
            secret, _ = store.create(caller, scopes, tenant)
            with served.client(secret) as client:
                found.answers[caller] = list(answers(served, client, tenant or "", hidden))
        schema = httpx.get(f"{served.url}/openapi.json").json()
        found.operations = {
            f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods
        }
        if with_globex:
            check_operator(served, store.create("operator", ["admin"])[0])
            check_globex(served, store.create("globex again", SCOPES, "globex")[0])
    return found


def answers(served: Served, client: httpx.Client, view: str, folder: Path) -> Iterator[Answer]:
    seen = None
    for case in cases(folder):
        if (change := served.retriever.pool.change) != seen:
            settle(served, view)
            seen = change
        yield answer(client, case)


def settle(served: Served, view: str) -> None:
    """Until all that is learnt in the background is learnt: scores depend on it."""
    served.retriever.route(["warm up"], tenant=view)
    served.retriever._views.of(view).settle()  # type: ignore[attr-defined]


def check_operator(served: Served, secret: str) -> None:
    with served.client(secret) as client:
        names = [each["name"] for each in client.get("/v1/adapters").json()["data"]]
        assert {"acme:sql", "globex:sql", f"globex:{HIDDEN}"} <= set(names)
        assert "globex" in {each["tenant"] for each in client.get("/v1/adapters").json()["data"]}
        assert client.get(f"/v1/adapters/globex:{HIDDEN}").json()["tenant"] == "globex"


def check_globex(served: Served, secret: str) -> None:
    """Others added and removed adapters of the same names and of the same bytes: globex's are as they were."""
    with served.client(secret) as client:
        found = client.get(f"/v1/adapters/{HIDDEN}").json()
        assert (found["revision"], found["description"], found["shared"]) == (1, "A trade secret.", False)
        body = {"model": HIDDEN, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        samples = client.get(f"/v1/adapters/{HIDDEN}/samples").json()["samples"]
        assert samples == [{"text": "Tune the xylophone.", "source": "given"}]


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory, models: Path) -> tuple[Walk, Walk]:
    """Without globex, and with it."""
    return (
        walk(tmp_path_factory.mktemp("without"), models, with_globex=False),
        walk(tmp_path_factory.mktemp("with"), models, with_globex=True),
    )


def test_every_operation_is_tried(walks: tuple[Walk, Walk]) -> None:
    for each in walks:
        tried = {answer.case.operation for answers in each.answers.values() for answer in answers}
        assert tried == each.operations, "try the new operation in `cases`"


@pytest.mark.parametrize("caller", CALLERS)
def test_answers_do_not_depend_on_another_tenant(walks: tuple[Walk, Walk], caller: str) -> None:
    without, with_globex = (each.answers[caller] for each in walks)
    assert len(without) == len(with_globex)
    for one, other in zip(without, with_globex, strict=True):
        assert one == other


@pytest.mark.parametrize("caller", CALLERS)
def test_what_belongs_to_another_tenant_never_occurs(walks: tuple[Walk, Walk], caller: str) -> None:
    _, with_globex = walks
    for answer in with_globex.answers[caller]:
        asked = answer.case.path + repr(answer.case.options)
        told = answer.text + repr(answer.headers)
        for secret in (*SECRETS, *with_globex.digests):
            assert secret in asked or secret not in told, (answer, secret)


@pytest.mark.parametrize("caller", CALLERS)
def test_hidden_and_missing_names_are_answered_alike(walks: tuple[Walk, Walk], caller: str) -> None:
    _, with_globex = walks
    first_try = with_globex.answers[caller][: -len(list(after_adding()))]
    by_name: dict[str, dict[str, Answer]] = {}
    for answer in first_try:
        by_name.setdefault(answer.case.name, {})[answer.case.key] = answer
    for hidden, missing in ((HIDDEN, MISSING), (f"globex:{HIDDEN}", f"globex:{MISSING}")):
        assert by_name[hidden].keys() == by_name[missing].keys()
        for key, one in by_name[hidden].items():
            other = by_name[missing][key]
            assert (one.status, one.text.replace(hidden, "NAME")) == (other.status, other.text.replace(missing, "NAME"))
            assert one.status in (400, 404) or one.case.operation == "GET /v1/adapters"


@pytest.mark.parametrize("caller", CALLERS)
def test_a_name_that_another_tenant_has_is_free(walks: tuple[Walk, Walk], caller: str) -> None:
    for each in walks:
        added = [
            answer
            for answer in each.answers[caller]
            if answer.case.operation == "POST /v1/adapters" and answer.case.options.get("data") == {"name": HIDDEN}
        ]
        (only,) = added
        assert only.status == 201, only.text
        assert json.loads(only.text)["revision"] == 1


def test_the_walk_gets_answers(walks: tuple[Walk, Walk]) -> None:
    """A server that refused everything would be isolated, too."""
    for caller, answers in walks[1].answers.items():
        for operation in sorted({answer.case.operation for answer in answers}):
            good = [a for a in answers if a.case.operation == operation and a.status in (200, 201)]
            refused = {"GET /metrics", "GET /v1/stats", "POST /v1/load_lora_adapter", "GET /v1/jobs/{id}"}
            refused |= {"GET /v1/feedback", "POST /v1/feedback/decisions"}
            is_refused = operation in refused or operation == "POST /v1/unload_lora_adapter"
            assert bool(good) != is_refused, (caller, operation)
    acme = walks[1].answers["acme"]
    first = json.loads(acme[0].text)
    assert first["lora"]["hits"][0]["adapter"] == "sql"
