from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from loraretriever.errors import AdapterNotFoundError, AdmissionError, InvalidInputError, ModelLoadError, PoolError
from loraretriever.pool import AddChange, Pool
from loraretriever.pool.schema import RemovedRow
from loraretriever.types import BaseModelSpec, Sample
from places import Place, contents, stored
from tiny import LAYERS, TINY_BASE, TINY_SPEC, lora_tensors, write_peft_folder


def test_an_added_adapter_can_be_read(pool: Pool, tmp_path: Path) -> None:
    source = write_peft_folder(tmp_path / "sql", rank=4, ranks={"model.layers.0.self_attn.q_proj": 2}, config={
        "rank_pattern": {"layers.0.self_attn.q_proj": 2}
    })  # fmt: skip
    before = pool.change
    result = pool.add(source, samples=["b", "a"], description="Writes SQL.", tags=["code", "code", "x"])
    assert result.change == "added"
    adapter = result.adapter
    assert pool.get("sql") == adapter
    assert pool.list() == [adapter]
    assert pool.change == before + 1
    assert (adapter.name, adapter.revision, adapter.enabled) == ("sql", 1, True)
    assert (adapter.ranks, adapter.targets, adapter.samples) == ((2, 4), ("q_proj", "v_proj"), 2)
    assert (adapter.base_model, adapter.source) == (TINY_BASE, str(source))
    assert (adapter.description, adapter.tags) == ("Writes SQL.", ("code", "x"))
    assert adapter.folder == pool.state_folder / "adapters" / adapter.digest
    assert adapter.created.utcoffset() is not None
    assert pool.samples("sql") == [Sample("b"), Sample("a")]
    weights = pool.weights("sql")
    assert (weights.name, weights.digest, len(weights.modules)) == ("sql", adapter.digest, 2 * LAYERS)
    q = weights.modules["model.layers.0.self_attn.q_proj"]
    assert (tuple(q.a.shape), tuple(q.b.shape), q.scaling) == ((2, 32), (32, 2), 4.0)
    assert pool.verify() == []
    with Pool.open(pool.location) as again:
        assert again.list() == [adapter]
        assert again.base_model == TINY_BASE


def test_the_source_is_not_needed_afterwards(pool: Pool, tmp_path: Path) -> None:
    source = write_peft_folder(tmp_path / "a", samples=["x"], card="A card.")
    (source / "secret.bin").write_bytes(b"not copied")
    adapter = pool.add(source).adapter
    for file in source.iterdir():
        file.unlink()
    assert pool.verify() == []
    assert sorted(file.name for file in stored(pool, adapter.digest).iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_same_again_changes_nothing(pool: Pool, tmp_path: Path) -> None:
    source = write_peft_folder(tmp_path / "a")
    first = pool.add(source, samples=["x", "y"], description="d", tags=["t"])
    change = pool.change
    for options in ({}, {"samples": ["x", "y"]}, {"description": "d", "tags": ["t"]}):
        again = pool.add(source, **options)  # type: ignore[arg-type]
        assert again.change is AddChange.UNCHANGED
        assert again.adapter == first.adapter
    assert pool.change == change


def test_other_samples_replace_the_old_ones(pool: Pool, tmp_path: Path) -> None:
    source = write_peft_folder(tmp_path / "a")
    first = pool.add(source, samples=["x"]).adapter
    result = pool.add(source, samples=["y", "z"])
    assert result.change is AddChange.SAMPLES_UPDATED
    assert (result.adapter.revision, result.adapter.digest, result.adapter.samples) == (1, first.digest, 2)
    assert pool.samples("a") == [Sample("y"), Sample("z")]
    assert pool.add(source, description="new").change is AddChange.DETAILS_UPDATED
    assert pool.get("a").description == "new"
    assert pool.samples("a") == [Sample("y"), Sample("z")]


def test_other_bytes_are_a_new_revision(pool: Pool, tmp_path: Path) -> None:
    first = pool.add(write_peft_folder(tmp_path / "a"), samples=["x"], description="d", tags=["t"]).adapter
    pool.set_enabled("a", False)
    result = pool.add(write_peft_folder(tmp_path / "a", seed=1))
    assert result.change is AddChange.REVISED
    second = result.adapter
    assert (second.revision, second.enabled, second.description, second.tags) == (2, False, "d", ("t",))
    assert second.digest != first.digest
    assert pool.samples("a") == [Sample("x")], "given samples stay with the name"
    assert pool.list() == [second]
    assert contents(pool) == {first.digest, second.digest}, "earlier revisions keep their files"
    third = pool.add(write_peft_folder(tmp_path / "a"), samples=["y"]).adapter
    assert (third.revision, third.digest) == (3, first.digest)
    assert pool.samples("a") == [Sample("y")]
    assert pool.verify() == []
    pool.grace_seconds = 0
    pool.remove("a")
    assert contents(pool) == set()


def test_samples_come_from_the_best_source_there_is(pool: Pool, tmp_path: Path) -> None:
    def sources(name: str, **options: Any) -> set[str]:
        folder = write_peft_folder(tmp_path / name, seed=len(pool.list()), **options.pop("folder", {}))
        pool.add(folder, **options)
        return {sample.source for sample in pool.samples(name)}

    (tmp_path / "more.jsonl").write_text('{"inputs": "x"}')
    assert sources("a") == {"name"}
    assert sources("b", description="Writes SQL.") == {"description"}
    assert sources("c", folder={"card": "Writes SQL for you."}) == {"model_card"}
    assert sources("d", folder={"card": "Writes SQL for you.", "samples": ["x"]}) == {"given"}
    assert sources("e", samples_file=tmp_path / "more.jsonl") == {"given"}
    assert pool.get("c").description == "Writes SQL for you."
    assert pool.add(tmp_path / "b", description="Writes Python.").change is AddChange.SAMPLES_UPDATED
    with pytest.raises(InvalidInputError, match="expected one of them"):
        pool.add(tmp_path / "a", samples=["x"], samples_file=tmp_path / "more.jsonl")


def test_removal(pool: Pool, tmp_path: Path) -> None:
    for name in ("a", "twin"):
        pool.add(write_peft_folder(tmp_path / name))
    digest = pool.get("a").digest
    pool.grace_seconds = 0
    pool.remove("a")
    assert [adapter.name for adapter in pool.list()] == ["twin"]
    assert contents(pool) == {digest}, "the twin has the same content"
    assert pool.verify() == []
    pool.remove("twin")
    assert contents(pool) == set()
    assert pool.add(tmp_path / "a").adapter.revision == 1


def test_unknown_names(pool: Pool, tmp_path: Path) -> None:
    pool.add(write_peft_folder(tmp_path / "wikisql"))
    for call in (pool.get, pool.samples, pool.weights, pool.remove, lambda name: pool.set_enabled(name, True)):
        with pytest.raises(AdapterNotFoundError, match="did you mean 'wikisql'"):
            call("wiki_sql")
    with pytest.raises(AdapterNotFoundError, match="the pool has 1 adapters"):
        pool.get("zzz")


def test_disabled_adapters(pool: Pool, tmp_path: Path) -> None:
    pool.add(write_peft_folder(tmp_path / "a"))
    change = pool.change
    pool.set_enabled("a", True)
    assert pool.change == change
    pool.set_enabled("a", False)
    assert pool.change == change + 1
    assert pool.list(enabled_only=True) == []
    assert not pool.list()[0].enabled


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "a..b", "-a", ".a", "a b", "ä", "a" * 129, "a\n", "a\0"]
)
def test_bad_names(pool: Pool, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot be used; expected"):
        pool.add(write_peft_folder(tmp_path / "x"), name=name)


def test_a_refused_adapter_leaves_nothing(pool: Pool, tmp_path: Path) -> None:
    source = write_peft_folder(tmp_path / "a", config={"use_dora": True})
    change = pool.change
    with pytest.raises(AdmissionError, match="use_dora"):
        pool.add(source)
    assert pool.list() == []
    assert pool.change == change
    assert list((pool.state_folder / "staging").iterdir()) == []


def test_another_base_model_is_accepted_on_demand(pool: Pool, tmp_path: Path) -> None:
    source = write_peft_folder(tmp_path / "a", base_model="other/copy")
    with pytest.raises(AdmissionError, match="--allow-base-mismatch"):
        pool.add(source)
    assert pool.add(source, allow_base_mismatch=True).adapter.base_model == "other/copy"
    assert pool.verify() == []


def test_verify_finds_what_is_wrong(pool: Pool, tmp_path: Path) -> None:
    adapters = {
        name: pool.add(write_peft_folder(tmp_path / name, seed=seed)).adapter for seed, name in enumerate("abc")
    }
    file = stored(pool, adapters["a"].digest) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x3d")
    (stored(pool, adapters["b"].digest) / "adapter_config.json").unlink()
    with pool._database.write() as session:
        session.execute(text("DELETE FROM samples WHERE adapter_id = (SELECT id FROM adapters WHERE name = 'c')"))
    problems = sorted(pool.verify())
    assert len(problems) == 3
    assert "adapter 'a': the files in" in problems[0]
    assert "adapter 'b': " in problems[1]
    assert "adapter_config.json" in problems[1]
    assert "adapter 'c' has no samples" in problems[2]


def promised(pool: Pool, digest: str) -> None:
    """Files as an add leaves them that was killed before it committed, long ago."""
    stored(pool, digest).mkdir()
    (stored(pool, digest) / "adapter_config.json").touch()
    if pool._layout.storage is not None:
        with pool._database.write() as session:
            session.add(RemovedRow(name="", digest=digest, folder="", expires=datetime(2000, 1, 1)))


def test_leftovers_of_killed_adds_are_no_problem_and_are_swept(pool: Pool, tmp_path: Path) -> None:
    pool.add(write_peft_folder(tmp_path / "a"))
    (pool.state_folder / "staging" / "unfinished-dead").mkdir()
    (pool.state_folder / "staging" / "unfinished-dead" / "adapter_config.json").touch()
    promised(pool, "0" * 64)
    assert pool.verify() == []
    pool.add(write_peft_folder(tmp_path / "b", seed=1))
    assert list((pool.state_folder / "staging").iterdir()) == []
    assert "0" * 64 not in contents(pool)


def test_what_is_not_the_pools_is_never_swept(tmp_path: Path) -> None:
    pool = Place(tmp_path / "pool").create()
    for folder in ("adapters", "staging"):
        write_peft_folder(pool.location / folder / "sql")
    assert pool.add(pool.location / "adapters/sql").change is AddChange.ADDED
    pool.remove("sql")
    assert (pool.location / "adapters/sql/adapter_model.safetensors").exists()
    assert (pool.location / "staging/sql/adapter_model.safetensors").exists()
    pool.close()


@pytest.mark.parametrize("folder", ["adapters", "staging"])
def test_no_pool_is_made_over_folders_it_would_use(tmp_path: Path, folder: str) -> None:
    write_peft_folder(tmp_path / folder / "sql")
    with pytest.raises(PoolError, match=f"{folder} holds files already"):
        Pool.create(tmp_path, TINY_BASE)
    assert not (tmp_path / "pool.db").exists()


def test_lost_or_damaged_files_are_repaired(pool: Pool, tmp_path: Path) -> None:
    source = write_peft_folder(tmp_path / "a")
    folder = stored(pool, pool.add(source).adapter.digest)
    shutil.rmtree(folder)
    assert pool.add(source).change is AddChange.REPAIRED
    assert pool.verify() == []
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    assert pool.add(source, name="twin").change is AddChange.ADDED
    assert pool.verify() == []
    (folder / "adapter_config.json").unlink()
    assert pool.add(source).change is AddChange.REPAIRED
    assert pool.add(source).change is AddChange.UNCHANGED
    assert pool.verify() == []


def test_weights_of_an_earlier_revision(pool: Pool, tmp_path: Path) -> None:
    first = pool.add(write_peft_folder(tmp_path / "a")).adapter
    second = pool.add(write_peft_folder(tmp_path / "a", seed=1)).adapter
    for adapter in (first, second):
        assert pool.weights("a", adapter.digest).digest == adapter.digest
    assert pool.weights("a").digest == second.digest
    shutil.rmtree(stored(pool, first.digest))
    shutil.rmtree(first.folder, ignore_errors=True)
    for digest in (first.digest, "0" * 64, "../a"):
        with pytest.raises(AdapterNotFoundError, match="was revised or removed meanwhile"):
            pool.weights("a", digest)
    pool.grace_seconds = 0
    pool.remove("a")
    with pytest.raises(AdapterNotFoundError, match="was revised or removed meanwhile"):
        pool.weights("a", second.digest)


@pytest.mark.parametrize("location", ["~nosuch/x", "x" * 300, "a\0b"])
def test_places_that_cannot_be(pool: Pool, location: str) -> None:
    with pytest.raises(PoolError, match="cannot"):
        Pool.open(location)
    with pytest.raises(PoolError, match="cannot"):
        Pool.create(location, TINY_BASE)
    with pytest.raises(InvalidInputError, match="cannot be an adapter's folder|neither a folder nor a hub id"):
        pool.add(location)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(PoolError, match="cannot open the pool at .*Permission denied"):
        Pool.open(tmp_path)
    with pytest.raises(PoolError, match="cannot make a pool at .*Permission denied"):
        Pool.create(tmp_path, TINY_BASE)


def test_a_base_model_in_a_folder_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models/llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with Pool.create("pool", "models/llama") as pool:
        assert pool.base_model == str(tmp_path / "models/llama")
    with Pool.open("pool") as pool:
        assert pool.base_model == str(tmp_path / "models/llama")


def test_descriptions_hold_no_terminal_escapes(pool: Pool, tmp_path: Path) -> None:
    added = pool.add(
        write_peft_folder(tmp_path / "a"), description="\x1b[31mred\udcff", tags=["\x1b[0mt"], samples=["x"]
    ).adapter
    assert (added.description, added.tags) == ("[31mred", ("[0mt",))


def test_the_base_model_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("loraretriever.models.base_model_spec", lambda name: asked.append(name) or TINY_SPEC)
    with Pool.create(tmp_path / "pool", TINY_BASE) as pool:
        pool.add(write_peft_folder(tmp_path / "a"))
    with Pool.open(tmp_path / "pool") as pool:
        pool.add(write_peft_folder(tmp_path / "b"))
        assert pool.verify() == []
    assert asked == [TINY_BASE]


@pytest.fixture
def no_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModelLoadError(f"cannot load {name}")

    monkeypatch.setattr("loraretriever.models.base_model_spec", fail)


@pytest.mark.usefixtures("no_base_model")
def test_without_the_base_model_nothing_is_added(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "pool", TINY_BASE) as pool:
        with pytest.raises(ModelLoadError, match="cannot load tiny/llama"):
            pool.add(write_peft_folder(tmp_path / "a"))
        assert pool.list() == []


@pytest.mark.usefixtures("no_base_model")
def test_shapes_can_be_checked_later(tmp_path: Path) -> None:
    wrong = {key.replace("layers.0", "layers.9"): value for key, value in lora_tensors().items()}
    with Pool.create(tmp_path / "pool", TINY_BASE, check_base=False) as pool:
        pool.add(write_peft_folder(tmp_path / "a"))
        pool.add(write_peft_folder(tmp_path / "b", tensors=wrong))
        assert pool.verify() == ["the shapes of a, b cannot be checked: cannot load tiny/llama"]
        for _ in range(2):
            (problem,) = pool.check_shapes(TINY_SPEC)
            assert problem.startswith("adapter 'b': ")
            assert "'model.layers.9.self_attn.q_proj'" in problem
            assert pool.verify() == ["the shapes of b cannot be checked: cannot load tiny/llama"]
        pool.set_enabled("b", False)
        assert pool.check_shapes(TINY_SPEC) == []
        assert ["'model.layers.9.self_attn.q_proj'" in problem for problem in pool.verify()] == [True]


@pytest.mark.usefixtures("no_base_model")
def test_shapes_of_another_base_model_are_not_kept(tmp_path: Path) -> None:
    other = BaseModelSpec("other/model", {name: (out + 1, inner) for name, (out, inner) in TINY_SPEC.linear.items()})
    alike = BaseModelSpec("alike/model", TINY_SPEC.linear)
    with Pool.create(tmp_path / "pool", TINY_BASE, check_base=False) as pool:
        pool.add(write_peft_folder(tmp_path / "a"))
        assert ["expected (33, 32)" in problem for problem in pool.check_shapes(other)] == [True]
        assert pool.check_shapes(alike) == []
        assert pool.verify() == ["the shapes of a cannot be checked: cannot load tiny/llama"], "nothing was stored"
        assert pool.check_shapes(TINY_SPEC) == []
        assert pool.verify() == []
        assert len(pool.check_shapes(other)) == 1, "another model's shapes are compared with all enabled adapters"
        pool.set_enabled("a", False)
        assert pool.check_shapes(other) == []


@pytest.mark.usefixtures("pool")
def test_creation_refuses_what_is_there(place: Place, tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="already"):
        place.create()
    write_peft_folder(tmp_path / "plain" / "a")
    with pytest.raises(PoolError, match="is a pool as it is"):
        Pool.create(tmp_path / "plain", TINY_BASE)
    with pytest.raises(InvalidInputError, match="base model's name is empty"):
        Pool.create(tmp_path / "new", " ")
    (tmp_path / "file").touch()
    with pytest.raises(PoolError, match="cannot make a pool"):
        Pool.create(tmp_path / "file", TINY_BASE)


def test_opening_tells_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="there is no pool at .*pool init"):
        Pool.open(tmp_path / "nowhere")
    with pytest.raises(PoolError, match=r"expected pool\.db or folders with adapter_config\.json"):
        Pool.open(tmp_path)
    with pytest.raises(PoolError, match="single adapter"):
        Pool.open(write_peft_folder(tmp_path / "a"))
    for url in ("mysql://user:secret@host/pool", "https://host/pool", "postgresql://host"):
        with pytest.raises(InvalidInputError, match="expected postgresql://USER@HOST/DATABASE") as caught:
            Pool.open(url)
        assert "secret" not in str(caught.value)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/pool.db").write_bytes(b"not a database" * 100)
    with pytest.raises(PoolError, match=r"pool\.db cannot be used: file is not a database"):
        Pool.open(tmp_path / "bad")


def test_light_work_needs_no_heavy_imports(pool: Pool, tmp_path: Path) -> None:
    write_peft_folder(tmp_path / "a")
    script = (
        "import sys; from loraretriever.pool import Pool\n"
        f"with Pool.open({str(pool.location)!r}) as pool:\n"
        f"    pool.add({str(tmp_path / 'a')!r}); pool.list(); pool.embeddings('x'); pool.verify()\n"
        "print({'torch', 'transformers', 'alembic', 'huggingface_hub'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_threads_reads_see_one_state(pool: Pool, tmp_path: Path) -> None:
    pool.add(write_peft_folder(tmp_path / "a"), samples=["x"])
    with pool._database.read() as session:
        session.connection().exec_driver_sql("SELECT 1 FROM pool").all()
        pool.add(write_peft_folder(tmp_path / "b"), samples=["x"])
        assert session.connection().exec_driver_sql("SELECT count(*) FROM adapters").scalar() == 1
    assert len(pool.list()) == 2
