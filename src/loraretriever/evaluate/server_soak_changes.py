"""What is done to a server while clients use it: its adapters are added, updated and deleted. And its memory."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from loraretriever.evaluate.server_soak_answers import Change, History
from loraretriever.evaluate.server_soak_clients import Log, find_fault
from loraretriever.pool.peft_config import CONFIG_FILE
from loraretriever.pool.weights import WEIGHTS_FILE

# Which contents, by their place, a name has in turn. No two of these names ever have the same one.
ALTERNATING = {"a0": (0, 1), "a1": (2, 3)}
PASSING = ("t0", "t1", "t2")  # names that come with any content, and go
_POLL_SECONDS = 0.1
_CHANGE_SECONDS = 120.0  # that a change may take
_ENDS = 10  # samples of memory at either end, whose medians are compared


@dataclass(frozen=True, slots=True)
class Content:
    """An adapter's files, and prompts that it is meant for."""

    name: str
    folder: Path
    samples: tuple[str, ...]


@dataclass(slots=True)
class Changer:
    """Adds, updates and deletes adapters through the server, and notes it in the history."""

    http: httpx.AsyncClient
    log: Log
    history: History
    contents: Sequence[Content]
    random: random.Random
    made: Counter[str] = field(default_factory=Counter)

    async def run(self, pause: float, is_over: asyncio.Event) -> None:
        """In each round one name is updated, and another comes or goes; there is one round at least."""
        for number in itertools.count():
            begin = time.perf_counter()
            name = list(ALTERNATING)[number % len(ALTERNATING)]
            one, other = (self.contents[place] for place in ALTERNATING[name])
            await self._put("update", name, other if self.history.latest(name) == one.name else one)
            name = self.random.choice(PASSING)
            if self.history.latest(name) is None:
                await self._put("add", name, self.random.choice(self.contents))
            else:
                await self._delete(name)
            with suppress(TimeoutError):
                await asyncio.wait_for(is_over.wait(), max(0.0, begin + pause - time.perf_counter()))
            if is_over.is_set():
                return

    async def _put(self, kind: str, name: str, content: Content) -> None:
        """Upload; wait for the job's end in the request, or by asking for the job."""
        wait = self.random.random() < 0.5
        files = {
            "config": (content.folder / CONFIG_FILE).read_bytes(),
            "weights": (content.folder / WEIGHTS_FILE).read_bytes(),
            "samples": "".join(json.dumps({"inputs": text}) + "\n" for text in content.samples).encode(),
        }
        data = {"name": name, "description": content.name}
        change = self.history.change(name, content.name)
        address = f"/v1/adapters?wait={'true' if wait else 'false'}"
        response = await self._request(kind, "POST", address, change, (201 if wait else 202,), files=files, data=data)
        if response is None:
            return
        if not wait and not await self._has_succeeded(kind, response.headers["location"], change):
            return
        change.succeeded()
        self.made[kind] += 1

    async def _has_succeeded(self, kind: str, job: str, change: Change) -> bool:
        end = time.perf_counter() + _CHANGE_SECONDS
        state = None
        while time.perf_counter() < end:
            response = await self._request(kind, "GET", job, None, (200,))
            state = None if response is None else response.json()["state"]
            if state == "succeeded":
                return True
            if state in (None, "failed"):
                break
            await asyncio.sleep(_POLL_SECONDS)
        self.log.problem(kind, "unexpected", f"the job {job} is {state}")
        change.failed()
        return False

    async def _delete(self, name: str) -> None:
        change = self.history.change(name, None)
        if await self._request("delete", "DELETE", f"/v1/adapters/{name}", change, (200,)) is not None:
            change.succeeded()
            self.made["delete"] += 1

    async def _request(
        self, kind: str, method: str, path: str, change: Change | None, statuses: tuple[int, ...], **options: Any
    ) -> httpx.Response | None:
        """The answer, if it is as it should be; else the change has not been made."""
        try:
            async with asyncio.timeout(_CHANGE_SECONDS):
                response = await self.http.request(method, path, **options)
        except TimeoutError:
            self.log.problem(kind, "hang", f"{method} {path}: no answer within {_CHANGE_SECONDS:.0f} s")
        except httpx.HTTPError as error:
            self.log.problem(kind, "connection", f"{method} {path}: {error!r}")
        else:
            if response.status_code in statuses:
                self.log.note(kind, str(response.status_code))
                return response
            told = f"{method} {path}: {response.status_code} {response.text:.300}"
            self.log.problem(kind, "unexpected" if find_fault(response) is None else "malformed", told)
        if change is not None:
            change.failed()
        return None


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of the server in MiB, from the warm-up's end on. `slope` is per minute, by least squares."""

    start: float
    end: float
    slope: float
    peak: float
    samples: int


@dataclass(slots=True)
class MemoryWatch:
    """Looks at a process's resident memory each second."""

    pid: int | None
    warm_up: float
    samples: list[tuple[float, float]] = field(default_factory=list)  # (seconds from the beginning, MiB)

    async def run(self) -> None:
        """Until it is cancelled, or the process has ended."""
        start = time.perf_counter()
        page = os.sysconf("SC_PAGE_SIZE")
        with suppress(OSError):
            while self.pid is not None:
                pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
                self.samples.append((time.perf_counter() - start, pages * page / 2**20))
                await asyncio.sleep(1)

    def memory(self) -> Memory | None:
        """From the warm-up's end on; None without two samples."""
        kept = [sample for sample in self.samples if sample[0] >= self.warm_up]
        if len(kept) < 2:
            return None
        times, sizes = (list(column) for column in zip(*kept, strict=True))
        ends = min(_ENDS, len(sizes) // 2)
        start, end = statistics.median(sizes[:ends]), statistics.median(sizes[-ends:])
        slope = 60 * float(np.polyfit(times, sizes, 1)[0])
        return Memory(round(start, 1), round(end, 1), round(slope, 1), round(max(sizes), 1), len(kept))
