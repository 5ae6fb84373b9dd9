"""A batch of sequences through a transformers model: left padding, the model's own cache, one token a step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Ordered
from typing import Any

import torch

from loraretriever.engine.sampler import Sampler
from loraretriever.engine.sequence import Sequence


class BatchRunner:
    """The rows of one static batch. Rows that finish can be dropped; none can join."""

    @torch.inference_mode()
    def __init__(self, model: Any, sequences: Ordered[Sequence], pad_id: int) -> None:
        from transformers import DynamicCache

        device = model.device
        longest = max(len(sequence.prompt_ids) for sequence in sequences)
        padding = [longest - len(sequence.prompt_ids) for sequence in sequences]
        self._model = model
        self._cache: Any = DynamicCache(config=model.config)
        forward = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in forward  # a model without them has positions in its attention mask
        # transformers renamed `past_key_values` in 5.24.
        self._options: dict[str, Any] = {"cache" if "cache" in forward else "past_key_values": self._cache}
        # Only the last position's logits are needed; the vocabulary is by far the widest product of a prefill.
        if "logits_to_keep" in forward:
            self._options["logits_to_keep"] = 1
        self._input = torch.tensor(
            [[pad_id] * pad + s.prompt_ids for pad, s in zip(padding, sequences, strict=True)], device=device
        )
        self._mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=device)
        self._sampler = Sampler([sequence.request.sampling for sequence in sequences], device)

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Run the model on the new positions and return the next token of each row."""
        if self._takes_positions:
            self._options["position_ids"] = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -self._input.shape[1] :]
        output = self._model(input_ids=self._input, attention_mask=self._mask, use_cache=True, **self._options)
        tokens = self._sampler.sample(output.logits[:, -1])
        self._input = tokens[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return tokens.tolist()

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> None:
        """Drop all other rows from the batch and its cache."""
        index = torch.tensor(rows, device=self._input.device)
        self._cache.batch_select_indices(index)
        self._input, self._mask = self._input[index], self._mask[index]
        self._sampler.select(rows)
