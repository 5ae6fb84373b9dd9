"""Adapters from the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraretriever.errors import AdmissionError, InvalidInputError, PoolError
from loraretriever.pool.peft_config import CONFIG_FILE
from loraretriever.pool.weights import CARD_FILE, WEIGHTS_FILE, check_size

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubAdapter:
    """An adapter downloaded from the hub, at one commit."""

    repo: str
    commit: str
    folder: Path


def download_adapter(source: str, revision: str | None, max_bytes: int, *, anonymous: bool = False) -> HubAdapter:
    """Download an adapter's configuration, weights and model card to the hub's cache.

    The commit is the one that `owner/name[@revision]` is at now. `anonymous`: public repositories only, whatever
    this machine's token may read.

    Raises:
        InvalidInputError: the source is neither a folder nor a hub id.
        AdmissionError: the repository holds no safetensors adapter, or too large a one.
        PoolError: the hub cannot be reached, or does not give the repository.
    """
    match = HUB_ID.fullmatch(source)
    if match is None:
        raise InvalidInputError(
            f"{source!r} is neither a folder nor a hub id; expected a PEFT folder or owner/name[@revision]."
        )
    if revision and match["revision"]:
        raise InvalidInputError(f"{source!r} and revision={revision!r} name two revisions; expected one.")
    repo, wanted = match["repo"], revision or match["revision"]
    from huggingface_hub import HfApi, snapshot_download

    try:
        access: dict[str, Any] = {"token": False} if anonymous else {}
        info = HfApi(**access).model_info(repo, revision=wanted, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        commit = str(info.sha)
        _check_files(repo, sizes, max_bytes)
        files = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
        folder = snapshot_download(repo, revision=commit, allow_patterns=files, **access)
    except AdmissionError:
        raise
    except Exception as error:  # the hub's errors share no base but this one; their HTTP library has changed before
        raise PoolError(
            f"cannot get {source!r} from the Hugging Face hub: {error}. Expected a local folder, or a repository that "
            "exists and that you may read (see: hf auth login)."
        ) from error
    return HubAdapter(repo, commit, Path(folder))


def locate(source: str | Path, revision: str | None, max_bytes: int) -> tuple[Path, str, str]:
    """An adapter's folder on this machine, what to record as its source, and its own name.

    Raises: as `download_adapter`, where the source is no folder.
    """
    try:
        folder = Path(source).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise InvalidInputError(f"{str(source)!r:.200} cannot be an adapter's folder: {error}.") from error
    if is_folder:
        folder = folder.resolve()
        return folder, str(folder), folder.name
    found = download_adapter(str(source), revision, max_bytes)
    return found.folder, f"{found.repo}@{found.commit}", found.repo.rpartition("/")[2]


def _check_files(repo: str, sizes: dict[str, int], max_bytes: int) -> None:
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if file not in sizes:
            raise AdmissionError(
                f"{repo}: {file} is missing; expected a PEFT adapter saved as safetensors at the top of the repository."
            )
    check_size(sizes[WEIGHTS_FILE], max_bytes, f"{repo}/{WEIGHTS_FILE}")
