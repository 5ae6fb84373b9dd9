"""`loraretriever feedback`: what users say of routes, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from loraretriever import console
from loraretriever.cli.options import JsonOption, PoolOption
from loraretriever.errors import InvalidInputError

if TYPE_CHECKING:
    from loraretriever.pool import Pool
    from loraretriever.types import Feedback

feedback_app = typer.Typer(help="Teach a pool which adapters are right and wrong for a prompt.", no_args_is_help=True)
IdsArgument = Annotated[
    list[int] | None,
    typer.Argument(metavar="ID", help="As `feedback list` shows them.", show_default=False),
]
AllOption = Annotated[bool, typer.Option("--all", help="All that is pending.")]


@feedback_app.command("give")
def feedback_give(
    prompt: str,
    pool: PoolOption,
    right: Annotated[str | None, typer.Option(help="The adapter that is right for it.")] = None,
    wrong: Annotated[str | None, typer.Option(help="An adapter that is wrong for it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say which adapter is right for a prompt, and which is wrong. It has no effect until approved."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        _print([opened.give_feedback(prompt, right, wrong)], as_json)


@feedback_app.command("list")
def feedback_list(
    pool: PoolOption,
    state: Annotated[str, typer.Option(help="pending, approved, rejected or all.")] = "pending",
    as_json: JsonOption = False,
) -> None:
    """List feedback, oldest first."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        _print(opened.feedback(None if state == "all" else state), as_json)


@feedback_app.command("approve")
def feedback_approve(
    pool: PoolOption, ids: IdsArgument = None, take_all: AllOption = False, as_json: JsonOption = False
) -> None:
    """Make prompts samples of the right adapters and counter samples of the wrong ones."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        _print(opened.approve_feedback(_chosen(opened, ids, take_all)), as_json)


@feedback_app.command("reject")
def feedback_reject(
    pool: PoolOption, ids: IdsArgument = None, take_all: AllOption = False, as_json: JsonOption = False
) -> None:
    """Put feedback aside."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        _print(opened.reject_feedback(_chosen(opened, ids, take_all)), as_json)


def _chosen(pool: Pool, ids: list[int] | None, take_all: bool) -> list[int]:
    if bool(ids) == take_all:
        found = "ids and --all are both given" if take_all else "no feedback is named"
        raise InvalidInputError(f"{found}; expected ids, as `loraretriever feedback list` shows them, or --all.")
    return [each.id for each in pool.feedback()] if take_all else list(ids or ())


def _print(feedback: Sequence[Feedback], as_json: bool) -> None:
    if as_json:
        for each in feedback:
            console.print_json(each)
        return
    console.print_rows(
        ("id", "state", "right", "wrong", "prompt"),
        [(str(f.id), f.state, f.right or "-", f.wrong or "-", console.shorten(f.prompt)) for f in feedback],
    )
