"""What is measured: our engine, transformers' `generate` and PEFT's mixed batches, behind one Protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from loraretriever.compose.strategies import compose_explicit
from loraretriever.engine.base import Engine
from loraretriever.evaluate.engine_workloads import Job
from loraretriever.models import BaseModel
from loraretriever.types import BASE_COMPOSITION, Composition, Generation, Request, Sampling


@dataclass(frozen=True, slots=True)
class Served:
    """What came of one job. Times are in seconds from its arrival; the first token's is None where nobody knows it."""

    tokens: int
    first_token_seconds: float | None
    seconds: float
    text: str


class Contender(Protocol):
    """Something that answers jobs, greedily, each with exactly as many tokens as it asks for."""

    def run(self, jobs: Sequence[Job]) -> list[Served]:
        """Answer jobs as they arrive, the first of them now; one result per job, in the jobs' order."""
        ...

    def close(self) -> None:
        """Give back memory, threads and processes."""
        ...


class OurEngine:
    """Our engine with the jobs' adapters at equal weights: selection for one, a mixture for several."""

    def __init__(self, engine: Engine, close_source: Callable[[], None]) -> None:
        """`close_source` is called once the engine is closed."""
        self._engine, self._close_source = engine, close_source

    def run(self, jobs: Sequence[Job]) -> list[Served]:
        """Submit each job at its arrival; where all are there at the start, in one call."""
        requests = [request_of(job) for job in jobs]
        if all(job.arrival == 0 for job in jobs):
            results = dict(self._engine.run(requests))
            return [_served(results[place], 0.0) for place in range(len(jobs))]
        start = time.perf_counter()
        streams, delays = [], []
        for job, request in zip(jobs, requests, strict=True):
            time.sleep(max(0.0, start + job.arrival - time.perf_counter()))
            delays.append(time.perf_counter() - start - job.arrival)
            streams.append(self._engine.submit(request))
        return [_served(stream.result()[0], delay) for stream, delay in zip(streams, delays, strict=True)]

    def close(self) -> None:
        """Stop the engine, then close where its adapters come from."""
        self._engine.close()
        self._close_source()


def request_of(job: Job) -> Request:
    """What our engine gets of a job: its adapters at equal weights, and exactly as many tokens as it asks for."""
    sampling = Sampling(max_tokens=job.max_tokens, ignore_end=True)
    return Request(job.prompt, _compose(job.adapters), sampling, chat=False)


def _compose(adapters: Sequence[str]) -> Composition:
    if not adapters:
        return BASE_COMPOSITION
    weights = dict.fromkeys(adapters, 1 / len(adapters))
    return compose_explicit("selection" if len(adapters) == 1 else "mixture", weights)


def _served(generation: Generation, delay: float) -> Served:
    first = generation.first_token_seconds
    return Served(
        generation.completion_tokens,
        None if first is None else first + delay,
        generation.seconds + delay,
        generation.text,
    )


class StaticBatches:
    """`generate` of transformers or PEFT as a user without an engine would call it.

    A batch is what has arrived, `batch_size` prompts at most, padded on the left, and runs until its longest answer is
    done; what arrives meanwhile waits. It is credited with each token at the step that made it, as if the answers were
    streamed, and with no token that nobody asked for.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, mixed: bool) -> None:
        """`mixed`: the model is PEFT's, and each row names its adapter."""
        self._model, self._tokenizer = model, tokenizer
        self._batch_size, self._mixed = batch_size, mixed

    def run(self, jobs: Sequence[Job]) -> list[Served]:
        """Batch after batch."""
        start = time.perf_counter()
        served: list[Served] = []
        while len(served) < len(jobs):
            time.sleep(max(0.0, start + jobs[len(served)].arrival - time.perf_counter()))
            now = time.perf_counter() - start
            waiting = jobs[len(served) : len(served) + self._batch_size]
            served += self._run_batch([job for job in waiting if job.arrival <= now], start)
        return served

    def _run_batch(self, jobs: Sequence[Job], start: float) -> list[Served]:
        clock = _StepClock()
        longest = max(job.max_tokens for job in jobs)
        inputs = self._tokenizer([job.prompt for job in jobs], return_tensors="pt", padding=True)
        options = {"adapter_names": [job.adapters[0] for job in jobs]} if self._mixed else {}
        with torch.inference_mode():
            tokens = self._model.generate(
                **inputs, do_sample=False, max_new_tokens=longest, eos_token_id=None,
                pad_token_id=self._tokenizer.pad_token_id, streamer=clock, **options,
            )  # fmt: skip
        answers = tokens[:, inputs.input_ids.shape[1] :]
        assert answers.shape[1] == longest, "generate stopped before the end"
        texts = [
            self._tokenizer.decode(answer[: job.max_tokens], skip_special_tokens=True)
            for job, answer in zip(jobs, answers, strict=True)
        ]
        times = [at - start for at in clock.times[1:]]  # the first is that of the prompt
        return [
            Served(job.max_tokens, times[0] - job.arrival, times[job.max_tokens - 1] - job.arrival, text)
            for job, text in zip(jobs, texts, strict=True)
        ]

    def close(self) -> None:
        """Drop the model."""
        self._model = None


class _StepClock:
    """A streamer, as transformers calls it: notes when the prompt and each step's tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def load_peft(base: BaseModel, folder: Path, names: Sequence[str]) -> Any:
    """The base model with adapters as PEFT loads them. The model that is given is changed.

    Raises:
        ImportError: PEFT is not installed.
    """
    from peft import PeftModel

    model = PeftModel.from_pretrained(base.model, str(folder / names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(folder / name), adapter_name=name)
    return model.eval()
