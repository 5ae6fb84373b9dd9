"""Contrastive training of a sentence encoder with sentence-transformers' trainer. Imports heavy packages."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraretriever.errors import InvalidInputError, require_extra
from loraretriever.models import encodable, load_errors, resolve_encoder
from loraretriever.retrieve.encoder import Vectors
from loraretriever.train.pairs import Row, owners_of

with require_extra("train"):
    import accelerate  # noqa: F401 - the trainer needs it, and says so too late
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.evaluation import BaseEvaluator
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import semantic_search
    from transformers import PrinterCallback, TrainerCallback


Samples = Mapping[str, Sequence[str]]


def load_model(name: str, device: str, instruction: str, max_tokens: int | None) -> Any:
    """The encoder to train. It adds no prompt by itself: the instruction is part of each text.

    Raises:
        ModelLoadError: it cannot be found or loaded.
        InvalidInputError: it cannot read so many tokens, or they do not hold more than the instruction.
    """
    with load_errors("encoder", name, "Expected a sentence-transformers folder or the id of such a model on the hub."):
        model = SentenceTransformer(resolve_encoder(name), device=device)
        model.prompts, model.default_prompt_name = {"retrieval": instruction}, None
    if max_tokens is not None:
        limit = _positions(model)
        if limit is not None and max_tokens > limit:
            raise InvalidInputError(f"max_tokens is {max_tokens}; expected at most {limit}, {name}'s positions.")
        needed = model.preprocess([instruction + "x"])["input_ids"].shape[-1]
        if max_tokens <= needed:
            raise InvalidInputError(
                f"max_tokens is {max_tokens}; expected more than {needed}, which the instruction {instruction!r} takes."
            )
        model.max_seq_length = max_tokens
    return model


def _positions(model: Any) -> int | None:
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def fingerprint(model: Any) -> str:
    """SHA-256 of the weights: names, shapes, bytes."""
    import torch

    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def encode(model: Any, texts: Sequence[str], instruction: str, batch_size: int = 32) -> Vectors:
    """Shape: (len(texts), dimension), rows of length 1."""
    vectors = model.encode(
        [instruction + encodable(text) for text in texts],
        batch_size=batch_size,
        normalize_embeddings=True,
        convert_to_numpy=True,
        show_progress_bar=False,
    )
    return np.asarray(vectors, dtype=np.float32)


def mine_near(
    texts: Sequence[str], vectors: Vectors, owners: Mapping[str, frozenset[str]], count: int
) -> dict[str, list[str]]:
    """For each text the `count` nearest that share no task with it, nearest first.

    Shape: vectors (len(texts), dimension), rows of length 1, on the texts' places. The texts differ.
    """
    import torch

    tensor = torch.from_numpy(vectors)
    sizes: dict[str, int] = {}
    for text in texts:
        for name in owners[text]:
            sizes[name] = sizes.get(name, 0) + 1
    most = max(sum(sizes[name] for name in owners[text]) for text in texts)
    found = semantic_search(tensor, tensor, top_k=min(len(texts), most + count))
    near = {}
    for text, hits in zip(texts, found, strict=True):
        ranked = [texts[int(hit["corpus_id"])] for hit in hits]
        near[text] = [other for other in ranked if not owners[other] & owners[text]][:count]
    return near


class Validation:
    """Retrieval by the paper's formula, over all adapters, of texts that were not trained on."""

    def __init__(self, samples: Samples, queries: Sequence[tuple[str, str]], held_out: Sequence[str]) -> None:
        self.texts = sorted(owners_of(samples))
        self._names = sorted(samples)
        row = {text: position for position, text in enumerate(self.texts)}
        self._has = np.zeros((len(self._names), len(self.texts)), dtype=np.float64)
        for position, name in enumerate(self._names):
            self._has[position, [row[text] for text in samples[name]]] = 1.0
        self._queries = np.array([row[text] for _, text in queries])
        self._right = np.array([self._names.index(name) for name, _ in queries])
        self._held_out = np.array([name in set(held_out) for name, _ in queries])

    def ranks(self, vectors: Vectors) -> NDArray[np.int64]:
        """The place of the right adapter for each query, 1 being the first.

        Shape: vectors (texts, dimension), rows of length 1; result (queries,).
        Semantics: s(x, φ) = cos(E(x), Σ_{y in φ, y ≠ x} E(y)): the query is left out wherever it is a sample.
        Equal scores keep the names' order.
        """
        encoded = vectors.astype(np.float64)
        sums = self._has @ encoded
        query, without = encoded[self._queries], self._has[:, self._queries].T
        dots = query @ sums.T
        # |S - x|² = |S|² - 2 x·S + |x|²
        lengths = (sums**2).sum(axis=1) - without * (2 * dots - (query**2).sum(axis=1, keepdims=True))
        scores = (dots - without * (query**2).sum(axis=1, keepdims=True)) / np.sqrt(np.maximum(lengths, 1e-24))
        order = np.argsort(-scores, axis=1, kind="stable")
        ranks: NDArray[np.int64] = np.argmax(order == self._right[:, None], axis=1) + 1
        return ranks

    def figures(self, vectors: Vectors) -> dict[str, float]:
        """Top-1, top-3 and mean reciprocal rank, of all queries (`mrr` alone) and of either kind of tasks."""
        ranks = self.ranks(vectors)
        found = {"mrr": float((1 / ranks).mean())}
        for kind, chosen in (("trained", ranks[~self._held_out]), ("held_out", ranks[self._held_out])):
            if len(chosen):
                found |= {
                    f"{kind}_top1": float((chosen <= 1).mean()),
                    f"{kind}_top3": float((chosen <= 3).mean()),
                    f"{kind}_mrr": float((1 / chosen).mean()),
                    f"{kind}_queries": len(chosen),
                }
        return found


class _Evaluator(BaseEvaluator):  # type: ignore[misc] # the library has no types for mypy here
    """The validation as the trainer wants it, with the seconds since the training began."""

    def __init__(self, validation: Validation, instruction: str, seconds: float) -> None:
        super().__init__()
        self.primary_metric = "mrr"
        self._validation = validation
        self._instruction = instruction
        self._begin = time.monotonic() - seconds

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        figures = self._validation.figures(encode(model, self._validation.texts, self._instruction))
        return {**figures, "seconds": round(time.monotonic() - self._begin, 1)}


class _PlannedBatches(DefaultBatchSampler):  # type: ignore[misc]
    """The batches of `pairs.plan_epochs`, as positions in a data set that has the rows of all epochs in order."""

    def __init__(self, dataset: Any, plan: list[list[list[Row]]]) -> None:
        super().__init__(dataset, batch_size=1, drop_last=False)
        positions = iter(range(len(dataset)))
        self._plan = [[[next(positions) for _ in batch] for batch in epoch] for epoch in plan]

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._plan[int(self.epoch)]

    def __len__(self) -> int:
        return len(self._plan[0])


class _RankingLoss(MultipleNegativesRankingLoss):  # type: ignore[misc]
    """The library's loss; each column passes the encoder in chunks of similar length, and similarities are float32.

    On a CPU, where padding costs time, this takes a little more than half of it.
    """

    def forward(self, sentence_features: Any, labels: Any) -> Any:
        import torch

        embeddings = [_embed_by_length(self.model, column).float() for column in sentence_features]
        with torch.autocast(embeddings[0].device.type, enabled=False):
            return self.compute_loss_from_embeddings(embeddings, labels)


def _embed_by_length(model: Any, features: dict[str, Any], chunk: int = 8) -> Any:
    """Shape: (texts, dimension), as of `model(features)["sentence_embedding"]`, up to dropout."""
    import torch

    mask = features.get("attention_mask")
    # Left padding, and features that are no padded matrix, are the model's own business.
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or len(mask) <= chunk or not bool(mask[:, 0].all()):
        return model(features)["sentence_embedding"]
    rows, width = mask.shape
    order = torch.argsort(mask.sum(dim=1), stable=True)
    embedded = []
    for chosen in torch.split(order, chunk):
        longest = int(mask[chosen].sum(dim=1).max())
        part = {}
        for key, value in features.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == rows:
                value = value[chosen]
                value = value[:, :longest] if value.ndim > 1 and value.shape[1] == width else value
            part[key] = value
        embedded.append(model(part)["sentence_embedding"])
    return torch.cat(embedded)[torch.argsort(order)]


class _Watcher(TrainerCallback):  # type: ignore[misc]
    """Tells of steps and epochs, and stops when no epoch has been better for a while."""

    def __init__(self, on_step: Callable[[int, int], None], on_epoch: Callable[[list[dict[str, Any]]], bool]) -> None:
        self._on_step, self._on_epoch = on_step, on_epoch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_step(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_step(state.global_step, state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._on_epoch(state.log_history):
            control.should_training_stop = True


class _Trainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """The library's trainer with planned batches, and without its model card, which looks things up on the hub."""

    def __init__(self, plan: list[list[list[Row]]], **kwargs: Any) -> None:
        self._plan = plan
        super().__init__(**kwargs)

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return _PlannedBatches(dataset, self._plan)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        pass


def run_training(
    model: Any,
    plan: list[list[list[Row]]],
    validation: Validation,
    folder: Path,
    *,
    instruction: str,
    temperature: float,
    learning_rate: float,
    dtype: str,
    seed: int,
    seconds: float,
    resume_from: Path | None,
    on_step: Callable[[int, int], None],
    on_epoch: Callable[[list[dict[str, Any]]], bool],
) -> None:
    """Train, validate and save a checkpoint in `folder` after each epoch; `on_epoch` says whether to stop.

    Semantics: L = -log exp(s(x, x⁺)/γ) / Σ_y exp(s(x, y)/γ), y over the positives and hard negatives of the batch
    (LoraRetriever, section 3.2; there with negatives drawn at random).
    """
    rows = [row for epoch in plan for batch in epoch for row in batch]
    columns = ["anchor", "positive", *(f"negative_{i}" for i in range(len(rows[0].texts) - 2))]
    texts = [[instruction + encodable(row.texts[i]) for row in rows] for i in range(len(columns))]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=len(plan),
        learning_rate=learning_rate,
        warmup_steps=0.1,
        bf16=dtype == "bfloat16",
        seed=seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=2,
        metric_for_best_model="eval_mrr",
        greater_is_better=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=str(model.device) == "cpu",
    )
    trainer = _Trainer(
        plan,
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(dict(zip(columns, texts, strict=True))),
        loss=_RankingLoss(model, scale=1 / temperature),
        evaluator=_Evaluator(validation, instruction, seconds),
        callbacks=[_Watcher(on_step, on_epoch)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to standard output
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)


def save_model(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint's model as a sentence-transformers folder, without the state of its training."""
    SentenceTransformer(str(checkpoint), device="cpu").save_pretrained(str(folder), create_model_card=False)
