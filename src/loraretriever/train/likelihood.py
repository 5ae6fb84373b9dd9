"""How well compositions explain known answers: the mean cross-entropy of completions, for many compositions at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from loraretriever.batch import AdapterRef, LoraLayers, RowRoute
from loraretriever.models import BaseModel
from loraretriever.train.adapters import Tokens
from loraretriever.types import AdapterWeights

ROWS = 32  # in one forward pass


class Likelihood:
    """A base model with some adapters, as `batch` gives them to it; `close` it in the end."""

    def __init__(self, base: BaseModel, adapters: Mapping[str, AdapterWeights]) -> None:
        """Nothing is loaded yet; there is a slot for each adapter."""
        self._base = base
        self._weights = {weights.digest: weights for weights in adapters.values()}
        self._refs = {name: AdapterRef(name, weights.digest) for name, weights in adapters.items()}
        self._layers = LoraLayers(base.model, len(self._refs), lambda ref: self._weights[ref.digest])

    def route(self, weights: Mapping[str, float], **options: Any) -> RowRoute:
        """The route of a row that uses these adapters; options as in `RowRoute`."""
        return RowRoute(tuple(self._refs[name] for name in weights), tuple(weights.values()), **options)

    @torch.inference_mode()
    def losses(
        self, rows: Sequence[tuple[RowRoute, Tokens]], on_batch: Callable[[int], None] = lambda count: None
    ) -> list[float]:
        """The mean cross-entropy, in nats per token, of each row's completion under its route.

        `on_batch` is called with the number of rows of each forward pass.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][1].ids))
        found = [0.0] * len(rows)
        for start in range(0, len(order), ROWS):
            places = order[start : start + ROWS]
            for place, loss in zip(places, self._run([rows[i] for i in places]), strict=True):
                found[place] = loss
            on_batch(len(places))
        return found

    def _run(self, rows: Sequence[tuple[RowRoute, Tokens]]) -> list[float]:
        model = self._base.model
        longest = max(len(tokens.ids) for _, tokens in rows)
        # Padded on the right, which the tokens before do not see.
        ids = torch.tensor([tokens.ids + [0] * (longest - len(tokens.ids)) for _, tokens in rows], device=model.device)
        owner = [row for row, (_, tokens) in enumerate(rows) for _ in tokens.ids[tokens.prompt :]]
        places = [place for _, tokens in rows for place in range(tokens.prompt, len(tokens.ids))]
        with self._layers.use(self._layers.route([route for route, _ in rows])):
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden[owner, [place - 1 for place in places]]).float()
        losses = torch.nn.functional.cross_entropy(logits, ids[owner, places], reduction="none")
        rows_of = torch.tensor(owner, device=losses.device)
        total = torch.zeros(len(rows), device=losses.device).index_add_(0, rows_of, losses)
        return (total / torch.bincount(rows_of, minlength=len(rows))).tolist()

    def close(self) -> None:
        """Give the model its own modules back."""
        self._layers.eject()
