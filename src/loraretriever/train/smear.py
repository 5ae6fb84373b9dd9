"""Answers by SMEAR, whose router sees a whole prompt: by transformers' `generate`, not by the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from loraretriever.compose.routers import read_router
from loraretriever.errors import InvalidInputError
from loraretriever.models import BaseModel
from loraretriever.train.routed import RoutedModel
from loraretriever.types import AdapterWeights

ROWS = 32  # prompts in one batch


class SmearModel:
    """A base model with experts and a router that `train_router("smear", ...)` has written."""

    def __init__(self, base: BaseModel, adapters: Mapping[str, AdapterWeights], folder: Path) -> None:
        """Read the router.

        Args:
            base: in any dtype; its tokenizer pads on the left.
            adapters: the router's experts, by name.
            folder: of the router.

        Raises:
            InvalidInputError: it is no router of that kind, or an expert is missing.
        """
        spec = read_router(folder)
        if spec.kind != "smear" or not set(spec.experts) <= adapters.keys():
            raise InvalidInputError(
                f"{folder} holds a router of the kind {spec.kind} over {', '.join(spec.experts)}; expected smear, over "
                f"some of {', '.join(adapters)}."
            )
        self._base = base
        self._routed = RoutedModel(base.model, {name: adapters[name] for name in spec.experts}, "smear", 1, None)
        self._routed.load(spec.weights())

    @torch.inference_mode()
    def generate(self, requests: Sequence[tuple[str, Sequence[str], int]]) -> Iterator[tuple[int, str, int]]:
        """Greedy answers, those of prompts of similar length together.

        Args:
            requests: for each prompt its text as the model reads it, the experts that it may use, and the new tokens
                at most.

        Yields:
            Position in `requests`, text without special tokens, and number of tokens.
        """
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][0]))
        with self._routed.installed():
            for start in range(0, len(order), ROWS):
                places = order[start : start + ROWS]
                yield from zip(places, *self._answer([requests[i] for i in places]), strict=True)

    def _answer(self, rows: Sequence[tuple[str, Sequence[str], int]]) -> tuple[list[str], list[int]]:
        tokenizer, model, names = self._base.tokenizer, self._base.model, self._routed.names
        inputs = tokenizer([text for text, _, _ in rows], return_tensors="pt", padding=True, add_special_tokens=False)
        self._routed.prompt = inputs.attention_mask.bool()
        self._routed.allowed = torch.tensor([[name in allowed for name in names] for _, allowed, _ in rows])
        output = model.generate(**inputs, max_new_tokens=max(most for _, _, most in rows), do_sample=False)
        texts, counts = [], []
        for (_, _, most), tokens in zip(rows, output[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
            answer = tokens[:most]
            if tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(tokenizer.eos_token_id)]
            texts.append(tokenizer.decode(answer, skip_special_tokens=True))
            counts.append(len(answer))
        return texts, counts
