"""What a step of the engine takes, as a sum over what it does, and a file that holds the numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraretriever.errors import InvalidInputError

SIZES = (2, 4, 8, 16)  # tokens of a step from which on it takes `tokens_2`, `tokens_4` and so on


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step does. A token's uses are the adapters that act on it; its pairs the tokens that it attends to.

    Sequences that decode attend side by side, those in adjacent rows of one capacity together, and each as if it were
    as long as the longest of them: see `engine/attention.py`.
    """

    tokens: int = 0  # of prompts and answers
    rows: int = 0  # sequences that get a token
    prompt: int = 0  # tokens of prompts
    chunks: int = 0  # sequences that these are of
    sides: int = 0  # groups of sequences that decode side by side
    pairs: float = 0.0  # summed over all tokens
    adapted: int = 0  # 1 if adapters act on any of them
    adapters: int = 0  # distinct ones
    uses: int = 0  # summed over all tokens
    writes: int = 0  # adapters copied into slots before it

    @property
    def features(self) -> tuple[float, ...]:
        """What each of `StepCosts.coefficients` is multiplied with."""
        sizes = (float(self.tokens >= least) for least in SIZES)
        tokens = self.rows, self.prompt, self.chunks, self.sides, self.pairs
        return 1.0, *sizes, *tokens, self.adapted, self.adapters, self.uses, self.writes


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds that the engine takes, on one machine with one model and adapters of one size.

    Semantics: a step takes step + row·rows + prompt·prompt + chunk·chunks + side·sides + pair·pairs + adapted·adapted
    + adapter·adapters + use·uses + write·writes, with the counts of `StepWork`. With n tokens or more it takes
    `tokens_n` more: products of more rows are computed in other ways, and their time jumps. `load` seconds after its
    turn has come, an adapter is in host memory; `merge` is what making one of others takes there, beside loading those.

    Raises:
        InvalidInputError: a value is not a number of seconds, or a step takes no time.
    """

    step: float
    row: float
    prompt: float
    tokens_2: float = 0.0
    tokens_4: float = 0.0
    tokens_8: float = 0.0
    tokens_16: float = 0.0
    chunk: float = 0.0
    side: float = 0.0
    pair: float = 0.0
    adapted: float = 0.0
    adapter: float = 0.0
    use: float = 0.0
    write: float = 0.0
    load: float = 0.0
    merge: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no time."""
        for name, value in dataclasses.asdict(self).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < math.inf:
                raise InvalidInputError(f"the cost {name} is {value!r}; expected a number of seconds, 0 or more.")
        if self.step + self.row <= 0:
            raise InvalidInputError("the costs step and row are both 0; expected that a step takes time.")

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Those of a step, in the order of `StepWork.features`."""
        sizes = self.tokens_2, self.tokens_4, self.tokens_8, self.tokens_16
        tokens = self.row, self.prompt, self.chunk, self.side, self.pair
        return self.step, *sizes, *tokens, self.adapted, self.adapter, self.use, self.write

    def seconds(self, work: StepWork) -> float:
        """Of one step."""
        return sum(cost * count for cost, count in zip(self.coefficients, work.features, strict=True))


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a base model's weights, of one adapter, and of the keys and values of one token."""

    weights: int
    adapter: int
    token: int

    def __post_init__(self) -> None:
        """Refuse what is no size."""
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InvalidInputError(f"the size {name} is {value!r}; expected a whole number of bytes, 0 or more.")


@dataclass(frozen=True, slots=True)
class Machine:
    """What steps take on a machine, and what lies in its memory."""

    costs: StepCosts
    footprint: Footprint


def read_machine(path: Path) -> Machine:
    """The machine in a JSON file, as `plan --measure` writes it: `costs` and `footprint` are read, the rest is not.

    Raises:
        InvalidInputError: the file cannot be read or lacks something.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read the costs in {path}: {error}; expected a JSON file.") from error
    parts = content if isinstance(content, dict) else {}
    return Machine(
        StepCosts(**_fields(path, "costs", parts.get("costs"), StepCosts)),
        Footprint(**_fields(path, "footprint", parts.get("footprint"), Footprint)),
    )


def _fields(path: Path, name: str, found: Any, kind: type[StepCosts] | type[Footprint]) -> dict[str, Any]:
    fields = dataclasses.fields(kind)
    known = {field.name for field in fields}
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not isinstance(found, dict) or not needed <= found.keys() <= known:
        shown = sorted(found) if isinstance(found, dict) else found
        raise InvalidInputError(
            f"{path}: {name} has {shown!r:.200}; expected an object with {', '.join(sorted(needed))}"
            f"{', and perhaps ' if known - needed else ''}{', '.join(sorted(known - needed))}. "
            "Make the file with: loraretriever plan --measure FILE"
        )
    return found
