"""The figure of `loraretriever plan`: latency against the rate of arrivals, hit rates against slots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraretriever.errors import require_extra
from loraretriever.evaluate.plan.recommend import Point
from loraretriever.evaluate.plan.report import PlanReport

# Okabe and Ito's colours, which the colour-blind can tell apart.
_LINES = (("p50", "#0072b2"), ("p95", "#d55e00"), ("p99", "#009e73"))
_HITS = (("slot_hit_rate", "in a slot", "#0072b2"), ("host_hit_rate", "of the others, in host memory", "#d55e00"))


def draw_plan(report: PlanReport, path: Path) -> None:
    """Write the figure in the format that the file's name ends with.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with require_extra("evaluate"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    rates, slots = figure.subplots(1, 2)
    _draw_rates(rates, report)
    _draw_slots(slots, report.by_slots, report.deployment.sizes.slots)
    figure.savefig(path, dpi=150, facecolor="white")


def _draw_rates(axes: Any, report: PlanReport) -> None:
    for name, colour in _LINES:
        points = [(p.value, getattr(p.figures.seconds, name)) for p in report.by_rate if p.figures.seconds is not None]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=name)
    if report.target_p95 is not None:
        axes.axhline(report.target_p95, color="#000000", linestyle=":", linewidth=1)
        axes.annotate("target", (axes.get_xlim()[0], report.target_p95), xytext=(3, 3), textcoords="offset points")
    axes.axvline(report.rate, color="#999999", linestyle="--", linewidth=1, label="asked for")
    axes.set_yscale("log")
    axes.set(xlabel="requests a second", ylabel="seconds for a whole answer")
    count = report.deployment.replicas
    axes.set_title(f"{count} replica{'s' if count > 1 else ''} with {report.deployment.sizes.slots} slots", fontsize=10)
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(frameon=False)


def _draw_slots(axes: Any, points: Sequence[Point], asked: int) -> None:
    for name, label, colour in _HITS:
        known = [(p.value, 100 * getattr(p.figures, name)) for p in points if getattr(p.figures, name) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, marker="o", markersize=4, label=label)
    axes.axvline(asked, color="#999999", linestyle="--", linewidth=1, label="asked for")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="slots of a replica", ylabel="% of adapters found", ylim=(0, 102))
    axes.set_title("hit rates", fontsize=10)
    axes.grid(visible=True, linewidth=0.3)
    axes.legend(frameon=False)
