"""`loraretriever pool`: the adapters of a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraretriever import console
from loraretriever.cli.options import JsonOption, PoolOption

pool_app = typer.Typer(help="Manage the adapters of a pool.", no_args_is_help=True)


@pool_app.command("init")
def pool_init(
    pool: PoolOption,
    base_model: Annotated[
        str,
        typer.Option(envvar="LORARETRIEVER_BASE_MODEL", help="The base model of all adapters: a folder or a hub id."),
    ],
    as_json: JsonOption = False,
) -> None:
    """Make an empty pool for a base model."""
    from loraretriever.pool import Pool

    with Pool.create(pool, base_model=base_model) as created:
        if as_json:
            console.print_json({"pool": pool, "base_model": created.base_model})
        else:
            console.print_plain(f"created the pool {pool} for {created.base_model}")


@pool_app.command("add")
def pool_add(
    source: Annotated[str, typer.Argument(help="A PEFT folder, or a hub id (owner/name, or owner/name@revision).")],
    pool: PoolOption,
    name: Annotated[str | None, typer.Option(help="Name in the pool.", show_default="the folder's")] = None,
    samples: Annotated[Path | None, typer.Option(help="JSONL file with a prompt per line in `inputs`.")] = None,
    sample: Annotated[list[str] | None, typer.Option(help="A sample prompt (repeatable).")] = None,
    description: Annotated[str, typer.Option(help="What the adapter is for.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="Tag (repeatable).")] = None,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Accept an adapter that names another base model.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Add an adapter, or a new revision of one. Killed at any moment, the pool holds all of it or nothing."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        result = opened.add(
            source, name=name, samples=sample, samples_file=samples, description=description,
            tags=tag or (), allow_base_mismatch=allow_base_mismatch,
        )  # fmt: skip
    if as_json:
        console.print_json(result)
    else:
        adapter = result.adapter
        console.print_plain(f"{result.change}: {adapter.name} revision {adapter.revision}, {adapter.samples} samples")


@pool_app.command("list")
def pool_list(pool: PoolOption, as_json: JsonOption = False) -> None:
    """List the adapters."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        console.print_problems(opened.problems)
        adapters = opened.list()
    if as_json:
        for adapter in adapters:
            console.print_json(adapter)
        return
    console.print_rows(
        ("name", "revision", "enabled", "ranks", "samples", "tags", "description"),
        [
            (a.name, str(a.revision), "yes" if a.enabled else "no", ",".join(map(str, a.ranks)), str(a.samples),
             ",".join(a.tags), console.shorten(a.description, 60))
            for a in adapters
        ],
    )  # fmt: skip


@pool_app.command("show")
def pool_show(name: str, pool: PoolOption, as_json: JsonOption = False) -> None:
    """Show one adapter and its samples."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        adapter, samples = opened.get(name), opened.samples(name)
    if as_json:
        console.print_json({"adapter": adapter, "samples": samples})
        return
    console.print_fields(adapter)
    for sample in samples:
        console.print_plain(f"  [{sample.source}] {console.shorten(sample.text)}")


@pool_app.command("remove")
def pool_remove(name: str, pool: PoolOption, as_json: JsonOption = False) -> None:
    """Remove an adapter with all its revisions."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        opened.remove(name)
    _print_done(as_json, name, "removed")


@pool_app.command("enable")
def pool_enable(name: str, pool: PoolOption, as_json: JsonOption = False) -> None:
    """Let an adapter be found again."""
    _set_enabled(pool, name, True, as_json)


@pool_app.command("disable")
def pool_disable(name: str, pool: PoolOption, as_json: JsonOption = False) -> None:
    """Keep an adapter in the pool, but let nothing find or use it."""
    _set_enabled(pool, name, False, as_json)


@pool_app.command("verify")
def pool_verify(pool: PoolOption, as_json: JsonOption = False) -> None:
    """Check every adapter's files, digests and samples. Exits with 1 if something is wrong."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        problems = opened.verify()
        count = len(opened.list())
    if as_json:
        console.print_json({"adapters": count, "problems": problems})
    else:
        for problem in problems:
            console.print_error(problem)
        console.print_plain(f"{count} adapters, {len(problems)} problems")
    if problems:
        raise typer.Exit(1)


def _set_enabled(pool: str, name: str, enabled: bool, as_json: bool) -> None:
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        opened.set_enabled(name, enabled)
    _print_done(as_json, name, "enabled" if enabled else "disabled")


def _print_done(as_json: bool, name: str, change: str) -> None:
    if as_json:
        console.print_json({"adapter": name, "change": change})
    else:
        console.print_plain(f"{change}: {name}")
