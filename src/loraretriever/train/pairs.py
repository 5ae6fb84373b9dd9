"""What a retriever is trained and validated on: which tasks, which samples, which rows share a batch."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from loraretriever.errors import InvalidInputError

Texts = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Split:
    """The tasks trained on and held out, the texts trained on by task, and the (task, text) pairs to validate with."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    training: dict[str, tuple[str, ...]]
    validation: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a batch: anchor, positive, hard negatives; `own` tasks have the first two, `foreign` ones the rest."""

    texts: tuple[str, ...]
    own: frozenset[str]
    foreign: frozenset[str]


def split_samples(
    samples: Texts, task_share: float, held_out: Sequence[str] | None, validation_share: float, seed: int
) -> Split:
    """Choose the tasks to train on, and of each a share of its texts that is only validated with.

    Semantics: a text that is validated with is not trained on, whichever other task has it too. Of a task that is
    held out all texts are validated with.

    Raises:
        InvalidInputError: fewer than two tasks to train on, one of them with fewer than two texts to train on, or
            nothing to validate with.
    """
    rng = random.Random(seed)
    names = sorted(samples)
    if held_out is None:
        count = min(len(names), max(2, round(task_share * len(names))))
        trained = tuple(sorted(rng.sample(names, count)))
    else:
        trained = tuple(name for name in names if name not in set(held_out))
    if len(trained) < 2:
        raise InvalidInputError(
            f"{len(trained)} of {len(names)} tasks would be trained on; expected at least two, "
            f"whose samples are told apart. Give more adapters, or hold fewer out."
        )
    rest = tuple(name for name in names if name not in set(trained))
    validation = [(name, text) for name in rest for text in samples[name]]
    for name in trained:
        count = min(max(1, round(validation_share * len(samples[name]))), len(samples[name]) - 2)
        validation += [(name, text) for text in rng.sample(list(samples[name]), max(0, count))]
    unseen = {text for _, text in validation}
    training = {name: tuple(text for text in samples[name] if text not in unseen) for name in trained}
    for name, texts in training.items():
        if len(texts) < 2:
            raise InvalidInputError(
                f"{name!r} has {len(texts)} samples to train on, the others being validated with; "
                f"expected at least 2 that no other adapter shares. Give it more samples, or leave it out."
            )
    if not validation:
        raise InvalidInputError("every adapter has two samples; expected one with three, to validate with.")
    return Split(trained, rest, training, tuple(validation))


def owners_of(samples: Texts) -> dict[str, frozenset[str]]:
    """For each text the tasks that have it."""
    found: dict[str, set[str]] = {}
    for name, texts in samples.items():
        for text in texts:
            found.setdefault(text, set()).add(name)
    return {text: frozenset(names) for text, names in found.items()}


def plan_epochs(
    training: Texts,
    owners: Mapping[str, frozenset[str]],
    near: Mapping[str, Sequence[str]],
    negatives: int,
    batch_size: int,
    epochs: int,
    seed: int,
) -> list[list[list[Row]]]:
    """The batches of each epoch, all epochs having as many. Every epoch draws positives and negatives anew.

    Args:
        training: the texts trained on, by task.
        owners: the tasks of each text.
        near: for each text, foreign ones from which its hard negatives are drawn; read only if `negatives` > 0.
        negatives: hard negatives in each row.
        batch_size: rows in a batch at most.
        epochs: how many to plan.
        seed: an epoch's batches depend on it and on the epoch's number.

    Raises:
        InvalidInputError: no batch can be made, because all tasks share their texts.
    """
    plan = []
    for epoch in range(epochs):
        rng = random.Random(seed * 100_003 + epoch)
        plan.append(_batches(_rows(training, owners, near, negatives, rng), batch_size, 1 if negatives else 2))
    count = min(map(len, plan))
    if count == 0:
        raise InvalidInputError("all adapters share their samples; expected two that can be told apart.")
    return [_largest(batches, count) for batches in plan]


def _largest(batches: list[list[Row]], count: int) -> list[list[Row]]:
    """The `count` largest ones, in their order."""
    chosen = sorted(range(len(batches)), key=lambda position: -len(batches[position]))[:count]
    return [batches[position] for position in sorted(chosen)]


def _rows(
    training: Texts,
    owners: Mapping[str, frozenset[str]],
    near: Mapping[str, Sequence[str]],
    negatives: int,
    rng: random.Random,
) -> Iterable[Row]:
    """Each text once as an anchor; first one of every task, then a second of every task, and so on."""
    shuffled = {name: rng.sample(texts, len(texts)) for name, texts in training.items()}
    for turn in range(max(map(len, shuffled.values()))):
        names = [name for name, texts in shuffled.items() if turn < len(texts)]
        for name in rng.sample(names, len(names)):
            anchor = shuffled[name][turn]
            positive = rng.choice([text for text in training[name] if text != anchor])
            foreign: list[str] = []
            if negatives:
                candidates = near[anchor]
                if not candidates:  # all tasks have this text
                    continue
                enough = len(candidates) >= negatives
                foreign = rng.sample(candidates, negatives) if enough else rng.choices(candidates, k=negatives)
            yield Row(
                (anchor, positive, *foreign),
                owners[anchor] | owners[positive],
                frozenset(chain.from_iterable(owners[text] for text in foreign)),
            )


def _batches(rows: Iterable[Row], batch_size: int, smallest: int) -> list[list[Row]]:
    """Fill batches with rows in order, none of which has a task of its own that another one has or contrasts with.

    So no text is a negative of an anchor of its own task. Batches of fewer than `smallest` rows are left out: a row
    alone, without hard negatives, teaches nothing.
    """
    waiting = deque(rows)
    batches = []
    while waiting:
        batch: list[Row] = []
        own: set[str] = set()
        foreign: set[str] = set()
        passed: list[Row] = []
        while waiting and len(batch) < batch_size:
            row = waiting.popleft()
            if row.own & own or row.own & foreign or row.foreign & own:
                passed.append(row)
                continue
            batch.append(row)
            own |= row.own
            foreign |= row.foreign
        waiting.extendleft(reversed(passed))
        if len(batch) >= smallest:
            batches.append(batch)
    return batches
