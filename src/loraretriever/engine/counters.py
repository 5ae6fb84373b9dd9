"""What an engine has done so far, counted."""

from __future__ import annotations

from bisect import bisect_left

_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sequences in a step


class Counters:
    """Numbers that only grow, for `EngineStats`. One thread counts; others may read at any time."""

    def __init__(self) -> None:
        self.steps = 0
        self.step_sequences = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.preemptions = 0
        self.adapter_hits = 0
        self.slot_loads = 0
        self._sizes = [0] * (len(_BOUNDS) + 1)

    def step(self, sequences: int) -> None:
        """A step with so many sequences has been run."""
        self.steps += 1
        self.step_sequences += sequences
        self._sizes[bisect_left(_BOUNDS, sequences)] += 1

    def batch_sizes(self) -> tuple[tuple[int, int], ...]:
        """See `EngineStats`."""
        return tuple(zip(_BOUNDS, self._sizes, strict=False))  # the last are the larger steps
