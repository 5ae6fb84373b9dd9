"""The methods of the experiment, in the order of its tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.experiment.methods import Base, BestSingle, LoGo, Method, Oracle, Retrieved, Soup
from loraretriever.evaluate.experiment.results import MethodInfo
from loraretriever.evaluate.experiment.trained import LoraHub, Lorauter, MixtureOfExperts, Ramole, Smear

BOUNDS, OURS, PAPER, AFTER = "bounds", "ours", "paper", "after"
DEFAULT = "adaptive"  # the product's own way, its fallback to the base model aside
ONCE = ("iid",)
SEMLA_TEMPERATURE = 0.2  # the paper's is not for these distances


def _bounds() -> list[Method]:
    return [
        Base(MethodInfo("base", "base model", BOUNDS, "no adapter: the floor"), ONCE),
        Oracle(MethodInfo("oracle", "perfect selection", BOUNDS, "the adapter of the prompt's own task"), ONCE),
        BestSingle(
            MethodInfo("best_single", "best single adapter", BOUNDS, "the best on validation prompts of all tasks")
        ),
    ]


def _ours() -> list[Method]:
    hybrid = "the product's retriever"
    return [
        Retrieved(MethodInfo("selection", "selection", OURS, f"top 1, {hybrid}"), strategy="selection"),
        Retrieved(MethodInfo("mixture", "mixture, uniform", OURS, f"weights 1/k, {hybrid}")),
        Retrieved(MethodInfo("fusion", "fusion, uniform", OURS, f"weights 1/k, {hybrid}"), strategy="fusion"),
        Retrieved(
            MethodInfo("paper_selection", "selection, paper's retrieval", OURS, "mean of sample embeddings, cosine"),
            strategy="selection",
            retriever="paper",
        ),
        Retrieved(
            MethodInfo("paper_mixture", "mixture, paper's retrieval", OURS, "weights 1/k, cosine of mean embeddings"),
            retriever="paper",
        ),
        Retrieved(
            MethodInfo("paper_fusion", "fusion, paper's retrieval", OURS, "weights 1/k, cosine of mean embeddings"),
            strategy="fusion",
            retriever="paper",
        ),
        Retrieved(MethodInfo("mixture_score", "mixture, by score", OURS, hybrid), weighting="score"),
        Retrieved(
            MethodInfo("adaptive", "mixture, adaptive k", OURS, "by score, the fewest that carry 95 %"),
            weighting="score",
            coverage=0.95,
        ),
        Retrieved(
            MethodInfo("adaptive_base", "adaptive k, else the base", OURS, "the base model where none fits"),
            weighting="score",
            coverage=0.95,
            fallback="base",
        ),
        Retrieved(
            MethodInfo("adaptive_even", "adaptive k, else even", OURS, "weights 1/k where none fits"),
            weighting="score",
            coverage=0.95,
            fallback="mixture",
        ),
    ]


def _paper() -> list[Method]:
    experts = "a random adapter of each domain, router trained on samples of all tasks"
    return [
        Soup(MethodInfo("adaptersoup", "AdapterSoup", PAPER, "one set of k for the whole stream, parameters averaged")),
        LoraHub(MethodInfo("lorahub", "LoRAHub", PAPER, "weights of 20 adapters by 20 examples, no gradients", True)),
        Smear(MethodInfo("smear", "SMEAR", PAPER, f"{experts}; parameters averaged for each prompt", True)),
        MixtureOfExperts(MethodInfo("moe_top1", "MoE, top 1", PAPER, experts, True), top_k=1),
        MixtureOfExperts(MethodInfo("moe_top3", "MoE, top 3", PAPER, experts, True), top_k=3),
        MixtureOfExperts(MethodInfo("moe_soft", "MoE, soft", PAPER, experts, True)),
    ]


def _after() -> list[Method]:
    return [
        Retrieved(MethodInfo("ties", "TIES", AFTER, "of the retrieved, weights 1/k"), strategy="ties"),
        Retrieved(MethodInfo("dare", "DARE", AFTER, "linear, of the retrieved, weights 1/k"), strategy="dare_linear"),
        Retrieved(MethodInfo("lego", "LoRA-LEGO", AFTER, "of the retrieved"), strategy="lego"),
        Retrieved(
            MethodInfo("semla", "SemLA", AFTER, "weights by distance"),
            weighting="distance",
            temperature=SEMLA_TEMPERATURE,
            retriever="paper",
        ),
        Retrieved(
            MethodInfo("arrow", "Arrow", AFTER, "all adapters, three for each token"),
            strategy="arrow;top_k=3",
            whole=True,
        ),
        Retrieved(
            MethodInfo("arrow_retrieved", "Arrow over the retrieved", AFTER, "the k retrieved"), strategy="arrow"
        ),
        Retrieved(
            MethodInfo("spectral", "SpectR", AFTER, "all adapters, three for each token"),
            strategy="spectral;top_k=3",
            whole=True,
        ),
        Ramole(MethodInfo("ramole", "RAMoLE", AFTER, "a trained gate over the retrieved", True)),
        Lorauter(MethodInfo("lorauter", "LORAUTER", AFTER, "adapters of the nearest tasks", True)),
        Lorauter(
            MethodInfo("lorauter_known", "LORAUTER, task known", AFTER, "OOD it has examples of the task", True),
            known=True,
        ),
        LoGo(MethodInfo("logo", "LoGo", AFTER, "the k of all adapters with the greatest effect")),
    ]


def all_methods() -> list[Method]:
    """All of them."""
    groups: tuple[Callable[[], list[Method]], ...] = (_bounds, _ours, _paper, _after)
    return [method for group in groups for method in group()]


def make_methods(names: Sequence[str] | None = None) -> list[Method]:
    """The methods of these names, or all.

    Raises:
        InvalidInputError: there is no method of a name.
    """
    methods = all_methods()
    known = [method.info.name for method in methods]
    for name in names or ():
        if name not in known:
            raise InvalidInputError(f"unknown method {name!r}; expected one of {', '.join(known)}.")
    return [method for method in methods if names is None or method.info.name in names]
