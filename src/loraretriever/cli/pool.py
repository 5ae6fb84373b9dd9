"""`loraretriever pool`: the adapters of a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraretriever import console
from loraretriever.cli.options import InputOption, JsonOption, PoolOption
from loraretriever.cli.prompts import read_prompts
from loraretriever.errors import InvalidInputError

pool_app = typer.Typer(help="Manage the adapters of a pool.", no_args_is_help=True)
samples_app = typer.Typer(help="Manage the sample prompts of an adapter.", no_args_is_help=True)
pool_app.add_typer(samples_app, name="samples")


@pool_app.command("init")
def pool_init(
    pool: PoolOption,
    base_model: Annotated[
        str,
        typer.Option(envvar="LORARETRIEVER_BASE_MODEL", help="The base model of all adapters: a folder or a hub id."),
    ],
    storage: Annotated[
        str | None,
        typer.Option(
            help="Of a pool with a URL: where the adapters' files go, such as s3://BUCKET/PREFIX.", metavar="URL"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make an empty pool for a base model, in a folder or in a PostgreSQL database."""
    from loraretriever.pool import Pool, shown_location

    with Pool.create(pool, base_model=base_model, storage=storage) as created:
        if as_json:
            console.print_json({"pool": shown_location(pool), "base_model": created.base_model, "storage": storage})
        else:
            console.print_plain(f"created the pool {shown_location(pool)} for {created.base_model}")


@pool_app.command("add")
def pool_add(
    source: Annotated[str, typer.Argument(help="A PEFT folder, or a hub id (owner/name, or owner/name@revision).")],
    pool: PoolOption,
    name: Annotated[str | None, typer.Option(help="Name in the pool.", show_default="the folder's")] = None,
    samples: Annotated[Path | None, typer.Option(help="JSONL file with a prompt per line in `inputs`.")] = None,
    sample: Annotated[list[str] | None, typer.Option(help="A sample prompt (repeatable).")] = None,
    description: Annotated[str, typer.Option(help="What the adapter is for.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="Tag (repeatable).")] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Whom the adapter belongs to; '': nobody.", show_default="as it is")
    ] = None,
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
            tags=tag or (), tenant=tenant, allow_base_mismatch=allow_base_mismatch,
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
        adapter, samples, counter_samples = opened.get(name), opened.samples(name), opened.counter_samples(name)
    if as_json:
        console.print_json({"adapter": adapter, "samples": samples, "counter_samples": counter_samples})
        return
    console.print_fields(adapter)
    for sample in (*samples, *counter_samples):
        kind = f"not: {sample.source}" if sample.counter else sample.source
        console.print_plain(f"  [{kind}] {console.shorten(sample.text)}")


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


@pool_app.command("encoder")
def pool_encoder(
    pool: PoolOption,
    name: Annotated[str | None, typer.Argument(help="A folder or a hub id.", show_default=False)] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Choose none: the default is used.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show or choose the sentence encoder that the pool is read with."""
    from loraretriever.pool import Pool, shown_location

    if clear and name is not None:
        raise InvalidInputError(f"the encoder {name!r} and --clear are both given; expected one of them.")
    with Pool.open(pool) as opened:
        if clear or name is not None:
            opened.set_encoder(name)
        encoder = opened.encoder
    if as_json:
        console.print_json({"pool": shown_location(pool), "encoder": encoder})
    else:
        console.print_plain(encoder or "none chosen: the default is used")


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


@samples_app.command("list")
def samples_list(name: str, pool: PoolOption, as_json: JsonOption = False) -> None:
    """List an adapter's samples, and then its counter samples, with their numbers."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        samples = [*opened.samples(name), *opened.counter_samples(name)]
    if as_json:
        for number, sample in enumerate(samples, 1):
            console.print_json(
                {"number": number, "text": sample.text, "source": sample.source, "counter": sample.counter}
            )
        return
    console.print_rows(
        ("number", "kind", "source", "text"),
        [
            (str(number), "counter" if sample.counter else "sample", sample.source, console.shorten(sample.text))
            for number, sample in enumerate(samples, 1)
        ],
    )


@samples_app.command("add")
def samples_add(
    name: str,
    pool: PoolOption,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", show_default=False)] = None,
    input_file: InputOption = None,
    counter: Annotated[bool, typer.Option("--counter", help="Prompts that it must not be chosen for.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Add samples to an adapter. In a plain folder they go to its `samples.jsonl`."""
    from loraretriever.pool import Pool

    kinds: dict[bool, list[str]] = {}
    for row in read_prompts(texts, input_file):
        kinds.setdefault(counter or row.get("counter") is True, []).append(row["inputs"])
    with Pool.open(pool) as opened:
        added = [sample for kind, texts in kinds.items() for sample in opened.add_samples(name, texts, counter=kind)]
    if as_json:
        console.print_json({"adapter": name, "added": added})
    else:
        console.print_plain(f"{name}: {len(added)} samples added")


@samples_app.command("remove")
def samples_remove(
    name: str,
    numbers: Annotated[list[int], typer.Argument(metavar="NUMBER", help="As `pool samples list` shows them.")],
    pool: PoolOption,
    as_json: JsonOption = False,
) -> None:
    """Remove samples from an adapter."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        samples = [*opened.samples(name), *opened.counter_samples(name)]
        for number in numbers:
            if not 1 <= number <= len(samples):
                raise InvalidInputError(f"{name!r} has no sample {number}; expected a number from 1 to {len(samples)}.")
        opened.remove_samples(name, [number - 1 for number in numbers])
    removed = [samples[number - 1] for number in dict.fromkeys(numbers)]
    if as_json:
        console.print_json({"adapter": name, "removed": removed})
    else:
        console.print_plain(f"{name}: {len(removed)} samples removed")


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
