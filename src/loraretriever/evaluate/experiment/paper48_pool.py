"""A plain pool folder of the paper's adapters, from a local folder or from the Hugging Face hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraretriever.errors import AdmissionError, InvalidInputError, PoolError
from loraretriever.evaluate.experiment.paper48 import Preset
from loraretriever.pool.admission import admit, same_base
from loraretriever.pool.files import copy_adapter, file_errors, rename, write_file
from loraretriever.pool.hub import download_adapter
from loraretriever.pool.peft_config import CONFIG_FILE
from loraretriever.pool.samples import SAMPLES_FILE
from loraretriever.pool.weights import DEFAULT_MAX_BYTES, WEIGHTS_FILE

HUB = "hub"
RECORD = "training.json"  # what the adapter is for: the experiment reads task and domain from it
_UNFINISHED = ".unfinished-"
# For an adapter that is only there as a pickle, which this project never opens. `weights_only` runs no code of it.
CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; f = sys.argv[1]; "
    "t = torch.load(f + '/adapter_model.bin', map_location='cpu', weights_only=True); "
    "save_file({k: v.contiguous() for k, v in t.items()}, f + '/adapter_model.safetensors', {'format': 'pt'})"
)


def make_pool(
    preset: Preset,
    folder: Path,
    source: str | Path = HUB,
    *,
    revision: str | None = None,
    done: Callable[[], None] = lambda: None,
) -> Path:
    """A pool with the adapter of each task, named as the task, with its samples. Adapters already there are kept.

    Each adapter is put into its place whole: a call that was cut off is gone on with by the same call. Copies name the
    preset's base model, whatever path on its author's machine an adapter names.

    Args:
        preset: its tasks and samples.
        folder: the pool's; made where it is missing.
        source: "hub" for the authors' adapters; a folder that holds `llama2_7b_lora-<task>` or `<task>` for each task;
            or what the ids of other adapters on the hub begin with, such as "me/llama2_7b_lora-".
        revision: of the adapters on the hub.
        done: called after each adapter.

    Returns: the folder.

    Raises:
        InvalidInputError: the source lacks adapters, or the folder holds those of another source or base model.
        AdmissionError: an adapter cannot be used.
        PoolError: the hub does not give one, or a file cannot be written.
    """
    places = _places(preset, source)
    with file_errors(f"make a pool in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left)
        for task, place in places.items():
            if (folder / task).exists():
                _check_same(preset, folder / task, place)
            else:
                _add(preset, folder, task, place, revision)
            _write_samples(preset, folder / task, task)
            done()
    return folder


def _places(preset: Preset, source: str | Path) -> dict[str, str]:
    """Where the adapter of each task comes from: a folder, or a hub id."""
    local = Path(source).expanduser()
    if isinstance(source, str) and source == HUB:
        return {task: preset.adapter_id(task) for task in sorted(preset.samples)}
    if not local.is_dir():
        if isinstance(source, Path) or str(source).count("/") != 1:
            raise InvalidInputError(
                f"the adapters' source is {str(source)!r}; expected {HUB!r}, a folder with one PEFT folder per task, "
                "or what hub ids begin with, such as 'me/llama2_7b_lora-'."
            )
        return {task: f"{source}{task}" for task in sorted(preset.samples)}
    prefix = preset.adapters.rpartition("/")[2]
    found = {
        task: place
        for task in sorted(preset.samples)
        for place in (local / task, local / f"{prefix}{task}")
        if place.is_dir()
    }
    if missing := sorted(preset.samples.keys() - found.keys()):
        raise InvalidInputError(
            f"{local} lacks the adapters of {len(missing)} of {len(preset.samples)} tasks ({', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}); expected folders named {prefix}<task> or <task>."
        )
    return {task: str(place.resolve()) for task, place in found.items()}


def _add(preset: Preset, folder: Path, task: str, place: str, revision: str | None) -> None:
    staged = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        commit = _fetch(place, revision, staged)
        named = _name_base(preset, staged / CONFIG_FILE)
        admit(staged, preset.base_model, None)
        rows = preset.samples[task]
        record = {
            "task": task,
            "domain": rows[0].domain,
            "metric": rows[0].metric,
            "base_model": preset.base_model,
            "source": place,
            "commit": commit,
            "named_base_model": named,
        }
        write_file(staged / RECORD, json.dumps(record, indent=1) + "\n")
        staged.chmod(0o755)  # mkdtemp gives it to its owner only
        rename(staged, folder / task)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _fetch(place: str, revision: str | None, target: Path) -> str | None:
    """Copy an adapter's files; returns the commit of one from the hub."""
    try:
        if Path(place).is_absolute():
            copy_adapter(Path(place), target, DEFAULT_MAX_BYTES)
            return None
        found = download_adapter(place, revision, DEFAULT_MAX_BYTES)
        copy_adapter(found.folder, target, DEFAULT_MAX_BYTES)
    except AdmissionError as error:
        if not _lacks_weights(place, error):
            raise
        raise AdmissionError(
            f"{error} Where there is only adapter_model.bin, a pickle, convert a copy of it with: "
            f'python -c "{CONVERT}" FOLDER. Then give the folder of all adapters as the source.'
        ) from error
    except PoolError as error:
        raise PoolError(f"{error} Adapters that were downloaded are kept: the same command goes on.") from error
    return found.commit


def _lacks_weights(place: str, error: AdmissionError) -> bool:
    if Path(place).is_absolute():
        return not (Path(place) / WEIGHTS_FILE).exists()
    return f"{WEIGHTS_FILE} is missing" in str(error)


def _name_base(preset: Preset, file: Path) -> str:
    """Make a copy's configuration name the preset's base model; returns the name that was there."""
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    named = str(config.get("base_model_name_or_path") or "")
    if not same_base(named, preset.base_model):
        config["base_model_name_or_path"] = preset.base_model
        write_file(file, json.dumps(config, indent=1) + "\n")
    return named


def _check_same(preset: Preset, folder: Path, place: str) -> None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    found = record if isinstance(record, dict) else {}
    if (found.get("base_model"), found.get("source")) != (preset.base_model, place):
        raise InvalidInputError(
            f"{folder} is there already, from {found.get('source')!r} for {found.get('base_model')!r}; expected "
            f"{place!r} for {preset.base_model!r}. Name another folder for the pool, or delete this one."
        )


def _write_samples(preset: Preset, folder: Path, task: str) -> None:
    lines = [json.dumps({"inputs": each.inputs}, ensure_ascii=False) + "\n" for each in preset.samples[task]]
    file = folder / SAMPLES_FILE
    # A file that is right stays as it is: its time tells the pool whether to look at the adapter again.
    if not file.is_file() or file.read_text(encoding="utf-8") != "".join(lines):
        write_file(file, "".join(lines))
