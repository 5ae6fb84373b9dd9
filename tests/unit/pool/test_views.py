"""What a tenant sees of a pool, and that nothing of it depends on another tenant's adapters."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraretriever.errors import AdapterNotFoundError
from loraretriever.pool import Pool, PoolView
from loraretriever.types import Sample
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder

TAG = "encoder"


def vectors(samples: list[Sample]) -> np.ndarray:
    return np.array([[len(sample.text), 1.0, 2.0] for sample in samples], dtype=np.float32)


def names(view: PoolView | Pool, enabled_only: bool = False) -> list[str]:
    return [adapter.name for adapter in view.list(enabled_only)]


@pytest.fixture
def shared(pool: Pool, tmp_path: Path) -> Pool:
    """Adapters sql, german, old (disabled) of nobody; acme:sql, draft of acme; globex:german, secret of globex."""
    for seed, (name, tenant) in enumerate(
        [
            ("sql", None), ("german", None), ("old", None), ("acme:sql", "acme"), ("draft", "acme"),
            ("globex:german", "globex"), ("secret", "globex"),
        ]
    ):  # fmt: skip
        source = write_peft_folder(tmp_path / f"source{seed}", seed=seed)
        pool.add(source, name=name, tenant=tenant, samples=[f"{name} one", f"{name} two"])
    pool.set_enabled("old", False)
    return pool


@pytest.mark.parametrize(
    ("view", "all_", "enabled"),
    [
        ("", ["german", "old", "sql"], ["german", "sql"]),
        ("acme", ["acme:sql", "draft", "german", "old"], ["acme:sql", "draft", "german"]),
        ("globex", ["globex:german", "old", "secret", "sql"], ["globex:german", "secret", "sql"]),
        ("nobody & co", ["german", "old", "sql"], ["german", "sql"]),
        ("Acme", ["german", "old", "sql"], ["german", "sql"]),
        ("acme:sql", ["german", "old", "sql"], ["german", "sql"]),
        ("%", ["german", "old", "sql"], ["german", "sql"]),
    ],
)
def test_what_a_view_has(shared: Pool, view: str, all_: list[str], enabled: list[str]) -> None:
    seen = shared.view(view)
    assert (names(seen), names(seen, enabled_only=True)) == (all_, enabled)
    assert sorted(seen.entries(TAG)[1]) == sorted(seen.missing_embeddings(TAG)) == enabled
    everything = shared.view(None)
    assert everything.list() == shared.list()
    for name in names(shared):
        if name in all_:
            assert seen.get(name) == shared.get(name)
            assert (seen.samples(name), seen.counter_samples(name)) == (shared.samples(name), [])
            assert seen.find(seen.public(seen.get(name))) == shared.get(name)
        else:
            for call in (seen.get, seen.samples, seen.counter_samples):
                with pytest.raises(AdapterNotFoundError):
                    call(name)
    assert sorted(seen.entries(TAG, names(shared))[1]) == sorted(seen.missing_embeddings(TAG, names(shared))) == enabled
    assert (seen.base_model, seen.encoder, seen.name) == (TINY_BASE, None, view)


def test_public_names(shared: Pool) -> None:
    found = {
        view: {public: shared.view(view).find(public).name for public in ("sql", "german")}
        for view in ("", "acme", "globex")
    }
    assert found == {
        "": {"sql": "sql", "german": "german"},
        "acme": {"sql": "acme:sql", "german": "german"},
        "globex": {"sql": "sql", "german": "globex:german"},
    }
    assert shared.view("acme").find("draft").name == "draft"
    assert shared.view(None).find("acme:sql").name == shared.find("acme:sql").name == "acme:sql"
    assert [shared.view("acme").public(shared.get(name)) for name in ("acme:sql", "draft", "german")] == [
        "sql", "draft", "german",
    ]  # fmt: skip
    assert shared.view(None).public(shared.get("acme:sql")) == "acme:sql"
    for view in ("", "acme", "globex"):
        with pytest.raises(AdapterNotFoundError):
            shared.view(view).find("acme:sql")


def test_a_qualified_adapter_hides_an_own_one_too(shared: Pool, tmp_path: Path) -> None:
    shared.add(write_peft_folder(tmp_path / "x", seed=9), name="acme:draft", tenant="acme")
    view = shared.view("acme")
    assert "draft" not in names(view)
    assert view.find("draft").name == "acme:draft"
    shared.set_enabled("acme:draft", False)
    assert "draft" not in names(view), "what a name means does not depend on it"
    shared.remove("acme:draft")
    assert view.find("draft").name == "draft"


@pytest.mark.parametrize("view", ["", "acme", "globex"])
def test_errors_name_only_what_the_view_has(shared: Pool, view: str) -> None:
    seen = shared.view(view)

    def message(call: Callable[[str], Any], name: str) -> str:
        with pytest.raises(AdapterNotFoundError) as caught:
            call(name)
        return str(caught.value)

    hidden = {"": "secret", "acme": "secret", "globex": "draft"}[view]
    for call in (seen.get, seen.find, seen.samples, seen.counter_samples):
        assert message(call, hidden).replace(hidden, "?") == message(call, "zzzzzz").replace("zzzzzz", "?")
        assert message(call, "secre").count("secret") == (view == "globex")
        assert message(call, "draf").count("draft") == (view == "acme")
    assert "did you mean 'sql'" in message(seen.find, "sqll")
    assert ":" not in message(seen.find, "sqll").removeprefix("no adapter 'sqll' in the pool:")
    assert len(message(seen.find, "x" * 1_000_000)) < 500


def test_changes(shared: Pool, tmp_path: Path) -> None:
    def touched(change: Callable[[], Any]) -> dict[str | None, list[str]]:
        before = shared.change
        change()
        assert shared.change == before + 1 == shared.view("acme").change
        found = {view: shared.view(view).changes_since(before) for view in (None, "", "acme", "globex")}
        return {view: sorted(each) for view, each in found.items() if each}

    everybody = (None, "", "acme", "globex")
    assert touched(lambda: shared.add_samples("german", ["x"])) == {view: ["german"] for view in everybody}
    assert touched(lambda: shared.add_samples("acme:sql", ["x"])) == {None: ["acme:sql"], "acme": ["acme:sql", "sql"]}
    assert touched(lambda: shared.set_enabled("secret", False)) == {None: ["secret"], "globex": ["secret"]}
    assert touched(lambda: shared.remove("secret")) == {None: ["secret"], "globex": ["secret"]}
    source = write_peft_folder(tmp_path / "x", seed=20)
    assert touched(lambda: shared.add(source, name="n", tenant="acme")) == {None: ["n"], "acme": ["n"]}
    assert touched(lambda: shared.add(source, name="n", tenant="globex")) == {
        None: ["n"], "acme": ["n"], "globex": ["n"],
    }  # fmt: skip
    assert touched(lambda: shared.add(source, name="n", tenant="")) == {view: ["n"] for view in everybody}
    assert touched(lambda: shared.add(source, name="n", tenant="acme")) == {view: ["n"] for view in everybody}
    assert touched(lambda: shared.set_encoder("e")) == {}
    assert shared.view("acme").changes_since(shared.change + 1) is None


def test_a_view_stores_vectors_of_its_own_adapters_only(shared: Pool) -> None:
    view = shared.view("acme")
    missing = view.missing_embeddings(TAG)
    asked_by_another = shared.view("").missing_embeddings(TAG, ["sql"])
    view.store_embeddings(TAG, {name: vectors(samples) for name, samples in missing.items()})
    assert view.missing_embeddings(TAG) == {}
    shared.view("").store_embeddings(TAG, {name: vectors(samples) for name, samples in asked_by_another.items()})
    with_secret = {name: np.ones((2, 3), np.float32) for name in ("secret", "globex:german", "no such")}
    view.store_embeddings(TAG, with_secret)
    assert shared.missing_embeddings(TAG).keys() == {"secret", "globex:german"}
    assert view.embeddings(TAG).keys() == {"acme:sql", "draft", "german"}


def test_places_for_what_is_derived(shared: Pool) -> None:
    folders = [shared.view(view).state_folder for view in (None, "", "acme", "globex", "../..")]
    assert len(set(folders)) == len(folders)
    assert folders[0] == shared.state_folder
    assert {folder.parent for folder in folders[1:]} == {shared.state_folder}


def observed(view: PoolView) -> dict[str, Any]:
    """Everything that a view returns, as bytes, the change number and the places of files aside."""

    def error(call: Callable[[str], Any], name: str) -> str:
        with pytest.raises(AdapterNotFoundError) as caught:
            call(name)
        return str(caught.value)

    adapters = view.list()
    embeddings = view.embeddings(TAG)
    found = {
        "adapters": [
            (a.name, a.revision, a.digest, a.enabled, a.description, a.tags, a.ranks, a.size, a.samples, a.tenant)
            for a in adapters
        ],
        "public": [view.public(adapter) for adapter in adapters],
        "found": [view.find(view.public(adapter)).name for adapter in adapters],
        "got": [view.get(adapter.name).digest for adapter in adapters],
        "samples": [(view.samples(adapter.name), view.counter_samples(adapter.name)) for adapter in adapters],
        "entries": [
            (e.name, e.tags, e.tenant, e.texts, e.sources, e.counter_texts, e.vectors, e.counter_vectors)
            for e in view.entries(TAG)[1].values()
        ],
        "embeddings": [(name, rows.tobytes()) for name, rows in embeddings.items()],
        "missing": view.missing_embeddings("other encoder"),
        "errors": [error(call, name) for call in (view.get, view.find) for name in ("sql2", "globex:sql", "nothing")],
        "encoder": view.encoder,
    }
    return {name: pickle.dumps(value) for name, value in found.items()}


@pytest.mark.parametrize("view", ["", "acme", "initech"])
@pytest.mark.parametrize("other", ["globex:sql", "sql2"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_another_tenants_adapters_change_nothing(tmp_path: Path, view: str, other: str, order: str) -> None:
    sources = [write_peft_folder(tmp_path / f"source{seed}", seed=seed) for seed in range(3)]

    def build(location: Path, with_other: bool) -> dict[str, Any]:
        def add_other() -> None:
            # The same bytes, samples and tags as acme's, and one sample more.
            pool.add(sources[1], name=other, tenant="globex", samples=["select all", "y"], tags=["t"])
            pool.add_samples(other, ["wrong"], counter=True)

        with Pool.create(location, TINY_BASE, spec=TINY_SPEC) as pool:
            if with_other and order == "before":
                add_other()
            pool.add(sources[0], name="sql", samples=["select"])
            pool.add(sources[1], name="acme:sql", tenant="acme", samples=["select all"], tags=["t"])
            pool.add(sources[2], name="draft", tenant="acme", samples=["write"])
            if with_other and order == "after":
                add_other()
            missing = pool.missing_embeddings(TAG)
            pool.store_embeddings(TAG, {name: vectors(samples) for name, samples in missing.items()})
            return observed(pool.view(view))

    assert build(tmp_path / "with", True) == build(tmp_path / "without", False)


def test_a_plain_folder_looks_the_same_to_everybody(tmp_path: Path) -> None:
    write_peft_folder(tmp_path / "plain/a", samples=["x"])
    with Pool.open(tmp_path / "plain") as pool:
        assert {view: names(pool.view(view)) for view in (None, "", "acme")} == {
            view: ["a"] for view in (None, "", "acme")
        }
        assert pool.tenants() == frozenset()
        folder = pool.view("acme").state_folder
        folder.mkdir()
        (folder / "index").symlink_to(tmp_path)
    with pytest.raises(Exception, match="is a link"):
        Pool.open(tmp_path / "plain")
