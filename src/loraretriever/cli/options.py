"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraretriever.errors import InvalidInputError

PoolOption = Annotated[
    str,
    typer.Option(
        "--pool",
        envvar="LORARETRIEVER_POOL",
        help="The pool's folder, or the URL of its database.",
        metavar="DIR_OR_URL",
        show_envvar=True,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts.", show_default=False)]
InputOption = Annotated[
    Path | None,
    typer.Option("--input", help="JSONL file, a prompt in `inputs` per line; other fields pass through. `-`: stdin."),
]
KOption = Annotated[int | None, typer.Option("--k", help="Adapters per prompt at most.", show_default="3")]
ThresholdOption = Annotated[
    float | None,
    typer.Option(help="Where the adapters' fit is lower, the base model answers.", show_default="the retriever's"),
]
ExcludeOption = Annotated[list[str] | None, typer.Option(help="Adapter never to be found (repeatable).")]
OnlyOption = Annotated[list[str] | None, typer.Option(help="The only adapters that may be found (repeatable).")]
TagOption = Annotated[list[str] | None, typer.Option("--tag", help="Only adapters with this tag (repeatable: all).")]
TenantOption = Annotated[str | None, typer.Option(help="Only this tenant's adapters and those of none.")]
RetrieverOption = Annotated[
    str | None,
    typer.Option(help="hybrid, dense, sparse, sparse-centroid, dense+sparse or paper.", show_default="hybrid"),
]
EncoderOption = Annotated[
    str | None, typer.Option(help="Sentence encoder: a folder or a hub id.", show_default="the pool's")
]
BaseModelOption = Annotated[
    str | None, typer.Option(help="Base model: a folder or a hub id.", show_default="the pool's")
]
StrategyOption = Annotated[
    str | None,
    typer.Option(
        help="selection, mixture, fusion, a merge (ties, dare_linear, dare_ties, svd), a gate (arrow, spectral; "
        "ramole, moe: trained), or a plug-in's.",
        show_default="mixture",
    ),
]
WeightingOption = Annotated[str | None, typer.Option(help="uniform, score, distance or effect.", show_default="score")]
DeviceOption = Annotated[str | None, typer.Option(help="Torch device.", show_default="cpu")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16 or auto (as stored).", show_default="auto")
]
EngineOption = Annotated[str | None, typer.Option(help="local, or vllm.", show_default="local")]
VllmUrlOption = Annotated[
    list[str] | None,
    typer.Option(help="vLLM server with our plug-in (repeatable).", show_default="vLLM in this process"),
]


def check_writable(option: str, file: Path) -> None:
    """Before minutes of work.

    Raises:
        InvalidInputError: the file that the option names cannot be written.
    """
    try:
        file.open("a").close()
    except OSError as error:
        raise InvalidInputError(f"{option} is {str(file)!r}: {error}; expected a file that can be written.") from error
