"""What `loraretriever plan` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraretriever import console

if TYPE_CHECKING:
    from loraretriever.evaluate.plan.figures import Figures, Times
    from loraretriever.evaluate.plan.fleet import Deployment
    from loraretriever.evaluate.plan.report import Memory, PlanReport


def print_plan(report: PlanReport) -> None:
    """The deployment, beside the recommended one if there is one."""
    columns = [_column(report.deployment, report.figures, report.memory)]
    found = report.recommended
    if found is not None and report.recommended_memory is not None:
        columns.append(_column(found.deployment, found.figures, report.recommended_memory))
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    console.print_rows(("", "as asked", "recommended")[: 1 + len(columns)], rows)
    console.out.print()
    console.print_plain(
        f"{report.rate:.4g} requests/s, {report.figures.requests} counted, {report.adapters} different adapters, "
        f"{report.deployment.strategy}, {report.deployment.policy} routing"
    )
    if report.target_p95 is not None and found is None:
        console.print_plain(
            f"no number of replicas answers 95 % of the requests in {report.target_p95:g} s: allow more time, ask for "
            "shorter answers, or use a faster machine"
        )
    console.print_note("simulated; memory is of one replica, without activations; hits: of the adapters of requests")
    console.print_note("that began, in slots; of the others, in host memory. Times from a request's arrival, in s")


def _column(deployment: Deployment, figures: Figures, memory: Memory) -> dict[str, str]:
    sizes = deployment.sizes
    return {
        "replicas": str(deployment.replicas),
        "slots": str(sizes.slots),
        "host memory": f"{sizes.host} adapters, {memory.host:.0f} MiB",
        "device memory": f"{memory.device:.0f} MiB ({memory.weights:.0f} weights, {memory.slots:.0f} slots, "
        f"{memory.cache:.0f} keys and values)",
        "answered, refused": f"{figures.requests - figures.refused}, {figures.refused}",
        "throughput": f"{figures.requests_per_second:.3g} requests/s, {figures.tokens_per_second:.3g} tokens/s",
        "wait mean p50 p95 p99": _times(figures.queue_seconds),
        "first token": _times(figures.first_token_seconds),
        "whole answer": _times(figures.seconds),
        "hits": f"slots {_share(figures.slot_hit_rate)}, host {_share(figures.host_hit_rate)}, "
        f"{figures.loads_per_second:.3g} loads/s from disk",
        "busy": f"{figures.busy:.0%}, {figures.rows:.1f} of {sizes.batch_size} sequences in a step, "
        f"{figures.preemptions} preempted{', overloaded' if figures.is_overloaded else ''}",
    }


def _times(times: Times | None) -> str:
    return "-" if times is None else " ".join(f"{x:.3g}" for x in (times.mean, times.p50, times.p95, times.p99))


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
