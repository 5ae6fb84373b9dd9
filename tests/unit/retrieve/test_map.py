from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from retrieve_helpers import random_members

from loraretriever.errors import InvalidInputError
from loraretriever.pool import Pool
from loraretriever.retrieve import HybridRetriever, Parts, map
from loraretriever.retrieve.map import Plane
from loraretriever.retrieve.snapshot import Snapshot
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder
from tiny_text import WordEncoder


def plane(count: int, seed: int = 0, samples: int = 6) -> tuple[Snapshot, Plane, dict[str, np.ndarray]]:
    members = {member.name: member for member in random_members(count, samples=samples, seed=seed)}
    snapshot = Snapshot.learnt(list(members.values()), Parts())
    return snapshot, Plane(snapshot, members), {name: member.vectors for name, member in members.items()}


def test_the_plane_is_that_of_the_principal_components() -> None:
    snapshot, laid, vectors = plane(7)
    drawn = laid.map()
    means = snapshot.whiten(np.stack([vectors[name].mean(axis=0, dtype=np.float64) for name in drawn.adapters]))
    centred = means - means.mean(axis=0)
    _, lengths, axes = np.linalg.svd(centred, full_matrices=False)
    assert np.abs(drawn.points) == pytest.approx(np.abs(centred @ axes[:2].T), abs=1e-4)
    assert (drawn.points**2).sum(axis=0) == pytest.approx(lengths[:2] ** 2, rel=1e-4)
    for axis in drawn.points.T:
        assert axis[np.abs(axis).argmax()] > 0, "it does not depend on the sign that a solver happens to give"


def test_samples_lie_around_their_adapters_and_prompts_where_samples_lie() -> None:
    _, laid, vectors = plane(5)
    drawn = laid.map()
    assert drawn.adapters == tuple(vectors) and len(drawn.samples) == 30 and drawn.prompts.shape == (0, 2)
    for place in range(5):
        mean = drawn.samples[drawn.sample_adapters == place].mean(axis=0)
        assert mean == pytest.approx(drawn.points[place], abs=1e-3)
    found = laid.map(np.concatenate(list(vectors.values())).astype(np.float32))
    assert found.prompts == pytest.approx(drawn.samples) and found.points is drawn.points


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_adapters(count: int) -> None:
    _, laid, _ = plane(count)
    drawn = laid.map(np.zeros((3, 24), np.float32))
    assert drawn.points.shape == (count, 2) and drawn.prompts.shape == (3, 2)
    assert drawn.samples.shape == (6 * count, 2) and drawn.sample_adapters.shape == (6 * count,)
    assert np.isfinite(drawn.points).all() and not drawn.points[:, 1].any(), "they lie on a line"
    assert count < 2 or drawn.points[0, 0] == pytest.approx(-drawn.points[1, 0]) != 0


def test_of_many_samples_some_of_each_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map, "MAX_SAMPLES", 12)
    _, laid, vectors = plane(4, samples=9)
    drawn = laid.map()
    assert len(drawn.samples) == 12 and np.bincount(drawn.sample_adapters).tolist() == [3, 3, 3, 3]
    everywhere = laid.map(np.concatenate(list(vectors.values())).astype(np.float32)).prompts
    assert drawn.samples == pytest.approx(everywhere[::3])


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    samples = {
        "sql": ["write a query", "query a table"],
        "german": ["in german", "to german"],
        "sum": ["add", "sum up"],
    }
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        for seed, name in enumerate(samples):
            pool.add(write_peft_folder(tmp_path / name, seed=seed), samples=samples[name])
        yield pool


def test_the_map_follows_the_pool(pool: Pool, tmp_path: Path) -> None:
    retriever = HybridRetriever(pool, lambda name: WordEncoder())
    first = retriever.map()
    assert first.adapters == ("german", "sql", "sum") and len(first.samples) == 6
    drawn = retriever.map(["write a query", "what is this"])
    assert drawn.points is first.points, "nothing has changed"
    assert drawn.prompts[0] == pytest.approx(drawn.samples[2], abs=0.02), "samples are kept in half precision"
    pool.add(write_peft_folder(tmp_path / "poem", seed=9), samples=["write a poem"])
    assert "poem" in retriever.map().adapters
    retriever.settle()
    fresh = HybridRetriever(pool, lambda name: WordEncoder()).map(["write a query"])
    again = retriever.map(["write a query"])
    assert again.points.tobytes() == fresh.points.tobytes() and again.prompts.tobytes() == fresh.prompts.tobytes()
    with pytest.raises(InvalidInputError, match="prompt 2 of 2 is empty"):
        retriever.map(["a query", " "])


def test_the_map_of_an_empty_pool(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        drawn = HybridRetriever(pool, lambda name: WordEncoder()).map(["hello"])
    assert drawn.adapters == () and drawn.points.shape == (0, 2) and drawn.prompts.tolist() == [[0, 0]]
