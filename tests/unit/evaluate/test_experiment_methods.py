"""Methods and harness over a pool of tiny adapters, a word encoder and a scripted engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraretriever.config import Settings
from loraretriever.evaluate.experiment.answers import AnswerStore
from loraretriever.evaluate.experiment.harness import answer_all, curve, primary_mean, rankings, time_all
from loraretriever.evaluate.experiment.methods import Base, BestSingle, Method, Oracle, Retrieved, Soup, draw_experts
from loraretriever.evaluate.experiment.registry import all_methods, make_methods
from loraretriever.evaluate.experiment.results import METRICS, MethodInfo, TestPrompt
from loraretriever.evaluate.experiment.setup import Options, Setup
from loraretriever.evaluate.experiment.stream import Catalogue
from loraretriever.evaluate.tasks import Example
from loraretriever.pipeline import LoraRetriever
from loraretriever.pool import Pool
from loraretriever.retrieve import PaperRetriever
from loraretriever.types import Composition, Generation, Mixer, Request
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder
from tiny_text import WordEncoder

SAMPLES = {
    "sql": ["write a query", "query the table"],
    "bash": ["write a command", "command the shell"],
    "german": ["translate to german"],
    "german-2": ["translate to german again"],
    "math": ["add the numbers"],
}
TASKS = {"sql": "sql", "bash": "bash", "german": "german", "german-2": "german", "math": "math"}
DOMAINS = {"sql": "code", "bash": "code", "german": "translation", "math": "math"}


class ScriptedEngine:
    """Answers as a function of the prompt and the composition."""

    def __init__(self, answer: Callable[[Request], str]) -> None:
        self.answer = answer
        self.requests: list[Request] = []

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        for position in reversed(range(len(requests))):
            self.requests.append(requests[position])
            yield position, Generation(self.answer(requests[position]), "stop", 3, 4, 0.5)

    def close(self) -> None:
        pass


def right_with(request: Request) -> str:
    """Right where the first adapter is the one that the prompt names at its end."""
    wanted = request.prompt.split()[-1]
    return "yes" if request.composition.adapters[:1] == (wanted,) else "no"


def prompt(task: str, number: int, text: str) -> TestPrompt:
    own = next(name for name, of in TASKS.items() if of == task)
    return TestPrompt(f"{task}/{number}", text, "yes", task, DOMAINS[task], "em", own)


PROMPTS = (
    prompt("sql", 0, "write a query for sql"),
    prompt("german", 0, "translate this to german-2"),
    prompt("math", 0, "add the two numbers math"),
    prompt("bash", 0, "write a command in bash"),
    prompt("sql", 1, "query the big table sql"),
)


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        for seed, name in enumerate(SAMPLES):
            pool.add(write_peft_folder(tmp_path / name, seed=seed), samples=SAMPLES[name])

        def unused(pool: Any, settings: Any) -> Any:
            raise AssertionError("the experiment makes its own engine")

        lr = LoraRetriever(pool, Settings(), lambda pool, settings: PaperRetriever(pool, WordEncoder()), unused)
        engine = ScriptedEngine(right_with)
        validation = {
            task: [Example(f"{number} things for {name}", "yes", task, DOMAINS[task], "em") for number in (2, 3)]
            for name, task in TASKS.items()
            if name != "german"
        }
        yield Setup(
            lr=lr,
            paper=lr,
            prompts=PROMPTS,
            catalogue=Catalogue(TASKS, DOMAINS),
            options=Options(k=2, max_tokens=5, timed_prompts=3, curve_ks=(1, 2), curve_prompts=1),
            folder=tmp_path / "out",
            store=AnswerStore(tmp_path / "out", {}),
            open_engine=lambda routers: engine,
            validation=validation,
        )


def info(name: str) -> MethodInfo:
    return MethodInfo(name, name, "ours")


def adapters(compositions: Sequence[Composition]) -> list[tuple[str, ...]]:
    return [composition.adapters for composition in compositions]


def test_base_uses_no_adapter(setup: Setup) -> None:
    assert adapters(Base(info("base")).compose(setup, PROMPTS, "iid")) == [()] * 5


def test_oracle_takes_the_own_adapter_and_of_several_the_best_on_validation(setup: Setup) -> None:
    found = adapters(Oracle(info("oracle")).compose(setup, PROMPTS, "iid"))
    assert found == [("sql",), ("german-2",), ("math",), ("bash",), ("sql",)]


def test_best_single_is_the_best_over_all_tasks_and_gives_way_where_it_is_excluded(setup: Setup) -> None:
    setup.validation = {
        task: [Example(f"x {'bash' if task != 'math' else 'math'}", "yes", task, DOMAINS[task], "em")]
        for task in DOMAINS
    }
    best = BestSingle(info("best"))
    assert adapters(best.compose(setup, PROMPTS, "iid")) == [("bash",)] * 5
    assert adapters(best.compose(setup, PROMPTS, "ood")) == [("bash",)] * 3 + [("math",)] + [("bash",)]
    assert adapters(best.compose(setup, PROMPTS, "strict_ood"))[0] == ("math",)
    assert not BestSingle(info("best")).prepare(replace(setup, validation={}))


@pytest.mark.parametrize(("setting", "gone"), [("iid", set()), ("ood", {"sql"}), ("strict_ood", {"sql", "bash"})])
def test_retrieved_keeps_to_the_setting(setup: Setup, setting: str, gone: set[str]) -> None:
    whole = Retrieved(info("x"), whole=True).compose(setup, PROMPTS[:1], setting)[0]
    assert set(whole.adapters) == set(SAMPLES) - gone
    assert whole.weights == pytest.approx([1 / len(whole.adapters)] * len(whole.adapters))
    assert len(Retrieved(info("x")).compose(setup, PROMPTS[:1], setting)[0].adapters) == 2


def test_retrieved_weighs_and_cuts_as_the_product_does(setup: Setup) -> None:
    (route,) = setup.lr.route([PROMPTS[0].inputs], k=2)
    expected = setup.lr.compose(replace(route, fallback=False), strategy="mixture", weighting="score")
    found = Retrieved(info("x"), weighting="score", coverage=setup.settings.coverage)
    assert found.compose(setup, PROMPTS[:1], "iid") == [expected]


def test_retrieved_falls_back_only_if_it_is_to(setup: Setup) -> None:
    odd = [replace(PROMPTS[0], id="sql/9", inputs="nothing of the sort")]
    assert adapters(Retrieved(info("x"), fallback="base").compose(setup, odd, "iid")) == [()]
    (even,) = Retrieved(info("x"), weighting="score", fallback="mixture").compose(setup, odd, "iid")
    assert even.weights == (0.5, 0.5)
    assert len(adapters(Retrieved(info("x")).compose(setup, odd, "iid"))[0]) == 2


def test_soup_is_one_set_for_all_by_mean_similarity_with_parameters_averaged(setup: Setup) -> None:
    routes = setup.lr.route([each.inputs for each in PROMPTS], k=5)
    mean = {
        name: np.mean([next(hit.score for hit in route.hits if hit.adapter == name) for route in routes])
        for name in SAMPLES
    }
    best = sorted(SAMPLES, key=lambda name: -mean[name])
    soup = Soup(info("soup"))
    for composition in soup.compose(setup, PROMPTS, "iid"):
        assert composition == Composition("fusion", tuple(best[:2]), (0.5, 0.5), Mixer.PARAMETERS)
    for each, composition in zip(PROMPTS, soup.compose(setup, PROMPTS, "ood"), strict=True):
        allowed = [name for name in best if TASKS[name] != each.task]
        assert composition.adapters == tuple(allowed[:2])


def test_experts_are_one_random_adapter_of_each_domain(setup: Setup) -> None:
    drawn = {draw_experts(replace(setup, options=replace(setup.options, seed=seed))) for seed in range(20)}
    for experts in drawn:
        assert [DOMAINS[TASKS[name]] for name in experts] == ["code", "math", "translation"]
    assert len(drawn) > 1


def test_answers_of_equal_compositions_are_made_once_and_scored_for_all(setup: Setup) -> None:
    methods: list[Method] = [
        Oracle(info("oracle"), ("iid",)),
        Retrieved(info("selection"), strategy="selection"),
        Base(info("base"), ("iid",)),
    ]
    scores, width = answer_all(setup, methods)
    engine: Any = setup.engine
    made = [(request.prompt, request.composition.adapters) for request in engine.requests]
    assert len(made) == len(set(made))
    em = METRICS.index("em")
    assert list(scores["oracle", "iid"][:, em]) == [1] * 5
    assert list(scores["base", "iid"][:, em]) == [0] * 5
    assert ("base", "ood") not in scores and ("selection", "strict_ood") in scores
    assert list(scores["selection", "ood"][:, em]) == [0] * 5
    assert width == {"oracle": 1, "selection": 1, "base": 0}
    before = len(engine.requests)
    again, _ = answer_all(setup, methods)
    assert len(engine.requests) == before
    np.testing.assert_array_equal(again["selection", "iid"], scores["selection", "iid"])
    lines = [json.loads(line) for line in (setup.folder / "choices.jsonl").read_text().splitlines()]
    assert len(lines) == 5 * (1 + 3 + 1)
    assert {"method": "base", "setting": "iid", "prompt": "sql/0", "composition": "base"} in lines


def test_a_mean_gives_every_task_the_same_weight() -> None:
    scores = np.zeros((5, len(METRICS)))
    scores[0, METRICS.index("em")] = 1  # one of two of sql, of which there are four tasks
    assert primary_mean(PROMPTS, scores) == pytest.approx(100 * 0.5 / 4)


def test_times_are_taken_beside_the_base_model_and_kept(setup: Setup) -> None:
    methods: list[Method] = [Retrieved(info("mixture")), Base(info("base"), ("iid",))]
    infos = time_all(setup, methods)
    lines = [json.loads(line) for line in (setup.folder / "timings.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * setup.options.timed_rounds
    speed = np.median([line["tokens"] / line["seconds"] for line in lines if line["method"] == "mixture"])
    assert infos["mixture"].tokens_per_second == pytest.approx(speed)
    assert infos["mixture"].compose_seconds is not None and infos["base"].relative_speed is not None
    engine: Any = setup.engine
    asked = len(engine.requests)
    assert all(request.sampling.ignore_end for request in engine.requests)
    assert time_all(setup, methods) == infos
    assert len(engine.requests) == asked
    assert all(request.prompt == request.prompt.strip() for request in engine.requests)
    batches = [request.namespace for request in engine.requests]
    assert len(set(batches)) == 1 + 2 * len(lines)  # no beginning of a prompt is known from another batch
    encoder: Any = setup.lr.retriever
    seen = [text for text in encoder._encoder.encoded if text.endswith("  ")]
    assert len(set(seen)) == len(seen)  # nor does the retriever remember one


def test_curve_and_rankings(setup: Setup) -> None:
    points = curve(setup)
    assert {(p.strategy, p.setting, p.k) for p in points} == {
        (strategy, setting, k) for strategy in ("mixture", "fusion") for setting in ("iid", "ood") for k in (1, 2)
    }
    assert all(point.prompts == 4 for point in points)
    found = rankings(setup)["hybrid"]
    assert [names[0] for names in found] == ["sql", "german", "math", "bash", "sql"]
    assert all(len(names) == 4 for names in found)  # both adapters of german count as one


def test_every_method_has_a_name_of_its_own_and_can_be_asked_for() -> None:
    names = [method.info.name for method in all_methods()]
    assert len(set(names)) == len(names)
    assert [method.info.name for method in make_methods(["oracle", "base"])] == ["base", "oracle"]
