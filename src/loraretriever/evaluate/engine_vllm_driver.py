"""Serves workloads with vLLM. A script for vLLM's own interpreter: it imports nothing of this package.

Its argument is the set-up in JSON. It writes a line with vLLM's version once the model is loaded; then each line of
jobs that it reads is run, and answered by a line with what came of them. vLLM's own messages go to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from typing import Any


def main() -> None:
    """Load the model, then answer lines until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    setup = json.loads(sys.argv[1])
    vllm = import_module("vllm")  # by name: type checkers of this package do not know it
    engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**setup["engine"]))
    _answer(answers, vllm.__version__)
    for line in sys.stdin:
        _answer(answers, _run(vllm, engine, json.loads(line), setup["adapters"]))


def _answer(answers: Any, value: object) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _run(vllm: Any, engine: Any, jobs: list[dict[str, Any]], adapters: list[str]) -> list[dict[str, Any]]:
    """Give each job to the engine at its arrival; say when its first and its last token came, and its text."""
    numbers = {folder: place + 1 for place, folder in enumerate(adapters)}
    first: dict[int, float] = {}
    served: dict[int, dict[str, Any]] = {}
    submitted = 0
    start = time.perf_counter()
    while len(served) < len(jobs):
        now = time.perf_counter() - start
        while submitted < len(jobs) and jobs[submitted]["arrival"] <= now:
            _submit(vllm, engine, submitted, jobs[submitted], numbers)
            submitted += 1
        if submitted == len(served):
            time.sleep(max(0.0, jobs[submitted]["arrival"] - now))
            continue
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            place, answer = int(output.request_id), output.outputs[0]
            arrival = jobs[place]["arrival"]
            if answer.token_ids:
                first.setdefault(place, now - arrival)
            if output.finished:
                served[place] = {
                    "tokens": len(answer.token_ids),
                    "first_token_seconds": first[place],
                    "seconds": now - arrival,
                    "text": answer.text,
                }
    return [served[place] for place in range(len(jobs))]


def _submit(vllm: Any, engine: Any, place: int, job: dict[str, Any], numbers: dict[str, int]) -> None:
    folder = job["adapter"]
    request = import_module("vllm.lora.request").LoRARequest
    lora = request(f"adapter{numbers[folder]}", numbers[folder], folder) if folder else None
    sampling = vllm.SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    engine.add_request(str(place), job["prompt"], sampling, lora_request=lora)


if __name__ == "__main__":
    main()
