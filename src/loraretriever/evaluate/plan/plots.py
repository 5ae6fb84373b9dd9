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
        for is_overload in (False, True):
            points = [
                (point.value, getattr(point.figures.seconds, name))
                for point in report.by_rate
                if point.figures.seconds is not None and point.figures.is_overloaded == is_overload
            ]
            if points:
                fill = "white" if is_overload else colour
                line, label = ("", None) if is_overload else ("-", name)
                axes.plot(*zip(*points, strict=True), line, color=colour, marker="o", mfc=fill, ms=4, label=label)
    if any(point.figures.is_overloaded for point in report.by_rate):
        axes.plot([], [], "o", color="#000000", mfc="white", ms=4, label="overloaded: grows as long as it lasts")
    if report.target_p95 is not None:
        axes.axhline(report.target_p95, color="#000000", linestyle=":", linewidth=1, label="target")
    axes.axvline(report.rate, color="#999999", linestyle="--", linewidth=1, label="asked for")
    axes.set_yscale("log")
    for each in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        each(lambda value, _: f"{value:g}")
    axes.set(xlabel="requests a second", ylabel="seconds for a whole answer")
    count = report.deployment.replicas
    axes.set_title(f"{count} replica{'s' if count > 1 else ''} with {report.deployment.sizes.slots} slots", fontsize=10)
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(frameon=False, fontsize=9)


def _draw_slots(axes: Any, points: Sequence[Point], asked: int) -> None:
    found = [(p.value, p.figures.slot_hit_rate, p.figures.host_hit_rate or 0.0) for p in points]
    known = [(slots, 100 * hit, 100 * (hit + (1 - hit) * host)) for slots, hit, host in found if hit is not None]
    if known:
        slots, hits, held = zip(*known, strict=True)
        axes.plot(slots, hits, color="#0072b2", marker="o", ms=4, label="in a slot")
        axes.plot(slots, held, color="#d55e00", marker="o", ms=4, label="in a slot or in host memory")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(asked, color="#999999", linestyle="--", linewidth=1, label="asked for")
    axes.set(xlabel="slots of a replica", ylabel="% of the adapters of requests that begin", ylim=(0, 102))
    axes.set_title("where adapters are found", fontsize=10)
    axes.grid(visible=True, linewidth=0.3)
    axes.legend(frameon=False, fontsize=9)
