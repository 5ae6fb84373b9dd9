"""Choosing the next token of every row at once, each row under its own settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from loraretriever.types import Sampling


class Sampler:
    """The settings of a batch's rows as tensors, made once; rows that finish are dropped with `select`."""

    def __init__(self, samplings: Sequence[Sampling], device: torch.device) -> None:
        self._temperature = torch.tensor([s.temperature for s in samplings], device=device)
        self._top_p = torch.tensor([s.top_p for s in samplings], device=device)
        self._top_k = torch.tensor([s.top_k for s in samplings], device=device)
        self._generators = [_generator(s) for s in samplings]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        index = torch.tensor(rows, device=self._temperature.device)
        self._temperature, self._top_p, self._top_k = (
            values[index] for values in (self._temperature, self._top_p, self._top_k)
        )
        self._generators = [self._generators[row] for row in rows]

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each row.

        Shape: logits (rows, vocabulary) -> (rows,).
        Semantics: argmax where the temperature is 0; else a draw from softmax(logits / temperature), cut to the
        top_k most probable tokens and then to the smallest set whose probability reaches top_p.
        """
        greedy = logits.argmax(dim=-1)
        sampled = self._temperature > 0
        if not sampled.any():
            return greedy
        rows = sampled.nonzero().squeeze(1)
        drawn = self._draw(logits[rows].float(), rows)
        return greedy.index_copy(0, rows, drawn)

    def _draw(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        # The largest logit becomes 0, so that a small temperature cannot make it infinite.
        scaled = (logits - logits.amax(dim=-1, keepdim=True)) / self._temperature[rows, None]
        ordered, tokens = scaled.sort(dim=-1, descending=True)
        rank = torch.arange(ordered.shape[-1], device=logits.device)
        top_k = self._top_k[rows, None]
        ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), -math.inf)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= self._top_p[rows, None], 0.0)
        # A row's draw uses its own generator, so that it does not depend on the other rows.
        points = torch.stack([torch.rand((), generator=self._generators[row]) for row in rows.tolist()])
        cumulative = probabilities.cumsum(dim=-1)
        chosen = torch.searchsorted(cumulative, points.to(logits.device)[:, None] * cumulative[:, -1:], right=True)
        last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
        return tokens.gather(1, chosen.minimum(last)).squeeze(1)


def _generator(sampling: Sampling) -> torch.Generator | None:
    if sampling.temperature == 0:
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator
