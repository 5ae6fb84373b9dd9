"""What `demo/train.py` trains: the demo pool (one adapter per task), and the larger pool (several per task)."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.tasks import Example
from loraretriever.train.adapters import TrainingSettings

# Task -> (training examples, passes over them). Only tasks whose source states a licence that allows passing on an
# adapter trained on it and 20 of its prompts. Left out: `copa` and `piqa` (two options each, near chance for so small
# a model) and `gsm8k_steps` (the word problems of `mawps_expression`, which the paper's retriever confuses with it).
TASKS = {
    "banking77": (1000, 1),
    "bc5cdr_chemical": (480, 1),
    "clinc150": (480, 1),
    "e2e_nlg": (800, 1),
    "grammar_correction": (640, 1),
    "mawps_expression": (640, 1),
    "movie_sentiment": (640, 1),
    "ncbi_disease": (480, 1),
    "nl2bash": (640, 1),
    "nl_regex": (640, 1),
    "product_sentiment": (480, 1),
    "qnli": (640, 1),
    "snli": (1000, 2),
    "stackoverflow_topic": (480, 1),
    "subjectivity": (480, 1),
    "translate_en_de": (785, 3),
    "translate_en_es": (777, 3),
    "translate_en_fr": (640, 1),
    "viggo": (640, 1),
    "wiki_split": (640, 1),
    "wikisql": (800, 1),
}
_NEVER_SHIPPED = {"translate_en_de", "translate_en_fr"}  # too small a gain: see README.md
LARGE_TASKS = tuple(task for task in TASKS if task not in _NEVER_SHIPPED)

LARGE_SETTINGS = TrainingSettings(learning_rate=2e-3, batch_size=8, examples=128)
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# Part of a name -> rank and targets. No two variations of a task have the same.
_SHAPES: dict[str, tuple[int, tuple[str, ...]]] = {
    "r8-qkvo": (8, _ATTENTION),
    "r4-qv": (4, ("q_proj", "v_proj")),
    "r16-qv": (16, ("q_proj", "v_proj")),
    "r6-qkvo": (6, _ATTENTION),
    "r8-qvo-mlp": (8, ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
}
# Where each round's 128 examples start. Rounds 1 and 2 share none, round 3 shares half of its examples with each of
# them, round 4 shares half with round 2.
_STARTS = (0, 128, 64, 192)
_EVERY_TASK = 3  # rounds in which every task takes part; in the last one only every third does


@dataclass(frozen=True, slots=True)
class Variation:
    """One adapter to train: its name, its task, how, and on what part of the task's training data.

    `start` is the first of `settings.examples` consecutive examples, in an order that the task's name determines.
    Without it the training chooses among all examples by its seed.
    """

    name: str
    task: str
    settings: TrainingSettings
    start: int | None = None

    def subset(self, examples: list[Example]) -> list[Example]:
        """The examples that the training may use, of all that the task has.

        Raises:
            InvalidInputError: the task has too few.
        """
        if self.start is None:
            return examples
        stop = self.start + self.settings.examples
        if len(examples) < stop:
            raise InvalidInputError(
                f"{self.name} needs the training examples {self.start} to {stop - 1} of {self.task}, which has "
                f"{len(examples)}; expected at least {stop}. Give --tasks a folder with more of them."
            )
        return random.Random(self.task).sample(examples, len(examples))[self.start : stop]


def demo_variations() -> list[Variation]:
    """One adapter per task, named like it."""
    return [
        Variation(task, task, replace(TrainingSettings(), examples=examples, epochs=epochs))
        for task, (examples, epochs) in TASKS.items()
    ]


def large_variations() -> list[Variation]:
    """Three or four short trainings per task, 64 in all: near-duplicates that differ in data, seed, rank and targets.

    Rounds over the tasks, so that a run that is stopped has about as many of each. A name ends with the round, which
    says what subset of the data it is. Every seed is used once: no two adapters start from the same weights, as if
    different people had trained them. Alpha is twice the rank, so that all are scaled alike.
    """
    variations: list[Variation] = []
    shapes = list(_SHAPES.items())
    for number, start in enumerate(_STARTS, 1):
        for position, task in enumerate(LARGE_TASKS):
            if number > _EVERY_TASK and position % 3:
                continue
            # From one task to the next by one, from one round to the next by two: every task gets different shapes.
            shape, (rank, targets) = shapes[(position + 2 * number) % len(shapes)]
            settings = replace(LARGE_SETTINGS, rank=rank, alpha=2 * rank, targets=targets, seed=len(variations))
            variations.append(Variation(f"{task}-{shape}-s{number}", task, settings, start))
    return variations
