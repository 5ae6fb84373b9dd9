"""Draws how many off-topic prompts go to the base model, against how many others do by mistake.

Reads what `loraretriever bench retrieval --json` printed, one file or several. Needs matplotlib, which nothing else
here does: pip install matplotlib

    python benchmarks/plot_fallback.py bench.json --output fallback.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

KINDS = {"leave_adapters_out": "adapters left out", "leave_domains_out": "domains left out"}
STYLES = {"calibration": "-", "paper_calibration": "--"}


def read_reports(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Reports by file name."""
    reports = {}
    for path in paths:
        try:
            reports[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            sys.exit(f"cannot read {path}: {error}; expected the output of `loraretriever bench retrieval --json`.")
    return reports


def curves(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """By calibration and kind of leaving out: what was found."""
    return {
        (method, kind): report[method][kind]
        for method in STYLES
        for kind in KINDS
        if report.get(method) and report[method].get(kind)
    }


def draw(reports: dict[str, dict[str, Any]], output: Path, is_log: bool) -> None:
    """Write the figure; the file name's ending says in what format."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("this needs matplotlib, which is not installed; install it with: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 6), layout="constrained")
    colours = iter(pyplot.get_cmap("tab10").colors * 10)
    for stem, report in reports.items():
        names = {"calibration": report["default"], "paper_calibration": report["paper"]}
        kinds = {kind: next(colours) for kind in KINDS}
        for (method, kind), found in curves(report).items():
            # On a logarithmic axis there is no place for 0.
            points = [(100 * x, 100 * y) for x, y in found["curve"] if x > 0 or not is_log]
            label = f"{names[method]}, {KINDS[kind]} (AUROC {found['auroc']:.3f})"
            label = f"{stem.removeprefix('retrieval-')}: {label}" if len(reports) > 1 else label
            axes.plot(*zip(*points, strict=True), STYLES[method], color=kinds[kind], label=label, linewidth=1.8)
            place = 100 * found["default_false_fallback"], 100 * found["default_off_topic_to_base"]
            if method == "calibration" and place[0] <= 20 and (place[0] > 0 or not is_log):
                axes.plot(*place, "o", color=kinds[kind], markersize=7, clip_on=False)
    if not axes.lines:
        sys.exit("no report has a curve; expected reports of the methods hybrid or paper with four adapters or more.")
    if is_log:
        axes.set_xscale("log")
        ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlim(0.1 if is_log else 0, 20)
    axes.set_ylim(0, 100)
    axes.set_xlabel("prompts that have an adapter, sent to the base model by mistake (%)")
    axes.set_ylabel("off-topic prompts sent to the base model (%)")
    axes.grid(alpha=0.3)
    axes.plot([0.1, 20], [0.1, 20], ":", color="grey", label="chance")
    axes.plot([], [], "o", color="grey", label="at the default threshold")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(output, dpi=160)
    print(f"wrote {output}")


def main() -> None:
    """Read the options and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--output", type=Path, required=True, help="PNG, SVG or PDF file to write")
    parser.add_argument("--log", action="store_true", help="logarithmic horizontal axis")
    args = parser.parse_args()
    draw(read_reports(args.reports), args.output, args.log)


if __name__ == "__main__":
    main()
