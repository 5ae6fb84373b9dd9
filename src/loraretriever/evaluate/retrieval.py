"""Measures retrieval: accuracy, latency, calibration, and if asked robustness, of the product's own retrievers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial

from loraretriever.config import Settings
from loraretriever.errors import InvalidInputError
from loraretriever.evaluate import fallback, latency, robustness
from loraretriever.evaluate.environment import Environment, environment
from loraretriever.evaluate.latency import Latency, Timed
from loraretriever.evaluate.retrieval_data import RetrievalData
from loraretriever.evaluate.retrieval_methods import DEFAULT, PAPER, MemoryPool, Method, Workbench
from loraretriever.types import Ranking

SEED = 0
TOP = (1, 3, 5, 8)

# The adapters of LoraRetriever (arXiv 2402.09997), and the figures that it reports for them (top 1, 3, 5, 8): of an
# encoder as it is, and of its own, trained on a share of the tasks.
_PAPER_ADAPTERS = """
anli_r1 anli_r2 anli_r3 arc_challenge arc_easy bool_q cb common_gen copa cosmos_qa dart definite_pronoun_resolution
drop e2e_nlg glue_mrpc glue_qqp hellaswag imdb_reviews mnli_matched mnli_mismatched multirc natural_questions
openbookqa para_crawl_enes paws_wiki piqa qnli record rte sentiment140 snli squad_v1 squad_v2 sst2 story_cloze stsb
trivia_qa web_nlg_en wmt14_enfr wmt16_translate_csen wmt16_translate_deen wmt16_translate_fien wmt16_translate_roen
wmt16_translate_ruen wmt16_translate_tren wnli wsc yelp_polarity_reviews
"""
PAPER_ADAPTERS = frozenset(_PAPER_ADAPTERS.split())
_QUOTED = {
    "all-MiniLM-L6-v2": (51.7, 73.1, 80.5, 87.2),
    "trained on 0 %": (60.8, 79.3, 85.6, 91.6),
    "trained on 40 %": (63.2, 89.1, 95.5, 99.0),
    "trained on 100 %": (74.1, 97.4, 99.2, 99.8),
}


@dataclass(frozen=True, slots=True)
class MethodFigures:
    """Per cent of test prompts whose adapter is among the first hits, and milliseconds per prompt.

    `ms_p50`, `ms_p99`: one prompt at a time, encoding included, the encoder's cache empty. `ms_batch32`: in batches.
    `search_ms_p50`: one at a time, its vector known. None where no time was taken.
    """

    top1: float
    top3: float
    top5: float
    top8: float
    ms_p50: float | None = None
    ms_p99: float | None = None
    ms_batch32: float | None = None
    search_ms_p50: float | None = None


@dataclass(frozen=True, slots=True)
class QuotedFigures:
    """What the paper reports, in per cent; not measured here, and on a larger set of test prompts."""

    top1: float
    top3: float
    top5: float
    top8: float


@dataclass(frozen=True, slots=True)
class Setup:
    """How it was measured.

    `encoders`: names, weights and how they read (tokens, precision, layers, instruction). `repeated`: test prompts that
    are also a sample of their adapter.
    """

    encoders: tuple[str, ...]
    device: str
    false_fallback: float
    drift: float
    latency_prompts: int
    repeat: int
    repeated: int
    environment: Environment


@dataclass(frozen=True, slots=True)
class RetrievalReport:
    """All figures. Calibration and robustness are of the default method, and of the paper's for comparison."""

    default: str
    paper: str
    adapters: int
    samples: int
    test_prompts: int
    off_topic_prompts: int
    methods: dict[str, MethodFigures]  # best first
    calibration: fallback.Calibration | None
    paper_calibration: fallback.Calibration | None
    robustness: dict[str, robustness.Robustness] | None
    quoted: dict[str, QuotedFigures] | None  # only for the paper's own adapters
    setup: Setup


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure, besides accuracy and calibration. `latency_prompts` 0: no time is taken."""

    latency_prompts: int = 300
    repeat: int = 1
    robustness: bool = False


def bench_retrieval(
    data: RetrievalData,
    methods: Sequence[Method],
    settings: Settings,
    options: Options = Options(),
    advance: Callable[[], None] = lambda: None,
) -> RetrievalReport:
    """Measure the methods on the data. Advances `count_steps` times.

    Raises:
        InvalidInputError: there is no method, or an option is out of range.
        ModelLoadError: an encoder cannot be loaded.
        MissingExtraError: scikit-learn is not installed.
    """
    _check(methods, options)
    bench = Workbench(settings)
    rankings: dict[str, list[Ranking]] = {}
    for method in methods:
        retriever = bench.recorded(method, MemoryPool(data.samples))
        rankings[method.name] = retriever.rank((*data.prompts, *data.off_topic), max(TOP))
        advance()
    times = _time(bench, data, methods, options, advance)
    calibrations: dict[str, fallback.Calibration] = {}
    hardships: dict[str, robustness.Robustness] = {}
    for method in _studied(methods):
        make, found = partial(bench.recorded, method), rankings[method.name]
        calibrations[method.name] = fallback.measure(make, data, found, method.parts is not None, advance)
        if options.robustness:
            hardships[method.name] = robustness.measure(make, data, advance)
    figures = {name: _figures(found, data.tasks, times.get(name)) for name, found in rankings.items()}
    return RetrievalReport(
        DEFAULT,
        PAPER,
        len(data.samples),
        sum(len(samples.texts) for samples in data.samples.values()),
        len(data.prompts),
        len(data.off_topic),
        dict(sorted(figures.items(), key=lambda item: (-item[1].top1, item[0]))),
        calibrations.get(DEFAULT),
        calibrations.get(PAPER),
        hardships if options.robustness else None,
        _quoted() if data.samples.keys() == PAPER_ADAPTERS else None,
        _setup(bench, data, options),
    )


def count_steps(data: RetrievalData, methods: Sequence[Method], options: Options) -> int:
    """How often `bench_retrieval` advances."""
    folds = len(fallback.adapter_folds(data)) + len(fallback.domain_folds(data))
    studied = folds + (robustness.steps(data) if options.robustness else 0)
    timed = latency.rounds(len(_timed_prompts(data, options)), options.repeat)
    return len(methods) + timed + studied * len(_studied(methods))


def _check(methods: Sequence[Method], options: Options) -> None:
    if not methods:
        raise InvalidInputError("there is no method; expected one at least.")
    if options.repeat < 1 or options.latency_prompts < 0:
        raise InvalidInputError(
            f"repeat is {options.repeat} and latency_prompts {options.latency_prompts}; "
            "expected at least 1, and at least 0."
        )


def _studied(methods: Sequence[Method]) -> list[Method]:
    return [method for method in methods if method.name in (DEFAULT, PAPER)]


def _timed_prompts(data: RetrievalData, options: Options) -> list[str]:
    """Distinct ones, so that no cache knows any."""
    distinct = list(dict.fromkeys(data.prompts))
    return random.Random(SEED).sample(distinct, min(options.latency_prompts, len(distinct)))


def _time(
    bench: Workbench, data: RetrievalData, methods: Sequence[Method], options: Options, advance: Callable[[], None]
) -> dict[str, Latency]:
    prompts = _timed_prompts(data, options)
    if not prompts:
        return {}
    timed = {}
    for method in methods:
        cold, forget = bench.cold(method, MemoryPool(data.samples))
        timed[method.name] = Timed(cold, forget, bench.recorded(method, MemoryPool(data.samples)))
    return latency.measure(timed, prompts, max(TOP), options.repeat, advance)


def _figures(rankings: Sequence[Ranking], tasks: Sequence[str], times: Latency | None) -> MethodFigures:
    names = [[hit.adapter for hit in ranking.hits] for ranking in rankings[: len(tasks)]]
    top = (
        round(100 * sum(task in found[:k] for found, task in zip(names, tasks, strict=True)) / len(tasks), 1)
        for k in TOP
    )
    return MethodFigures(*top, *(astuple(times) if times else ()))


def _quoted() -> dict[str, QuotedFigures]:
    return {name: QuotedFigures(*figures) for name, figures in _QUOTED.items()}


def _setup(bench: Workbench, data: RetrievalData, options: Options) -> Setup:
    return Setup(
        bench.tags,
        bench.settings.device,
        bench.settings.false_fallback,
        bench.settings.drift,
        len(_timed_prompts(data, options)),
        options.repeat,
        data.repeated,
        environment(),
    )
