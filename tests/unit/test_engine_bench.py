"""The benchmark of engines: workloads, contenders and figures, on tiny models and scripted contenders."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from loraretriever.errors import InvalidInputError, ModelLoadError, PoolError
from loraretriever.evaluate import engine_bench, engine_makers, engine_vllm
from loraretriever.evaluate.engine_adapters import make_crowd, make_pool
from loraretriever.evaluate.engine_bench import Options, choose, count_steps, take_turns
from loraretriever.evaluate.engine_contenders import OurEngine, Served, StaticBatches, load_peft
from loraretriever.evaluate.engine_makers import CONTENDERS, Workshop
from loraretriever.evaluate.engine_report import Run, find_agreement, find_figures, find_ratios, spread
from loraretriever.evaluate.engine_vllm import Vllm, VllmSetUp
from loraretriever.evaluate.engine_workloads import Job, Sizes, Workloads, by_zipf, in_turn, make_prompt, realistic
from loraretriever.models import BaseModel
from loraretriever.pool import Pool
from loraretriever.types import Composition, Generation, Mixer, Request
from tiny import LAYERS, tiny_llama, write_peft_folder
from tiny_text import tiny_tokenizer

SIZES = Sizes(batch=5, uniform_prompt=9, uniform_output=4, requests=7, prompt=(3, 40), output=(2, 9))
NAMES = [f"a{place}" for place in range(6)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def base(tokenizer: Any) -> BaseModel:
    return BaseModel("tiny/llama", tiny_llama(), tokenizer)


@pytest.fixture
def source(tmp_path: Path) -> Pool:
    """A pool of two adapters, of different ranks."""
    for seed, name in enumerate(("sql", "german.v2")):
        write_peft_folder(tmp_path / "source" / name, seed=seed, rank=4 + seed)
    return Pool.open(tmp_path / "source")


# Workloads


@given(st.integers(1, 60), st.integers(0, 1000))
def test_prompts_have_the_length_asked_for(length: int, seed: int) -> None:
    tokenizer = _TOKENIZER
    assert len(tokenizer(make_prompt(tokenizer, length, np.random.default_rng(seed))).input_ids) == length


_TOKENIZER = tiny_tokenizer()


def test_a_tokenizer_that_gives_nothing_back_is_refused() -> None:
    class Deaf:
        def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[1] * len(text.split()))

        def decode(self, ids: Sequence[int]) -> str:
            return "x"

    with pytest.raises(InvalidInputError, match="no prompt of 7 tokens"):
        make_prompt(Deaf(), 7, np.random.default_rng(0))


def test_uniform_jobs_are_alike_and_new_in_each_round(tokenizer: Any) -> None:
    workloads = Workloads(tokenizer, SIZES, seed=3)
    jobs = workloads.jobs("uniform", 1, NAMES, 3)
    assert {(len(tokenizer(job.prompt).input_ids), job.max_tokens, job.arrival) for job in jobs} == {(9, 4, 0.0)}
    assert len(jobs) == 5 and jobs == workloads.jobs("uniform", 1, NAMES, 3)
    others = workloads.jobs("uniform", 2, NAMES, 3)
    assert not {job.prompt for job in jobs} & {job.prompt for job in others}
    assert [job.prompt for job in workloads.jobs("uniform", 1, (), 0)] == [job.prompt for job in jobs]
    assert all(job.adapters == () for job in workloads.jobs("uniform", 1, (), 0))


def test_realistic_jobs_have_their_lengths_and_rate(tokenizer: Any) -> None:
    sizes = replace(SIZES, requests=2000, prompt=(4, 64), output=(2, 32))
    jobs = realistic(tokenizer, sizes, (0,), rate=50.0)
    prompts = np.array([len(tokenizer(job.prompt).input_ids) for job in jobs])
    outputs = np.array([job.max_tokens for job in jobs])
    assert prompts.min() >= 4 and prompts.max() <= 64 and outputs.min() >= 2 and outputs.max() <= 32
    # Log-uniform: the median is the ends' geometric mean.
    assert np.median(prompts) == pytest.approx(16, abs=2) and np.median(outputs) == pytest.approx(8, abs=1)
    arrivals = np.array([job.arrival for job in jobs])
    assert arrivals[0] == 0 and (np.diff(arrivals) >= 0).all()
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.1) and gaps.std() == pytest.approx(1 / 50, rel=0.1)


def test_with_an_infinite_rate_all_are_there_at_once(tokenizer: Any) -> None:
    assert {job.arrival for job in realistic(tokenizer, SIZES, (0,))} == {0.0}


def test_adapters_in_turn_are_asked_for_equally_often() -> None:
    jobs = in_turn([Job("x", 1)] * 16, NAMES, 3)
    assert set(Counter(name for job in jobs for name in job.adapters).values()) == {8}
    assert all(len(set(job.adapters)) == 3 for job in jobs)


def test_adapters_by_zipf() -> None:
    jobs = by_zipf([Job("x", 1)] * 6000, NAMES, 1, (0,))
    counts = Counter(job.adapters[0] for job in jobs)
    total = sum(1 / rank for rank in range(1, 7))
    for rank, name in enumerate(NAMES, start=1):
        assert counts[name] / 6000 == pytest.approx(1 / rank / total, abs=0.03)
    assert all(len(set(job.adapters)) == 3 for job in by_zipf(jobs[:50], NAMES, 3, (0,)))
    assert by_zipf(jobs[:3], (), 0, (0,)) == jobs[:3]


def test_sizes_fit_a_small_model() -> None:
    sizes = Sizes(prompt=(16, 512), output=(8, 128))
    assert sizes.fitted(2048) == sizes and sizes.longest == 640
    assert sizes.fitted(512).prompt == (16, 384)
    with pytest.raises(InvalidInputError, match="takes 100 tokens; expected 144 and 96 at least"):
        sizes.fitted(100)


# Pools


def test_a_made_pool_has_the_sources_adapters_then_varied_ones(source: Pool, tmp_path: Path) -> None:
    made = tmp_path / "made"
    make_pool(made, source.list(), NAMES, seed=0)
    pool = Pool.open(made)
    assert not pool.problems and [adapter.name for adapter in pool.list()] == NAMES
    assert len({adapter.digest for adapter in pool.list()}) == 6
    assert [pool.get(name).digest for name in NAMES[:2]] == [a.digest for a in source.list()]
    assert [pool.get(name).ranks for name in NAMES] == 3 * [a.ranks for a in source.list()]
    original, varied = (load_file(made / name / "adapter_model.safetensors") for name in ("a0", "a2"))
    for name, factor in original.items():
        noise = (varied[name] - factor).square().mean().sqrt() / factor.square().mean().sqrt()
        assert 0.02 < float(noise) < 0.08
    again = tmp_path / "again"
    make_pool(again, source.list(), NAMES, seed=0)
    assert {a.digest for a in Pool.open(again).list()} == {a.digest for a in pool.list()}


def test_a_pool_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="no enabled adapter"):
        make_pool(tmp_path, [], NAMES, seed=0)


def test_a_crowd_shares_its_files_and_has_distinct_adapters(source: Pool, tmp_path: Path) -> None:
    crowd = tmp_path / "crowd"
    make_crowd(crowd, [adapter.folder for adapter in source.list()], 9)
    pool = Pool.open(crowd)
    assert not pool.problems and len({adapter.digest for adapter in pool.list()}) == 9
    ours, theirs = pool.weights("sql").modules, source.weights("sql").modules
    assert ours.keys() == theirs.keys() and all(ours[path].scaling == theirs[path].scaling for path in ours)
    assert len({(adapter.folder / "adapter_model.safetensors").stat().st_ino for adapter in pool.list()}) == 3


# Contenders


class ScriptedEngine:
    """Answers at once; notes what it was asked for, and how."""

    def __init__(self) -> None:
        self.ran: list[Request] = []
        self.submitted: list[tuple[float, Request]] = []
        self.closed = False

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        self.ran += requests
        for position in reversed(range(len(requests))):
            yield position, self._answer(requests[position])

    def submit(self, request: Request) -> Any:
        self.submitted.append((time.perf_counter(), request))
        return SimpleNamespace(result=lambda: [self._answer(request)])

    def _answer(self, request: Request) -> Generation:
        tokens = request.sampling.max_tokens
        return Generation(request.prompt, "length", 1, tokens, float(tokens), first_token_seconds=0.25)

    def close(self) -> None:
        self.closed = True


def test_our_engine_runs_what_is_there_in_one_call() -> None:
    engine = ScriptedEngine()
    jobs = [Job("p", 3), Job("q", 5, adapters=("a",)), Job("r", 2, adapters=("a", "b", "c", "d"))]
    served = OurEngine(engine, lambda: None).run(jobs)
    assert served == [Served(n, 0.25, float(n), p) for n, p in ((3, "p"), (5, "q"), (2, "r"))]
    assert not engine.submitted
    compositions = [request.composition for request in engine.ran]
    assert compositions == [
        Composition("base"),
        Composition("selection", ("a",), (1.0,)),
        Composition("mixture", ("a", "b", "c", "d"), (0.25,) * 4, Mixer.OUTPUTS),
    ]
    assert all(r.sampling.ignore_end and r.sampling.temperature == 0 and not r.chat for r in engine.ran)


def test_our_engine_submits_at_arrival_and_counts_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, now, slept = ScriptedEngine(), [10.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds + 0.5  # wakes late

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    closed: list[bool] = []
    contender = OurEngine(engine, lambda: closed.append(engine.closed))
    served = contender.run([Job("p", 1), Job("q", 2, arrival=4.0)])
    assert slept == [0.0, 3.5] and [at for at, _ in engine.submitted] == [10.5, 14.5]
    assert served == [Served(1, 0.75, 1.5, "p"), Served(2, 0.75, 2.5, "q")]
    contender.close()
    assert closed == [True]


def reference(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """Greedy decoding, one prompt alone, without a cache."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


@torch.inference_mode()
def test_static_batches_answer_as_each_prompt_alone(base: BaseModel) -> None:
    jobs = Workloads(base.tokenizer, SIZES, 1).jobs("realistic", 1, (), 0)
    served = StaticBatches(base.model, base.tokenizer, 3, mixed=False).run(jobs)
    assert [each.tokens for each in served] == [job.max_tokens for job in jobs]
    assert [each.text for each in served] == [
        reference(base.model, base.tokenizer, job.prompt, job.max_tokens) for job in jobs
    ]
    for each in served:
        assert each.first_token_seconds is not None and 0 < each.first_token_seconds < each.seconds


def test_static_batches_go_on_after_the_end_token(base: BaseModel) -> None:
    model = tiny_llama()
    first = model.generate(**base.tokenizer("a", return_tensors="pt"), max_new_tokens=1, do_sample=False)[0, -1]
    model.generation_config.eos_token_id = int(first)
    served = StaticBatches(model, base.tokenizer, 3, mixed=False).run([Job("a", 7), Job("bc", 4)])
    assert [each.tokens for each in served] == [7, 4]


class SlowModel:
    """Generates zeros, a second for each step, on a clock of its own; notes each batch's prompts."""

    def __init__(self, now: list[float]) -> None:
        self.now, self.batches, self.adapters = now, [], []

    def generate(self, input_ids: Any, max_new_tokens: int, streamer: Any, **options: Any) -> Any:
        self.batches.append(len(input_ids))
        self.adapters.append(options.get("adapter_names"))
        streamer.put(input_ids)
        for _ in range(max_new_tokens):
            self.now[0] += 1
            streamer.put(input_ids[:, :1])
        return torch.cat([input_ids, torch.full((len(input_ids), max_new_tokens), 40)], dim=1)


def test_static_batches_take_what_has_arrived(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    model = SlowModel(now)
    tokens = (2, 5, 1, 1, 3)
    arrivals = (0.0, 1.0, 2.0, 3.0, 20.0)
    jobs = [Job("ab", n, at, (f"a{i}",)) for i, (n, at) in enumerate(zip(tokens, arrivals, strict=True))]
    served = StaticBatches(model, tokenizer, 2, mixed=True).run(jobs)
    # The first alone (0 to 2); the next two (2 to 7); the fourth alone (7 to 8), and the last once it comes (20).
    assert model.batches == [1, 2, 1, 1]
    assert model.adapters == [["a0"], ["a1", "a2"], ["a3"], ["a4"]]
    assert [each.first_token_seconds for each in served] == [1.0, 2.0, 1.0, 5.0, 1.0]
    assert [each.seconds for each in served] == [2.0, 6.0, 1.0, 5.0, 3.0]
    assert [len(each.text) for each in served] == list(tokens)


@pytest.fixture
def shop(base: BaseModel, source: Pool, tmp_path: Path) -> Workshop:
    folder = tmp_path / "shop"
    folder.mkdir()
    return Workshop(folder, base, "float32", source.list(), SIZES, 0, None)


def test_replicas_share_weights_but_not_modules(shop: Workshop) -> None:
    replica = shop.replica().model
    layer, own = (model.model.layers[LAYERS - 1].self_attn.q_proj for model in (replica, shop.base.model))
    assert layer is not own and layer.weight is own.weight
    before = sum(p.numel() for p in shop.base.model.parameters())
    load_peft(BaseModel("x", replica, None), shop.pool(2), ["a0", "a1"])
    assert sum(p.numel() for p in shop.base.model.parameters()) == before
    assert shop.base.model.model.layers[0].self_attn.q_proj is not replica.model.layers[0].self_attn.q_proj


def test_our_engine_and_peft_say_the_same(shop: Workshop) -> None:
    jobs = Workloads(shop.base.tokenizer, SIZES, 2).jobs("uniform", 1, engine_makers.adapter_names(8), 1)
    texts = {}
    for name in ("selection_k1_n8", "peft_k1", "base", "transformers", "registered_10"):
        maker = CONTENDERS[name]
        contender = maker.build(shop, maker)
        own = [replace(job, adapters=job.adapters if maker.k else ()) for job in jobs]
        texts[name] = [served.text for served in contender.run(own)]
        contender.close()
    assert texts["selection_k1_n8"] == texts["peft_k1"] == texts["registered_10"]
    assert texts["base"] == texts["transformers"] != texts["peft_k1"]
    assert "peft" in shop.versions


# vLLM, played by a script

FAKE_VLLM = """
import sys, types

class Output:
    def __init__(self, request_id, prompt, made, wanted):
        self.request_id, self.finished = request_id, made == wanted
        self.outputs = [types.SimpleNamespace(token_ids=[0] * made, text=prompt)]

class EngineArgs(dict):
    pass

class LLMEngine:
    @classmethod
    def from_engine_args(cls, args):
        print("chatter on standard output")
        if args["dtype"] == "broken":
            raise RuntimeError("no such dtype")
        engine = cls()
        engine.waiting = {}
        return engine

    def add_request(self, request_id, prompt, sampling, lora_request):
        assert sampling["ignore_eos"] and sampling["temperature"] == 0
        lora = f" by {lora_request[2]}" if lora_request else ""
        self.waiting[request_id] = [prompt + lora, 0, sampling["max_tokens"]]

    def step(self):
        outputs = []
        for request_id, state in list(self.waiting.items()):
            state[1] += 1
            outputs.append(Output(request_id, *state))
            if state[1] == state[2]:
                del self.waiting[request_id]
        return outputs

SamplingParams = dict
__version__ = "0.0.fake"
"""


@pytest.fixture
def vllm_setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmSetUp:
    package = tmp_path / "packages" / "vllm"
    (package / "lora").mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_VLLM)
    (package / "lora" / "__init__.py").write_text("")
    (package / "lora" / "request.py").write_text("LoRARequest = lambda *values: values")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    adapters = {"a0": Path("/x/a0"), "a1": Path("/x/a1")}
    return VllmSetUp(sys.executable, "base", "float32", adapters, rank=5, batch_size=4, max_length=64, threads=1)


def test_vllm_answers_jobs_of_several_rounds(vllm_setup: VllmSetUp, tmp_path: Path) -> None:
    vllm = Vllm(vllm_setup, tmp_path)
    assert vllm.version == "0.0.fake"
    for _ in range(2):
        served = vllm.run([Job("p", 3, adapters=("a1",)), Job("q", 2, arrival=0.05)])
        assert [(each.tokens, each.text) for each in served] == [(3, "p by /x/a1"), (2, "q")]
        for each in served:
            assert each.first_token_seconds is not None and 0 <= each.first_token_seconds <= each.seconds
    vllm.close()
    assert "chatter" in (tmp_path / "vllm.log").read_text()


def test_vllm_gets_the_rank_that_it_takes(vllm_setup: VllmSetUp) -> None:
    engine = engine_vllm._arguments(vllm_setup)["engine"]
    assert engine["max_lora_rank"] == 8 and engine["max_loras"] == 2
    with pytest.raises(InvalidInputError, match="rank 513; expected 512 at most"):
        engine_vllm._arguments(replace(vllm_setup, rank=513))


def test_vllm_that_ends_says_why(vllm_setup: VllmSetUp, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"(?s)exit status 1.*no such dtype"):
        Vllm(replace(vllm_setup, dtype="broken"), tmp_path)
    with pytest.raises(InvalidInputError, match="cannot be run"):
        Vllm(replace(vllm_setup, python=str(tmp_path / "nothing")), tmp_path)
    vllm = Vllm(vllm_setup, tmp_path)
    vllm._process.kill()
    vllm._process.wait()
    with pytest.raises(ModelLoadError, match="exit status -9"):
        vllm.run([Job("p", 1)])
    vllm.close()


# Turns and figures


class Scripted:
    """Takes `seconds` for a token; notes its turns in a common list."""

    def __init__(self, name: str, seconds: float, turns: list[str], text: str = "") -> None:
        self.name, self.seconds, self.turns, self.text = name, seconds, turns, text

    def run(self, jobs: Sequence[Job]) -> list[Served]:
        self.turns.append(self.name)
        return [Served(j.max_tokens, self.seconds, self.seconds * j.max_tokens, self.text) for j in jobs]

    def close(self) -> None:
        pass


def test_contenders_take_turns() -> None:
    order: list[str] = []
    contenders = {name: Scripted(name, 1, order) for name in "ABC"}
    turns = [("A", "uniform"), ("B", "uniform"), ("C", "uniform"), ("A", "realistic")]
    asked: list[tuple[str, str, int]] = []
    steps: list[None] = []

    def jobs(*key: Any) -> list[Job]:
        asked.append(key)
        return [Job("p", 2)]

    runs = take_turns(contenders, turns, 2, jobs, lambda: steps.append(None))
    assert order == list("ABCAABCA") and len(steps) == 8
    assert asked == [(*turn, round_) for round_ in (1, 2) for turn in turns]
    assert {turn: len(own) for turn, own in runs.items()} == dict.fromkeys(turns, 2)


def test_ratios_are_those_of_the_same_round() -> None:
    def run(seconds: float) -> Run:
        return Run([Job("p", 10)], [Served(10, 0.5, seconds, "")])

    runs = {
        ("mixture_k3_n8", "uniform"): [run(2), run(10), run(5)],
        ("base", "uniform"): [run(1), run(8), run(4.5)],
        ("base", "realistic"): [run(1)] * 3,
        ("transformers", "uniform"): [run(4), run(16), run(9)],
    }
    ratios = find_ratios(runs)
    assert ratios.keys() == {"mixture_k3_n8_vs_base", "base_vs_transformers_uniform"}
    found = ratios["mixture_k3_n8_vs_base"]
    assert found.values == (0.5, 0.8, 0.9) and (found.median, found.min, found.max) == (0.8, 0.5, 0.9)
    assert ratios["base_vs_transformers_uniform"].values == (4.0, 2.0, 2.0)


def test_all_ratios_are_of_known_contenders_and_all_promised_ones_are_there() -> None:
    every = [("p", workload) for workload in engine_bench.WORKLOADS]
    runs = {
        (name, workload): [Run([Job("p", 1)], [Served(1, 1.0, 1.0, "")])]
        for name in CONTENDERS
        for _, workload in every
    }
    assert {
        "mixture_k3_n8_vs_base", "mixture_k3_n48_vs_base", "base_vs_transformers_uniform",
        "base_vs_transformers_realistic", "mixture_k3_n8_vs_peft_k1", "mixture_k3_n8_vs_vllm_k1",
        "registered_1000_vs_10",
    } <= find_ratios(runs).keys()  # fmt: skip


def test_figures_of_one_contender() -> None:
    jobs = [Job("p", 5), Job("q", 1, arrival=3.0)]
    runs = {("base", "realistic"): [Run(jobs, [Served(5, 1.0, 2.0, ""), Served(1, 0.5, 0.5, "")])]}
    found = find_figures(runs)["base"]["realistic"]
    assert found.tokens_per_second == spread([6 / 3.5])
    assert found.first_token_seconds is not None and found.first_token_seconds.p50 == 0.75
    # The second has no token after its first.
    assert found.token_seconds is not None and found.token_seconds.p99 == 0.25


def test_figures_without_first_tokens() -> None:
    found = find_figures({("base", "uniform"): [Run([Job("p", 5)], [Served(5, None, 2.0, "")])]})["base"]["uniform"]
    assert found.first_token_seconds is None and found.token_seconds is None


@pytest.mark.parametrize(("one", "other", "share"), [("abcd", "abcd", 1), ("abcd", "abxd", 0.75), ("ab", "abcd", 0.5)])
def test_agreement_is_the_share_of_equal_tokens(one: str, other: str, share: float, tokenizer: Any) -> None:
    jobs = [Job("p", 4)]
    runs = {
        (name, "uniform"): [Run(jobs, Scripted(name, 1, [], text).run(jobs))]
        for name, text in (("base", one), ("transformers", other))
    }
    assert find_agreement(runs, tokenizer) == {"base_vs_transformers": share}


# Choosing


def test_choosing_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    makers, left_out = choose(Options("pool"))
    assert left_out.keys() == {"vllm_k1"} and makers.keys() == CONTENDERS.keys() - {"vllm_k1"}
    makers, left_out = choose(Options("pool", only=("transformers", "base"), vllm=sys.executable))
    assert list(makers) == ["base", "transformers"] and not left_out
    assert choose(Options("pool", vllm=sys.executable))[0].keys() == CONTENDERS.keys()
    for options, message in (
        (Options("pool", only=("magic",)), "unknown contender 'magic'; expected one of base, mixture_k3_n8"),
        (Options("pool", workloads=("magic",)), "unknown workload 'magic'; expected one of uniform, realistic"),
        (Options("pool", only=("peft_k1",), workloads=("realistic",), quick=True), "none of the contenders peft_k1"),
        (Options("pool", vllm="./nothing"), "--vllm is './nothing', which cannot be run"),
        (Options("pool", only=("vllm_k1",)), "name its interpreter with --vllm"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            choose(options)


def test_steps_of_a_quick_benchmark() -> None:
    only = ("base", "mixture_k3_n8", "registered_10")
    assert count_steps(Options("pool", only=only, rounds=2)) == 3 + 2 * 5
    assert count_steps(Options("pool", only=only, rounds=2, quick=True)) == 3 + 2 * 4


def test_the_rate_is_the_measured_capacity_times_the_overload() -> None:
    contender = Scripted("base", 2.0, [])
    assert engine_bench._capacity(contender, [Job("p", 3), Job("q", 4)]) == 2 / 8
    assert math.isinf(Workloads(None, SIZES, 0).rate)


def test_a_report_is_json() -> None:
    runs = {("base", "uniform"): [Run([Job("p", 1)], [Served(1, 1.0, 1.0, "")])]}
    from loraretriever.console import to_json

    assert json.loads(to_json(find_figures(runs)))["base"]["uniform"]["tokens_per_second"]["values"] == [1.0]
