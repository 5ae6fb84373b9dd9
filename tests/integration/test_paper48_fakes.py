"""The preset `paper48` on stand-ins: a tiny random Llama and 48 random adapters of the paper's names and shape."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraretriever.evaluate.experiment.paper48 import Preset, load_paper48
from loraretriever.evaluate.experiment.paper48_pool import make_pool
from loraretriever.evaluate.experiment.paper48_tables import TASKS
from loraretriever.models import load_tokenizer
from loraretriever.pipeline import LoraRetriever
from loraretriever.types import BASE_COMPOSITION, Composition, Request
from paper_fakes import write_fake_adapters, write_fake_base, write_fake_paper
from tiny_text import write_encoder

SHARED = Path(__file__).parents[3] / "shared" / "paper48"


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's own prompts where they are, else invented ones."""
    return SHARED if SHARED.is_dir() else write_fake_paper(tmp_path_factory.mktemp("paper"))


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory, paper: Path) -> Path:
    """A folder with `base`, `adapters` and `encoder`."""
    folder = tmp_path_factory.mktemp("fakes")
    samples = load_paper48(paper).samples
    write_fake_base(folder / "base", [rows[0].inputs for rows in samples.values()])
    write_fake_adapters(folder / "adapters")
    write_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def preset(paper: Path) -> Preset:
    return load_paper48(paper)


def test_the_papers_prompts_through_retrieval_and_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fakes: Path, preset: Preset
) -> None:
    monkeypatch.setenv("LORARETRIEVER_CACHE", str(tmp_path / "cache"))
    pool = make_pool(preset, tmp_path / "pool", fakes / "adapters")
    prompts = preset.prompts(1)
    assert len(prompts) == len(TASKS)
    with LoraRetriever.open(
        pool,
        base_model=str(fakes / "base"),
        encoder=str(fakes / "encoder"),
        retriever="paper",
        dtype=preset.dtype,
        cache_mib=64,
    ) as lr:
        some = prompts[:4]
        routes = [lr.route([each.inputs], k=preset.k, exclude=[str(each.own)])[0] for each in some]
        for prompt, route in zip(some, routes, strict=True):
            found = {hit.adapter for hit in route.hits}
            assert len(found) == 3
            assert found <= TASKS.keys() - {prompt.own}
        compositions = [
            BASE_COMPOSITION,
            *(Composition("selection", (each.own or "",), (1.0,)) for each in some),
            Composition("mixture", tuple(hit.adapter for hit in routes[0].hits), (1 / 3,) * 3),
        ]
        text = preset.render(some[0].inputs)
        requests = [Request(text, each, preset.sampling, chat=False) for each in compositions]
        answers = dict(lr.engine.run(requests))
    ids = load_tokenizer(str(fakes / "base"))(text).input_ids
    assert ids[0] == 1  # Llama's tokenizer puts <s> before a text, and so must what the model reads
    assert {each.prompt_tokens for each in answers.values()} == {len(ids)}
    assert all(1 <= each.completion_tokens <= 50 for each in answers.values())
    assert len({each.text for each in answers.values()}) == len(compositions)  # every composition acts
