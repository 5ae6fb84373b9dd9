"""The report's figures, as SVG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from loraretriever.errors import require_extra
from loraretriever.evaluate.experiment.statistics import Statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = {"bounds": "#000000", "ours": "#0072b2", "paper": "#d55e00", "after": "#009e73"}
_STRATEGY = {"mixture": ("#0072b2", "o"), "fusion": ("#d55e00", "s")}
_SETTING = {"iid": ("-", "IID"), "ood": ("--", "OOD")}


def draw_all(statistics: Statistics) -> dict[str, str]:
    """The SVG text of each figure that there is data for, by the name of its file."""
    results = statistics.results
    figures: dict[str, Any] = {}
    if results.curve:
        figures["quality_against_k"] = quality_against_k(statistics)
    if "hybrid" in results.rankings:
        figures["confusion"] = confusion(statistics, "hybrid")
    if any(info.relative_speed is not None for info in results.methods.values()):
        figures["quality_against_cost"] = quality_against_cost(statistics)
    if results.similarity is not None:
        figures["similarity"] = similarity(statistics)
    return {name: to_svg(figure) for name, figure in figures.items()}


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element, the same for the same figure."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "loraretriever", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight", facecolor="white")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figure(width: float, height: float) -> Figure:
    with require_extra("evaluate"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height))


def quality_against_k(statistics: Statistics) -> Figure:
    """Mixture and fusion with uniform weights."""
    figure = _figure(6.4, 3.8)
    axes = figure.subplots()
    for strategy, (colour, marker) in _STRATEGY.items():
        for setting, (line, name) in _SETTING.items():
            points = sorted(
                (point.k, point.mean)
                for point in statistics.results.curve
                if (point.strategy, point.setting) == (strategy, setting)
            )
            if points:
                axes.plot(*zip(*points, strict=True), line, color=colour, marker=marker, label=f"{strategy}, {name}")
    axes.set_xlabel("adapters per prompt (k)")
    axes.set_ylabel("mean score")
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({point.k for point in statistics.results.curve}))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    return figure


def confusion(statistics: Statistics, retriever: str) -> Figure:
    """Which adapter is found first for the prompts of each task."""
    columns, matrix = statistics.confusion(retriever)
    return _heat_maps([("", list(columns), list(statistics.tasks), matrix)], "adapter found first", "task")


def similarity(statistics: Statistics) -> Figure:
    """Adapters among each other: by their samples, and by their weights."""
    found = statistics.results.similarity
    assert found is not None
    names = list(found.adapters)
    if len(names) > 40:
        names = [""] * len(names)
    return _heat_maps(
        [
            ("samples (cosine of mean embeddings)", names, names, found.samples),
            ("weights (cosine of updates)", names, names, found.weights),
        ]
    )


def _heat_maps(maps: list[tuple[str, list[str], list[str], Any]], x_label: str = "", y_label: str = "") -> Figure:
    size = max(2.5, 0.24 * len(maps[0][2])) + 1.6
    figure = _figure((size + 0.8) * len(maps), size)
    for place, (title, columns, rows, matrix) in enumerate(maps, 1):
        axes = figure.add_subplot(1, len(maps), place)
        low = min(0.0, float(np.min(matrix)))
        image = axes.imshow(matrix, cmap="viridis", vmin=low, vmax=1.0, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
        axes.set_yticks(range(len(rows)), rows if place == 1 else [""] * len(rows), fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    return figure


def quality_against_cost(statistics: Statistics) -> Figure:
    """IID and OOD means against the speed relative to the base model's, one labelled point for each method."""
    figure = _figure(11, 6.2)
    for place, (setting, name) in enumerate((("iid", "IID"), ("ood", "OOD")), 1):
        axes = figure.add_subplot(1, 2, place)
        points = []
        for method, info in statistics.results.methods.items():
            estimate = statistics.estimate(method, setting)
            is_shown = setting == "iid" or method != "oracle"  # which knows the own adapter
            if is_shown and info.relative_speed is not None and estimate is not None:
                points.append((info.relative_speed, estimate.mean, info.title, COLOURS[info.group]))
        axes.scatter([x for x, *_ in points], [y for _, y, *_ in points], c=[c for *_, c in points], s=22, zorder=3)
        _label(axes, points)
        axes.set_xlabel("speed relative to the base model")
        axes.set_ylabel(f"mean score, {name}")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def _label(axes: Any, points: list[tuple[float, float, str, str]]) -> None:
    """Labels at the right edge in the order of the scores, far enough from each other, with lines to their points."""
    if not points:
        return
    low, high = min(y for _, y, *_ in points), max(y for _, y, *_ in points)
    span = max(high - low, 1.0)
    step = span * 1.15 / max(len(points), 12)
    ordered = sorted(points, key=lambda point: -point[1])
    places: list[float] = []
    for _, y, *_ in ordered:
        places.append(min(y, places[-1] - step) if places else y + span * 0.05)
    right = max(x for x, *_ in points) * 1.06
    for (x, y, title, colour), at in zip(ordered, places, strict=True):
        line = {"arrowstyle": "-", "color": colour, "alpha": 0.35, "linewidth": 0.6, "relpos": (0, 0.5)}
        axes.annotate(title, (x, y), (right, at), fontsize=6.5, color=colour, va="center", arrowprops=line)
    axes.set_xlim(0, right * 1.5)
    axes.set_ylim(min(places[-1], low) - step, max(places[0], high) + step)
