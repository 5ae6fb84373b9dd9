"""The engine alone, for comparison with a server: retrieval and engine in a process of their own, without HTTP.

The argument is in JSON: the pool, and settings. A line of standard output says that the models are loaded; then each
line that is read is a turn, and is answered by a line with what came of it (see `server_drivers.py`).
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any

from loraretriever.compose import format_composition
from loraretriever.engine.memory import keep_freed_memory
from loraretriever.errors import LoraRetrieverError
from loraretriever.pipeline import LoraRetriever
from loraretriever.server.state import THREADS
from loraretriever.types import Composition, Generation, Piece, Sampling

Row = dict[str, Any]


class Turn:
    """Jobs that are kept in flight, so many at a time; when one is answered, the next is submitted.

    Times are in seconds from its making.
    """

    def __init__(
        self, retriever: LoraRetriever, jobs: Sequence[Mapping[str, Any]], threads: ThreadPoolExecutor
    ) -> None:
        self._retriever = retriever
        self._jobs = jobs
        self._threads = threads
        self._places = itertools.count()
        self._ended: SimpleQueue[tuple[int, Row | Exception]] = SimpleQueue()
        self._start = time.perf_counter()

    def run(self, concurrency: int) -> Row:
        """What came of each job, in their order, and the seconds that all of them took."""
        for _ in range(min(concurrency, len(self._jobs))):
            self._threads.submit(self._submit_next)
        ended: dict[int, Row] = {}
        while len(ended) < len(self._jobs):
            place, row = self._ended.get()
            if isinstance(row, Exception):
                return {"error": f"{type(row).__name__}: {row}"}
            ended[place] = row
        return {"served": [ended[place] for place in range(len(self._jobs))], "seconds": self._now()}

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _submit_next(self) -> None:
        place = next(self._places)
        if place >= len(self._jobs):
            return
        job = self._jobs[place]
        row: Row = {"start": self._now(), "first": None}
        sampling = Sampling(max_tokens=job["max_tokens"], ignore_end=True)
        try:
            submission = self._retriever.submit(job["prompt"], sampling=sampling)
            submission.answers.listen(partial(self._hear, place, row, submission.composition))
        except Exception as error:
            self._ended.put((place, error))

    def _hear(self, place: int, row: Row, composition: Composition, event: Piece | Generation | Exception) -> None:
        if isinstance(event, Piece):
            if row["first"] is None:
                row["first"] = self._now()
            return
        if isinstance(event, Generation):
            row |= {
                "end": self._now(),
                "tokens": event.completion_tokens,
                "prompt_tokens": event.prompt_tokens,
                "composition": format_composition(composition),
                "text": event.text,
                "finish_reason": event.finish_reason,
            }
            self._threads.submit(self._submit_next)
            self._ended.put((place, row))
        else:
            self._ended.put((place, event))


def main() -> None:
    """Load the models, then answer lines until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    setup = json.loads(sys.argv[1])
    keep_freed_memory()
    try:
        with (
            LoraRetriever.open(setup["pool"], **setup["settings"]) as retriever,
            ThreadPoolExecutor(THREADS) as threads,  # as many as the server has
        ):
            assert retriever.engine, "loads the base model"
            retriever.route(["warm up"])
            _answer(answers, {})
            for line in sys.stdin:
                order = json.loads(line)
                _answer(answers, Turn(retriever, order["jobs"], threads).run(order["concurrency"]))
    except LoraRetrieverError as error:
        _answer(answers, {"error": str(error)})


def _answer(answers: Any, value: object) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
