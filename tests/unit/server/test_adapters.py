"""/v1/adapters: a pool that changes while it serves."""

from __future__ import annotations

import asyncio
import json
import re
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest

from loraretriever.config import ServerSettings
from loraretriever.pool.files import STAGING_FOLDER
from loraretriever.server.errors import ApiError
from loraretriever.server.uploads import receive
from tiny import write_peft_folder
from unit.server.conftest import Served, make_pool, serving

RECIPES = ["Cook a soup with leeks.", "Bake a loaf of bread.", "Roast some potatoes."]
NAMES = ("sql", "german")
ALL = ["route", "pool:read", "pool:write"]
KEYS: dict[str, tuple[str | None, list[str]]] = {
    "acme": ("acme", ALL),
    "globex": ("globex", ALL),
    "shared": (None, ALL),
    "reader": ("acme", ["pool:read"]),
    "operator": (None, ["admin"]),
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_peft_folder(tmp_path / "cook", seed=9, base_model="base")


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Served]:
    with serving(make_pool(tmp_path_factory.mktemp("open"), models, NAMES), models) as served:
        yield served


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[tuple[Served, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("keyed")
    settings = ServerSettings(adapter_root=folder)
    with serving(make_pool(folder, models, NAMES), models, settings) as served:
        store = served.retriever.pool.keys
        keys = {name: store.create(name, scopes, tenant)[0] for name, (tenant, scopes) in KEYS.items()}
        yield served, keys


@pytest.fixture
def own(open_server: Served) -> Iterator[Served]:
    """A server without keys, with the adapters `NAMES`, which tests leave as they are."""
    yield open_server
    clear(open_server)


@pytest.fixture
def keyed(keyed_server: tuple[Served, dict[str, str]]) -> Iterator[Served]:
    """A server with keys; see `clients`."""
    yield keyed_server[0]
    clear(keyed_server[0])


@pytest.fixture
def clients(keyed_server: tuple[Served, dict[str, str]]) -> Iterator[dict[str, httpx.Client]]:
    served, keys = keyed_server
    with ExitStack() as stack:
        yield {name: stack.enter_context(served.client(key)) for name, key in keys.items()}


def clear(served: Served) -> None:
    for adapter in served.retriever.pool.list():
        if adapter.name not in NAMES:
            served.retriever.pool.remove(adapter.name)


def files_of(folder: Path, samples: Sequence[str] | None = RECIPES) -> dict[str, tuple[str, bytes]]:
    files = {
        "config": ("adapter_config.json", (folder / "adapter_config.json").read_bytes()),
        "weights": ("adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes()),
    }
    if samples is not None:
        lines = "".join(json.dumps({"inputs": text}) + "\n" for text in samples)
        files["samples"] = ("samples.jsonl", lines.encode())
    return files


def upload(client: httpx.Client, folder: Path, name: str = "cook", **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/adapters?wait=true", files=files_of(folder), data={"name": name, **fields})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return dict(answer.json()["error"])


def found_first(client: httpx.Client, prompt: str) -> str:
    (route,) = client.post("/v1/route", json={"input": prompt}).json()["data"]
    return str(route["hits"][0]["adapter"])


def test_each_change_is_there_for_the_next_request(own: Served, adapter: Path) -> None:
    with own.client() as client:
        found = upload(client, adapter, description="Writes recipes.", tags=["food", "home"])
        assert found.pop("created") > 1_700_000_000
        assert len(found.pop("digest")) == 64
        assert found == {
            "name": "cook", "object": "adapter", "revision": 1, "enabled": True, "description": "Writes recipes.",
            "tags": ["food", "home"], "tenant": None, "shared": True, "base_model": "base", "source": "upload",
            "ranks": [4], "targets": ["q_proj", "v_proj"], "bytes": 4608, "samples": 3,
        }  # fmt: skip
        assert found_first(client, "Bake a loaf of bread.") == "cook"
        assert client.patch("/v1/adapters/cook", json={"enabled": False}).json()["enabled"] is False
        assert found_first(client, "Bake a loaf of bread.") != "cook"
        assert client.patch("/v1/adapters/cook", json={"enabled": True}).json()["enabled"] is True
        assert found_first(client, "Bake a loaf of bread.") == "cook"
        answer = client.put("/v1/adapters/cook/samples", json={"samples": ["Name the planets.", "Name the moons."]})
        assert [each["text"] for each in answer.json()["samples"]] == ["Name the planets.", "Name the moons."]
        assert found_first(client, "Name the planets.") == "cook"
        assert client.delete("/v1/adapters/cook").json() == {"name": "cook", "object": "adapter", "deleted": True}
        assert found_first(client, "Name the planets.") != "cook"
        assert error_of(client.get("/v1/adapters/cook"), 404)["code"] == "adapter_not_found"


def test_a_job_tells_when_the_adapter_is_there(own: Served, adapter: Path) -> None:
    with own.client() as client:
        answer = client.post("/v1/adapters", files=files_of(adapter), data={"name": "cook"})
        assert answer.status_code == 202
        job = answer.json()
        assert (job["object"], job["kind"], job["adapter"]) == ("job", "add", "cook")
        assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
        while job["state"] not in ("succeeded", "failed"):
            job = client.get(answer.headers["location"]).json()
        assert (job["state"], job["progress"], job["message"]) == ("succeeded", 1.0, "done")
        assert job["result"]["change"] == "added"
        assert job["result"]["digest"] == client.get("/v1/adapters/cook").json()["digest"]


def test_the_same_name_again_is_a_new_revision(own: Served, adapter: Path, tmp_path: Path) -> None:
    other = write_peft_folder(tmp_path / "other", seed=10, base_model="base")
    with own.client() as client:
        first = upload(client, adapter)
        second = upload(client, other)
        assert (first["revision"], second["revision"]) == (1, 2)
        assert first["digest"] != second["digest"]


def test_listing_filters_and_pages(own: Served, adapter: Path) -> None:
    with own.client() as client:
        upload(client, adapter, tags=["food", "home"], description="Writes RECIPES.")
        listed = client.get("/v1/adapters").json()
        assert [each["name"] for each in listed["data"]] == ["cook", "german", "sql"]
        assert listed["has_more"] is False
        first = client.get("/v1/adapters?limit=2").json()
        assert [each["name"] for each in first["data"]] == ["cook", "german"] and first["has_more"] is True
        rest = client.get("/v1/adapters?limit=2&after=german").json()
        assert [each["name"] for each in rest["data"]] == ["sql"] and rest["has_more"] is False
        for query, names in [
            ("tag=food", ["cook"]),
            ("tag=food&tag=home", ["cook"]),
            ("tag=food&tag=work", []),
            ("query=recipes", ["cook"]),
            ("query=HOM", ["cook"]),
            ("query=sq", ["sql"]),
        ]:
            assert [each["name"] for each in client.get(f"/v1/adapters?{query}").json()["data"]] == names
        error_of(client.get("/v1/adapters?limit=0"), 400)
        error_of(client.get("/v1/adapters?limit=1001"), 400)


def test_details_are_changed_alone(own: Served, adapter: Path) -> None:
    with own.client() as client:
        upload(client, adapter)
        before = client.get("/v1/adapters/cook").json()
        after = client.patch("/v1/adapters/cook", json={"description": "SQL.", "tags": ["db"]}).json()
        assert after == before | {"description": "SQL.", "tags": ["db"]}
        assert client.patch("/v1/adapters/cook", json={"tags": []}).json() == before | {"description": "SQL."}
        error_of(client.patch("/v1/adapters/cook", json={}), 400)
        assert error_of(client.patch("/v1/adapters/cook", json={"revision": 3}), 400)["param"] == "revision"
        error_of(client.patch("/v1/adapters/nothing", json={"enabled": True}), 404)


def test_samples_are_added_and_replaced(own: Served, adapter: Path) -> None:
    with own.client() as client:
        upload(client, adapter)
        place = "/v1/adapters/cook/samples"
        old = [each["text"] for each in client.get(place).json()["samples"]]
        answer = client.post(place, json={"samples": ["Drop the table.", old[0]]}).json()
        assert [each["text"] for each in answer["samples"]] == [*old, "Drop the table."]
        answer = client.post(place, json={"samples": ["What is SQL?"], "counter": True}).json()
        assert answer["counter_samples"] == [{"text": "What is SQL?", "source": "given"}]
        answer = client.put(place, json={"samples": ["List the tables."]}).json()
        assert [each["text"] for each in answer["samples"]] == ["List the tables."]
        assert [each["text"] for each in answer["counter_samples"]] == ["What is SQL?"]
        answer = client.put(place, json={"samples": ["List the tables."], "counter_samples": []}).json()
        assert answer["counter_samples"] == []
        assert client.get(place).json() == answer
        for body in ({"samples": []}, {"samples": [""]}, {"samples": ["x"] * 1001}, {"samples": "x"}, {}):
            error_of(client.post(place, json=body), 400)
            error_of(client.put(place, json=body), 400)
        error = error_of(client.post(place, json={"samples": ["List the tables."], "counter": True}), 400)
        assert "at once" in error["message"]


def refused(served: Served, client: httpx.Client, status: int, **request: Any) -> dict[str, Any]:
    """The error of an upload, after a look at what it left behind and at what it tells."""
    answer = client.post("/v1/adapters?wait=true", **request)
    assert list((served.retriever.pool.state_folder / STAGING_FOLDER).iterdir()) == []
    assert "cook" not in client.get("/v1/adapters").text
    error = error_of(answer, status)
    assert not re.search(r"['\" ]/|pytest|staging", error["message"])
    return error


def test_uploads_that_are_refused(own: Served, adapter: Path, tmp_path: Path) -> None:
    whole, name = files_of(adapter), {"name": "cook"}
    foreign = files_of(write_peft_folder(tmp_path / "foreign", base_model="other"))
    wide = files_of(write_peft_folder(tmp_path / "wide", config={"use_dora": True}, base_model="base"))
    with own.client() as client:
        error = refused(own, client, 400, files={"config": whole["config"]}, data=name)
        assert error["param"] == "weights" and "adapter_model.safetensors" in error["message"]
        assert refused(own, client, 400, files=whole)["param"] == "name"
        assert refused(own, client, 400, files=whole, data={"name": "../cook"})["code"] is None
        assert refused(own, client, 400, files=whole, data={"name": "auto"})["param"] == "name"
        assert refused(own, client, 400, files=whole, data=name | {"rank": "4"})["param"] is None
        assert refused(own, client, 400, files=[*whole.items(), ("card", b"a"), ("card", b"b")])["param"] == "card"
        assert refused(own, client, 400, files=whole, data={"name": ["cook", "cook2"]})["param"] == "name"
        pickle = whole | {"weights": ("adapter_model.bin", b"\x80\x04N.")}
        assert refused(own, client, 422, files=pickle, data=name)["code"] == "adapter_refused"
        error = refused(own, client, 422, files=wide, data=name)
        assert error["message"].startswith("adapter_config.json: unsupported options use_dora")
        error = refused(own, client, 422, files=foreign, data=name)
        assert "expected the pool's 'base'" in error["message"]
        samples = whole | {"samples": ("samples.jsonl", b'{"inputs": "a"}\n{"inputs": 3}\n')}
        assert refused(own, client, 400, files=samples, data=name)["message"].startswith("samples.jsonl:2: ")
        config = whole | {"config": ("adapter_config.json", b" " * ((1 << 20) + 1))}
        assert "adapter_config.json is too large" in refused(own, client, 413, files=config, data=name)["message"]
        assert refused(own, client, 413, files=whole, data=name | {"description": "x" * (65 << 10)})
        found = client.post("/v1/adapters?wait=true", files=foreign, data=name | {"allow_base_mismatch": "true"})
        assert found.status_code == 201


def test_bodies_that_are_no_uploads(own: Served, adapter: Path) -> None:
    form = "multipart/form-data; boundary=b"
    part = b'--b\r\nContent-Disposition: form-data; name="config"\r\n\r\n{}'
    with own.client() as client:
        for kind, content, status in [
            ("text/plain", b"hello", 415),
            ("multipart/form-data", b"", 400),
            ("multipart/form-data; boundary=" + "b" * 300, b"", 400),
            (form, b"", 400),
            (form, b"no boundary", 400),
            (form, part, 400),
            (form, part + b"\r\n--b--\r\n", 400),
            (form, b"--b\r\n\r\nx\r\n--b--\r\n", 400),
            (form, b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n\xff\r\n--b--\r\n', 400),
            ("application/json", b"{", 400),
            ("application/json", b'{"name": "cook"}', 400),
            ("application/json", b'{"source": ""}', 400),
        ]:
            refused(own, client, status, content=content, headers={"content-type": kind})


def test_large_weights_are_refused_while_they_come(serve: Callable[..., Any], adapter: Path) -> None:
    with serve(names=("sql",), max_upload_mib=1) as served, served.client() as client:
        files = files_of(adapter) | {"weights": ("adapter_model.safetensors", b"\0" * (2 << 20))}
        refused(served, client, 413, files=files, data={"name": "cook"})


def test_an_upload_takes_little_memory(tmp_path: Path) -> None:
    mib, size = 1 << 20, 48
    head = b'--b\r\nContent-Disposition: form-data; name="%s"; filename="x"\r\n\r\n'

    async def stream() -> AsyncIterator[bytes]:
        yield head % b"config" + b"{}\r\n" + head % b"weights"
        for number in range(size * 16):
            yield bytes([number % 256]) * (mib // 16)
        yield b"\r\n--b--\r\n"

    async def run(function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.to_thread(function, *args)

    request: Any = SimpleNamespace(headers={"content-type": "multipart/form-data; boundary=b"}, stream=stream)
    state: Any = SimpleNamespace(settings=SimpleNamespace(max_upload_mib=size), run=run)
    tracemalloc.start()
    try:
        assert asyncio.run(receive(request, state, tmp_path)) == {}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    written = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert written == b"".join(bytes([number % 256]) * (mib // 16) for number in range(size * 16))
    assert peak < 6 * mib

    state.settings.max_upload_mib = size - 1
    (tmp_path / "small").mkdir()
    with pytest.raises(ApiError, match="expected at most"):
        asyncio.run(receive(request, state, tmp_path / "small"))
    assert (tmp_path / "small" / "adapter_model.safetensors").stat().st_size <= (size - 1) * mib


def test_what_a_killed_server_left_is_swept(own: Served, adapter: Path) -> None:
    left = own.retriever.pool.state_folder / STAGING_FOLDER / "unfinished-killed" / "upload"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"half")
    with own.client() as client:
        upload(client, adapter)
    assert list((own.retriever.pool.state_folder / STAGING_FOLDER).iterdir()) == []


def test_folders_below_the_adapter_root(serve: Callable[..., Any], tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_peft_folder(root / "team" / "cook", seed=9, base_model="base", samples=RECIPES)
    outside = write_peft_folder(tmp_path / "outside", seed=9, base_model="base")
    (root / "link").symlink_to(outside)
    (root / "files").mkdir()
    (root / "files" / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    (root / "files" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    with serve(names=("sql",), adapter_root=root) as served, served.client() as client:
        for source in ("team/cook", str(root / "team" / "cook"), "./team/../team/cook"):
            answer = client.post("/v1/adapters?wait=true", json={"source": source})
            assert answer.status_code == 201, answer.text
            assert (answer.json()["name"], answer.json()["source"], answer.json()["samples"]) == ("cook", "cook", 3)
        answer = client.post(
            "/v1/adapters?wait=true", json={"source": "team/cook", "name": "soup", "samples": ["Soup."]}
        )
        assert (answer.json()["name"], answer.json()["samples"]) == ("soup", 1)
        for source in ("..", "../outside", str(outside), "/etc", "/nowhere", "link", "files", ".", "", "~"):
            answer = client.post("/v1/adapters?wait=true", json={"source": source})
            assert answer.status_code in (400, 403), answer.text
            assert not source or str(tmp_path) not in answer.text.replace(source, "")
        missing = [error_of(client.post("/v1/adapters", json={"source": s}), 403) for s in ("/etc", "/nowhere")]
        assert missing[0]["message"].replace("/etc", "") == missing[1]["message"].replace("/nowhere", "")
        assert error_of(client.post("/v1/adapters", json={"source": "./nothing"}), 400)["code"] == "source_not_found"


def test_a_tenants_key_may_not_name_folders(keyed: Served, clients: dict[str, httpx.Client]) -> None:
    root = keyed.app.state.server.settings.adapter_root
    write_peft_folder(root / "cook", seed=9, base_model="base")
    for name in ("acme", "globex"):
        error = error_of(clients[name].post("/v1/adapters?wait=true", json={"source": "./cook"}), 403)
        assert error["code"] == "folders_not_allowed"
    error_of(clients["reader"].post("/v1/adapters?wait=true", json={"source": "./cook"}), 403)
    for name in ("shared", "operator"):
        answer = clients[name].post("/v1/adapters?wait=true", json={"source": "./cook"})
        assert answer.status_code == 201, answer.text


def test_no_folders_without_an_adapter_root(own: Served, adapter: Path) -> None:
    with own.client() as client:
        error = error_of(client.post("/v1/adapters", json={"source": str(adapter)}), 403)
        assert "adapter root" in error["message"]


class Hub:
    """Stands in for the hub: knows one repository, and notes whether it was asked with the machine's token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, bool | None]] = []

    def api(self, token: bool | None = None) -> Any:
        return SimpleNamespace(model_info=lambda repo, **options: self.model_info(repo, token))

    def model_info(self, repo: str, token: bool | None) -> Any:
        self.asked.append((repo, token))
        if repo != "owner/cook":
            raise ConnectionError("no such repository, says /root/.cache/huggingface/log")
        names = ("adapter_config.json", "adapter_model.safetensors")
        return SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=name, size=10) for name in names])

    def snapshot_download(self, repo: str, **options: Any) -> str:
        return str(self.folder)


@pytest.fixture
def hub(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(adapter)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_adapters_from_the_hub(own: Served, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_peft_folder(tmp_path / "owner" / "cook", seed=99, base_model="base")  # not what is asked for
    with own.client() as client:
        answer = client.post("/v1/adapters?wait=true", json={"source": "owner/cook", "samples": RECIPES})
        assert answer.status_code == 201, answer.text
        assert (answer.json()["name"], answer.json()["source"]) == ("cook", "owner/cook@c0ffee")
        assert hub.asked[0] == ("owner/cook", None)
        error = error_of(client.post("/v1/adapters?wait=true", json={"source": "owner/none"}), 400)
        assert error["code"] == "source_not_found" and "/root" not in error["message"]


@pytest.mark.parametrize(("key", "token"), [("acme", False), ("shared", False), ("operator", None)])
def test_only_operators_use_the_machines_token(
    keyed: Served, clients: dict[str, httpx.Client], hub: Hub, key: str, token: bool | None
) -> None:
    answer = clients[key].post("/v1/adapters?wait=true", json={"source": "owner/cook@main"})
    assert answer.status_code == 201, answer.text
    assert hub.asked[0] == ("owner/cook", token)


def test_no_hub_where_it_is_not_allowed(serve: Callable[..., Any], hub: Hub) -> None:
    with serve(names=("sql",), allow_hub=False) as served, served.client() as client:
        error = error_of(client.post("/v1/adapters", json={"source": "owner/cook"}), 403)
        assert error["code"] == "hub_not_allowed" and hub.asked == []


def test_tenants_have_adapters_of_their_own(keyed: Served, clients: dict[str, httpx.Client], adapter: Path) -> None:
    acme, globex, shared, reader, operator = (clients[name] for name in KEYS)
    found = upload(acme, adapter, "sql")
    assert found["name"] == "sql" and found["shared"] is False and "tenant" not in found
    assert operator.get("/v1/adapters/acme:sql").json()["tenant"] == "acme"
    assert reader.get("/v1/adapters/sql").json() == found
    assert globex.get("/v1/adapters/sql").json()["shared"] is True
    names = [each["name"] for each in operator.get("/v1/adapters").json()["data"]]
    assert names == ["acme:sql", "german", "sql"]
    assert [each["name"] for each in acme.get("/v1/adapters").json()["data"]] == ["german", "sql"]
    assert found_first(acme, "Bake a loaf of bread.") == "sql"
    for request in (
        lambda client: client.patch("/v1/adapters/german", json={"enabled": False}),
        lambda client: client.delete("/v1/adapters/german"),
        lambda client: client.post("/v1/adapters/german/samples", json={"samples": ["x"]}),
        lambda client: client.put("/v1/adapters/german/samples", json={"samples": ["x"]}),
    ):
        assert error_of(request(acme), 403)["code"] == "adapter_shared"
        assert error_of(request(reader), 403)["code"] == "insufficient_scope"
    for path in ("/v1/adapters/acme:sql", "/v1/adapters/acme%3Asql/samples", "/v1/adapters/globex:sql"):
        error_of(acme.get(path), 404)
    assert error_of(post(acme, adapter, "x", tenant="globex"), 403)["param"] == "tenant"
    assert error_of(post(acme, adapter, "x", tenant=""), 403)["param"] == "tenant"
    assert error_of(post(acme, adapter, "globex:x"), 400)
    assert post(acme, adapter, "x", tenant="acme").status_code == 201
    assert post(operator, adapter, "y", tenant="globex").json()["name"] == "globex:y"
    assert post(operator, adapter, "globex:y").json()["tenant"] == "globex"
    assert globex.get("/v1/adapters/y").status_code == 200
    assert post(shared, adapter, "z").json()["shared"] is True
    assert shared.patch("/v1/adapters/z", json={"enabled": False}).status_code == 200
    assert acme.delete("/v1/adapters/sql").status_code == 200
    assert acme.get("/v1/adapters/sql").json()["shared"] is True


def post(client: httpx.Client, folder: Path, name: str, **fields: str) -> httpx.Response:
    return client.post("/v1/adapters?wait=true", files=files_of(folder), data={"name": name, **fields})


def test_an_unqualified_name_of_a_tenants_adapter(
    keyed: Served, clients: dict[str, httpx.Client], adapter: Path
) -> None:
    """As the command line may give it: it stays the tenant's, whoever adds one of that name."""
    keyed.retriever.pool.add(adapter, name="plain", tenant="acme", samples=RECIPES)
    assert upload(clients["acme"], adapter, "plain", description="Revised.")["description"] == "Revised."
    assert keyed.retriever.pool.get("plain").tenant == "acme"
    error_of(post(clients["shared"], adapter, "plain"), 409)
    assert upload(clients["operator"], adapter, "plain")["tenant"] == "acme"


def test_a_plain_folder_takes_adapters_too(tmp_path: Path, models: Path, adapter: Path) -> None:
    base = str(models / "base")
    write_peft_folder(tmp_path / "pool" / "sql", seed=1, base_model=base, samples=["Count the users."])
    with serving(tmp_path / "pool", models) as served, served.client() as client:
        upload(client, adapter)
        assert (tmp_path / "pool" / "cook" / "samples.jsonl").is_file()
        assert found_first(client, "Bake a loaf of bread.") == "cook"
        error = error_of(post(client, adapter, "cook", tenant="acme"), 400)
        assert str(tmp_path) not in error["message"]
        client.delete("/v1/adapters/cook")
        assert not (tmp_path / "pool" / "cook").exists()


def test_jobs_count_in_the_figures(serve: Callable[..., Any], models: Path, tmp_path: Path) -> None:
    folder = write_peft_folder(tmp_path / "cook", base_model=str(models / "base"), seed=7)
    with serve() as served, served.client() as client:
        upload(client, folder)
        jobs = client.get("/v1/stats").json()["counters"]["jobs_total"]
    assert {each["labels"]["state"]: each["value"] for each in jobs} == {"queued": 1, "running": 1, "succeeded": 1}
