"""Training of the retriever: a sentence encoder learns which samples belong to one adapter (arXiv 2402.09997, 3.2).

`train_retriever` can be killed at any moment; called again in the same way it goes on from the last epoch's end.
What is unfinished lies in `OUTPUT.part`; the finished folder takes its place by renaming.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraretriever.config import DEFAULT_ENCODER, PAPER_INSTRUCTION
from loraretriever.errors import InvalidInputError
from loraretriever.jsonl import read_jsonl
from loraretriever.train.pairs import Split, owners_of, plan_epochs, split_samples
from loraretriever.train.trained import (
    Epoch,
    TrainedRetriever,
    best_epoch,
    epoch_of,
    parse_log,
    read_record,
    read_trained,
    write_record,
)
from loraretriever.train.unfinished import last_checkpoint, read_log, unfinished_folder

_CANDIDATES = 4  # hard negatives are drawn from the nearest `_CANDIDATES * hard_negatives` texts of other tasks


@dataclass(frozen=True, slots=True)
class RetrieverTraining:
    """How a retriever is trained.

    `task_share`: the share of the tasks that is trained on, the others being held out; `held_out_tasks` names those
    instead. `validation_share`: of each trained task's samples. `temperature` is the γ of the paper. `hard_negatives`:
    for each anchor, drawn anew each epoch from the nearest texts of other tasks, which the encoder tells once, before
    it is trained. `max_tokens`: what the encoder reads of a text, in training and afterwards; None: as before.
    `dtype`: of the products in training; bfloat16 is faster on processors that have it. The weights stay float32.
    `patience`: training stops when so many epochs were no better than the best before them.
    """

    encoder: str = DEFAULT_ENCODER
    instruction: str = PAPER_INSTRUCTION
    task_share: float = 0.4
    held_out_tasks: tuple[str, ...] | None = None
    validation_share: float = 0.2
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-4
    temperature: float = 0.05
    hard_negatives: int = 1
    max_tokens: int | None = None
    patience: int = 3
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


def read_task_samples(file: Path) -> dict[str, list[str]]:
    """Samples by adapter, from a JSONL file with `adapter` and `inputs` in each line.

    Raises:
        InvalidInputError: the file cannot be read, or a line lacks one of both.
    """
    samples: dict[str, list[str]] = {}
    for number, row in read_jsonl(file):
        for field in ("adapter", "inputs"):
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise InvalidInputError(f"{file}:{number}: {field} is {row.get(field)!r:.80}; expected some text.")
        samples.setdefault(row["adapter"], []).append(row["inputs"])
    return samples


def train_retriever(
    samples: Mapping[str, Sequence[str]],
    output: str | Path,
    config: RetrieverTraining | None = None,
    advance: Callable[[int, int], None] = lambda step, steps: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    restart: bool = False,
) -> TrainedRetriever:
    """Fine-tune an encoder so that an adapter's samples lie together, and write it to the folder `output`.

    Args:
        samples: each adapter's sample prompts.
        output: a folder that does not exist yet; becomes one that sentence-transformers loads.
        config: how to train.
        advance: called with the steps done and the steps in all.
        on_epoch: called with the figures before the training and after each epoch that this call trains.
        restart: throw away what an unfinished training left.

    Raises:
        InvalidInputError: settings or samples cannot be used, the output exists, or an unfinished training there
            had other settings or samples.
        ModelLoadError: the encoder cannot be loaded.
        MissingExtraError: the extra `train` is not installed.
    """
    config = config or RetrieverTraining()
    _check_config(config)
    texts = _checked_samples(samples)
    _check_held_out(config.held_out_tasks, texts)
    split = split_samples(texts, config.task_share, config.held_out_tasks, config.validation_share, config.seed)
    output = Path(os.path.abspath(Path(output).expanduser()))
    part = output.with_name(output.name + ".part")
    start = {**_settings(config), "samples_sha256": _digest(texts)}
    if _is_finished(output, part, start):
        return read_trained(output)

    from loraretriever.train import contrastive

    model = contrastive.load_model(config.encoder, config.device, config.instruction, config.max_tokens)
    start["encoder_sha256"] = contrastive.fingerprint(model)
    with unfinished_folder(part, start, restart):
        before = _train(model, texts, split, part, config, advance, on_epoch)
        _assemble(part, split, before, config, start)
        os.rename(part / "model", output)
        shutil.rmtree(part, ignore_errors=True)
    return read_trained(output)


def _train(
    model: Any,
    texts: dict[str, tuple[str, ...]],
    split: Split,
    part: Path,
    config: RetrieverTraining,
    advance: Callable[[int, int], None],
    on_epoch: Callable[[Epoch], None],
) -> Epoch:
    """Train from the last checkpoint in `part`, or from the beginning, to the end; returns the figures before it."""
    from loraretriever.train import contrastive

    validation = contrastive.Validation(texts, split.validation, split.held_out)
    vectors = contrastive.encode(model, validation.texts, config.instruction)
    before = epoch_of(0, None, {**validation.figures(vectors), "seconds": 0.0})
    owners = owners_of(texts)
    near: dict[str, list[str]] = {}
    if config.hard_negatives:
        place = {text: position for position, text in enumerate(validation.texts)}
        seen = sorted(owners_of(split.training))
        rows = [place[text] for text in seen]
        near = contrastive.mine_near(seen, vectors[rows], owners, _CANDIDATES * config.hard_negatives)
    plan = plan_epochs(
        split.training, owners, near, config.hard_negatives, config.batch_size, config.epochs, config.seed
    )
    last = last_checkpoint(part)
    done = parse_log(read_log(last)) if last else []
    if not done:
        on_epoch(before)
    if _is_over(done, config):
        return before

    def after_epoch(log: Sequence[Mapping[str, Any]]) -> bool:
        epochs = parse_log(log)
        on_epoch(epochs[-1])
        return _is_over(epochs, config)

    contrastive.run_training(
        model,
        plan,
        validation,
        part,
        instruction=config.instruction,
        temperature=config.temperature,
        learning_rate=config.learning_rate,
        dtype=config.dtype,
        seed=config.seed,
        seconds=done[-1].seconds if done else 0.0,
        resume_from=last,
        on_step=advance,
        on_epoch=after_epoch,
    )
    return before


def _is_over(epochs: Sequence[Epoch], config: RetrieverTraining) -> bool:
    if not epochs:
        return False
    last = epochs[-1].epoch
    return last >= config.epochs or last - best_epoch(epochs).epoch >= config.patience


def _assemble(part: Path, split: Split, before: Epoch, config: RetrieverTraining, start: dict[str, Any]) -> None:
    """Write the best checkpoint's model with its record and its card to `part / "model"`."""
    from loraretriever.train.contrastive import save_model

    last = last_checkpoint(part)
    assert last is not None
    epochs = parse_log(read_log(last))
    steps = int(last.name.rsplit("-", 1)[1]) // epochs[-1].epoch
    save_model(part / f"checkpoint-{best_epoch(epochs).epoch * steps}", part / "model")
    hashes = {name: start[name] for name in ("encoder_sha256", "samples_sha256")}
    write_record(part / "model", asdict(config), hashes, split, before, epochs)


def _settings(config: RetrieverTraining) -> dict[str, Any]:
    """What must be the same for a training to go on; the device need not."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    del settings["device"]
    return settings


def _digest(texts: Mapping[str, Sequence[str]]) -> str:
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


def _is_finished(output: Path, part: Path, start: Mapping[str, Any]) -> bool:
    """Whether this very training is finished, but was killed before it could clear up.

    Raises:
        InvalidInputError: the output exists for another reason.
    """
    if not (output.exists() or output.is_symlink()):
        return False
    record = read_record(output) if part.is_dir() else None
    if record is None or {**record["settings"], "samples_sha256": record["samples_sha256"]} != {
        **start, "device": record["settings"]["device"]
    }:  # fmt: skip
        raise InvalidInputError(f"{output} exists; expected a new folder. Choose another, or move that one.")
    shutil.rmtree(part, ignore_errors=True)
    return True


def _check_config(config: RetrieverTraining) -> None:
    def check(name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise InvalidInputError(f"{name} is {getattr(config, name)!r}; expected {expected}.")

    share, rate, gamma = config.task_share, config.learning_rate, config.temperature
    check("task_share", 0 < share <= 1, "a number above 0 and at most 1, the share of the tasks to train on")
    check("validation_share", 0 < config.validation_share < 1, "a number between 0 and 1")
    check("learning_rate", 0 < rate < math.inf, "a positive number, such as 5e-5")
    check("temperature", 0 < gamma < math.inf, "a positive number, such as 0.05")
    check("epochs", config.epochs >= 1, "at least 1")
    check("batch_size", config.batch_size >= 2, "at least 2")
    check("hard_negatives", config.hard_negatives >= 0, "0 or more")
    check("patience", config.patience >= 1, "at least 1")
    check("seed", 0 <= config.seed < 2**32, "a whole number from 0 to 4294967295")
    check("dtype", config.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
    check("device", config.device in ("cpu", "cuda", "mps"), "cpu, cuda or mps (CUDA_VISIBLE_DEVICES chooses the card)")


def _checked_samples(samples: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The samples by name in order, each text once."""
    if len(samples) < 2:
        raise InvalidInputError(
            f"there are samples of {len(samples)} adapters; expected at least two, which the training tells apart."
        )
    texts = {}
    for name in sorted(samples):
        for position, text in enumerate(samples[name], 1):
            if not isinstance(text, str) or not text.strip():
                raise InvalidInputError(f"sample {position} of {name!r} is {text!r}; expected some text.")
        texts[name] = tuple(dict.fromkeys(samples[name]))
        if len(texts[name]) < 2:
            raise InvalidInputError(
                f"{name!r} has {len(texts[name])} different samples; expected at least two (20 are good). "
                f"Give it more, or leave it out: `loraretriever pool disable {name}`."
            )
    return texts


def _check_held_out(names: Sequence[str] | None, texts: Mapping[str, Sequence[str]]) -> None:
    for name in names or ():
        if name not in texts:
            raise InvalidInputError(f"the held-out task {name!r} has no samples; expected one of {', '.join(texts)}.")
