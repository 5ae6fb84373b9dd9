"""The preset `paper48`: the paper's own 48 tasks and adapters, on Llama-2-7b or 13b.

Set-up of Zhao et al., "LoraRetriever: Input-Aware LoRA Retrieval and Composition for Mixed Tasks in the Wild", Findings
of ACL 2024 (arXiv 2402.09997), section 4, and of the authors' evaluation script: Alpaca's template without an input,
greedy decoding, 50 new tokens, bfloat16, k = 3, up to 50 prompts of each task. The prompts are not in this package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.experiment.paper48_tables import TASKS, check_size
from loraretriever.evaluate.experiment.results import TestPrompt
from loraretriever.evaluate.tasks import METRICS, Example
from loraretriever.jsonl import read_jsonl
from loraretriever.types import Sampling

SAMPLES_PER_ADAPTER = 20
PROMPTS_PER_TASK = 50
DTYPE = "bfloat16"
K = 3
SAMPLING = Sampling(max_tokens=50)
BASE_MODELS = {"7b": "meta-llama/Llama-2-7b-hf", "13b": "meta-llama/Llama-2-13b-hf"}
ADAPTERS = {"7b": "Styxxxx/llama2_7b_lora-", "13b": "Styxxxx/llama2_13b_lora-"}
RESPONSE = "### Response:\n"
# Alpaca's, for an instruction without an input: what the adapters were trained on.
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{inputs}\n\n" + RESPONSE
)
# Names of files, and what is in them: (samples, test prompts).
_OURS = ("samples.jsonl", "test.jsonl")
_REPOSITORY = ("config/config2.json", "dataset/combined_test.json")
_FLAT = ("config2.json", "combined_test.json")
_TEMPLATES = re.compile(r"_\d+templates$")  # some of the authors' files have it at the end of a task's name
Row = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Preset:
    """The paper's experiment on one base model.

    An adapter's name in the pool is its task's. `examples` are the test prompts of each task in the order of their
    file; `samples` the prompts that stand for the task's adapter, with their answers, which the paper also trained its
    mixtures of experts on.
    """

    name: str  # "paper48-7b"
    size: str
    base_model: str
    adapters: str  # what the adapters' names on the hub begin with; a task's name follows
    examples: Mapping[str, tuple[Example, ...]]
    samples: Mapping[str, tuple[Example, ...]]
    sampling: Sampling = SAMPLING
    dtype: str = DTYPE
    k: int = K

    @property
    def domains(self) -> Mapping[str, str]:
        """The domain of each task that has an adapter."""
        return {task: rows[0].domain for task, rows in self.samples.items()}

    @property
    def own(self) -> Mapping[str, str]:
        """The adapter in the pool that was trained for each task."""
        return {task: task for task in self.samples}

    @property
    def repeated(self) -> int:
        """Test prompts that are also a sample of their adapter, which makes them easier to find."""
        samples = {task: {each.inputs for each in rows} for task, rows in self.samples.items()}
        return sum(each.inputs in samples[task] for task, rows in self.examples.items() for each in rows)

    def prompts(self, per_task: int = PROMPTS_PER_TASK) -> tuple[TestPrompt, ...]:
        """The first test prompts of each task, `per_task` at most, in the order of the tasks' names."""
        return tuple(
            TestPrompt(f"{task}/{place}", each.inputs, each.targets, task, each.domain, each.metric, self.own[task])
            for task, rows in sorted(self.examples.items())
            for place, each in enumerate(rows[:per_task])
        )

    def render(self, inputs: str) -> str:
        """What the model reads for a prompt; retrieval reads the prompt itself."""
        return TEMPLATE.replace("{inputs}", inputs)

    def adapter_id(self, task: str) -> str:
        """The hub id of a task's adapter."""
        return self.adapters + task


def cut_answer(text: str) -> str:
    """The part of an answer that the authors' script scored: what follows the last heading of a response in it.

    The script cut the prompt off that way. It has no stop string: an answer ends at the end token or after 50 tokens.
    """
    return text.strip().rpartition(RESPONSE)[2].strip()


def load_paper48(folder: Path, size: str = "7b") -> Preset:
    """Read the paper's samples and test prompts.

    Args:
        folder: has `samples.jsonl` and `test.jsonl` (one object a line), or is a copy of the authors' repository, with
            `config/config2.json` and `dataset/combined_test.json`, or has these two files.
        size: of the base model, "7b" or "13b".

    Raises:
        InvalidInputError: the size is another, the files are not there, or a part of one cannot be used.
    """
    check_size(size)
    for names in (_OURS, _REPOSITORY, _FLAT):
        samples_file, test_file = folder / names[0], folder / names[1]
        if samples_file.is_file() and test_file.is_file():
            break
    else:
        raise InvalidInputError(
            f"{folder} does not hold the paper's prompts; expected {' and '.join(_OURS)}, or a copy of the repository "
            f"StyxXuan/LoraRetriever with {' and '.join(_REPOSITORY)}."
        )
    test = _read_test(test_file)
    samples = _read_samples(samples_file, {task: rows[0].metric for task, rows in test.items()})
    if missing := sorted(test.keys() - samples.keys()):
        raise InvalidInputError(
            f"{test_file} has prompts of {', '.join(missing)}, for which {samples_file} has no samples; expected two "
            "files of one version of the repository."
        )
    return Preset(f"paper48-{size}", size, BASE_MODELS[size], ADAPTERS[size], test, samples)


def _read_test(file: Path) -> dict[str, tuple[Example, ...]]:
    found: dict[str, list[Example]] = {}
    for where, row in _rows(file):
        task = _task(_text(row, "task", where))
        metric = _text(row, "metric", where)
        if metric not in METRICS:
            raise InvalidInputError(f"{where} has the metric {metric!r}; expected one of {', '.join(METRICS)}.")
        example = Example(_text(row, "inputs", where), _targets(row, where), task, _text(row, "domain", where), metric)
        found.setdefault(task, []).append(example)
    if not found:
        raise InvalidInputError(f"{file} has no prompt; expected those of the paper's 48 tasks.")
    return {task: tuple(rows) for task, rows in found.items()}


def _read_samples(file: Path, metrics: Mapping[str, str]) -> dict[str, tuple[Example, ...]]:
    """The first distinct samples of each adapter, 20 at most."""
    found: dict[str, dict[str, Example]] = {}
    for where, row in _samples(file):
        task = _task(_text(row, "adapter", where))
        metric = metrics.get(task) or (TASKS[task].metric if task in TASKS else "em")
        inputs, domain = _text(row, "inputs", where), _text(row, "domain", where)
        mine = found.setdefault(task, {})
        if len(mine) < SAMPLES_PER_ADAPTER:
            mine.setdefault(inputs, Example(inputs, _targets(row, where), task, domain, metric))
    return {task: tuple(rows.values()) for task, rows in found.items()}


def _samples(file: Path) -> Iterator[Row]:
    """The rows of either form, as in `samples.jsonl`: adapter, domain, inputs, targets."""
    for where, row in _rows(file):
        if file.suffix == ".jsonl":
            yield where, row
            continue
        samples = row.get("sample")
        if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
            raise InvalidInputError(f"{where} has no list of objects in `sample`; expected those of config2.json.")
        for number, sample in enumerate(samples, 1):
            shared = {"adapter": row.get("model_name"), "domain": row.get("domain")}
            yield f"{where}, sample {number}", shared | sample


def _rows(file: Path) -> Iterator[Row]:
    """Where a row stands, and the row: of a JSONL file, or of a JSON file that is one list."""
    if file.suffix == ".jsonl":
        yield from ((f"{file}:{number}", row) for number, row in read_jsonl(file))
        return
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"cannot read {file}: {error}. Expected a JSON file in UTF-8.") from error
    if not isinstance(rows, Sequence) or not all(isinstance(row, dict) for row in rows):
        raise InvalidInputError(f"{file} is not a list of objects; expected the file of the authors' repository.")
    yield from ((f"{file}, entry {number}", row) for number, row in enumerate(rows, 1))


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise InvalidInputError(f"{where} has {str(value)[:60]!r} in `{field}`; expected some text.")
    return value


def _targets(row: Mapping[str, Any], where: str) -> str:
    value = row.get("targets")
    if not isinstance(value, str):
        raise InvalidInputError(f"{where} has {str(value)[:60]!r} in `targets`; expected a reference answer.")
    return value  # may be empty: the answer to a question that has none


def _task(name: str) -> str:
    return _TEMPLATES.sub("", name)
