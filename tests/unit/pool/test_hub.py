from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from loraretriever.errors import AdmissionError, InvalidInputError, PoolError
from loraretriever.pool import AddChange, Pool
from tiny import write_peft_folder

FILES = {"adapter_config.json": 300, "adapter_model.safetensors": 5000, "README.md": 10, "optimizer.pt": 10**12}


class Hub:
    """Stands in for the hub: knows one repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = dict(FILES)
        self.asked: list[Any] = []

    def model_info(self, repo: str, *, revision: str | None, files_metadata: bool) -> Any:
        self.asked.append((repo, revision))
        if repo != "owner/sql-lora":
            raise ConnectionError("no such repository")
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in self.files.items()]
        return SimpleNamespace(sha="c0ffee", siblings=siblings if files_metadata else None)

    def snapshot_download(self, repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        self.asked.append((repo, revision, sorted(allow_patterns)))
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(write_peft_folder(tmp_path / "c0ffee", card="Writes SQL queries."))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.mark.parametrize(
    ("source", "revision", "asked"),
    [("owner/sql-lora", None, None), ("owner/sql-lora@v1", None, "v1"), ("owner/sql-lora", "refs/pr/1", "refs/pr/1")],
)
def test_an_adapter_from_the_hub(pool: Pool, hub: Hub, source: str, revision: str | None, asked: str | None) -> None:
    result = pool.add(source, revision=revision)
    assert result.change is AddChange.ADDED
    assert (result.adapter.name, result.adapter.source) == ("sql-lora", "owner/sql-lora@c0ffee")
    assert result.adapter.description == "Writes SQL queries."
    wanted = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert hub.asked == [("owner/sql-lora", asked), ("owner/sql-lora", "c0ffee", wanted)]


def test_what_cannot_be_used_is_not_downloaded(pool: Pool, hub: Hub) -> None:
    with pytest.raises(AdmissionError, match="expected at most 100"):
        pool.add("owner/sql-lora", max_bytes=100)
    del hub.files["adapter_model.safetensors"]
    with pytest.raises(AdmissionError, match=r"adapter_model\.safetensors is missing"):
        pool.add("owner/sql-lora")
    assert hub.asked == [("owner/sql-lora", None)] * 2


def test_errors_of_the_hub(pool: Pool, hub: Hub) -> None:
    with pytest.raises(PoolError, match="cannot get 'owner/none' from the Hugging Face hub: no such repository"):
        pool.add("owner/none")
    with pytest.raises(InvalidInputError, match="two revisions"):
        pool.add("owner/sql-lora@v1", revision="v2")


@pytest.mark.parametrize("source", ["nowhere", "/no/such/folder", "a/b/c", "../a", "https://host/a"])
def test_sources_that_are_neither_folder_nor_hub_id(pool: Pool, source: str) -> None:
    with pytest.raises(InvalidInputError, match="neither a folder nor a hub id"):
        pool.add(source)
