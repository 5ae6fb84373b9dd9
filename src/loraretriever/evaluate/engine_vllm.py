"""vLLM as a contender: in a process of its own, by the interpreter of an environment that has it.

The process is started once and waits for input, at no cost, while others are measured. The engine runs in that very
process, with no server before it: talking to clients does not count against it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from loraretriever.errors import InvalidInputError, ModelLoadError
from loraretriever.evaluate.engine_contenders import Served
from loraretriever.evaluate.engine_workloads import Job

_DRIVER = "engine_vllm_driver.py"
_CACHE_GIB = 2  # memory for keys and values
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as the largest rank
_LOG_LINES = 15
_PATIENCE = 10.0  # seconds that it gets to end by itself


@dataclass(frozen=True, slots=True)
class VllmSetUp:
    """How vLLM is started: the model (a folder or a hub id), adapters by name, and how much it may take at once."""

    python: str
    base_model: str
    dtype: str
    adapters: Mapping[str, Path]
    rank: int
    batch_size: int
    max_length: int
    threads: int


def find_python(name: str) -> str:
    """The path of an interpreter.

    Raises:
        InvalidInputError: there is none of that name.
    """
    found = shutil.which(name)
    if found is None:
        raise InvalidInputError(
            f"--vllm is {name!r}, which cannot be run; expected the Python interpreter of an environment that has "
            "vLLM, such as .venv-vllm/bin/python."
        )
    return found


class Vllm:
    """vLLM with jobs of one adapter each, or none. `version` is vLLM's."""

    def __init__(self, setup: VllmSetUp, folder: Path) -> None:
        """Start it, and wait until the model is loaded. `folder` takes its script and its messages.

        Raises:
            InvalidInputError: the interpreter cannot be run, or an adapter's rank is larger than vLLM takes.
            ModelLoadError: it ended before it was ready.
        """
        self._adapters = setup.adapters
        self._log = folder / "vllm.log"
        # A copy by itself: a script's own folder is searched for modules first, and ours has names of other packages.
        script = Path(shutil.copy(Path(__file__).with_name(_DRIVER), folder))
        command = [find_python(setup.python), str(script), json.dumps(_arguments(setup))]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment(setup)
            )
        try:
            self.version = str(self._read())
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Sequence[Job]) -> list[Served]:
        """Hand all jobs over; the script keeps to their arrivals.

        Raises:
            ModelLoadError: vLLM has ended.
        """
        rows = [
            {
                "prompt": job.prompt,
                "max_tokens": job.max_tokens,
                "arrival": job.arrival,
                "adapter": str(self._adapters[job.adapters[0]]) if job.adapters else None,
            }
            for job in jobs
        ]
        with suppress(BrokenPipeError):  # it has ended: reading says so
            self._input.write(json.dumps(rows) + "\n")
            self._input.flush()
        return [Served(**row) for row in self._read()]

    def _read(self) -> Any:
        line = self._output.readline()
        if not line:
            code = self._process.wait()
            tail = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:])
            raise ModelLoadError(
                f"vLLM ended with exit status {code}; expected an answer. Leave --vllm out, or mend that environment. "
                f"Its last messages:\n{tail}"
            )
        return json.loads(line)

    @property
    def _input(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _output(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def close(self) -> None:
        """End it: by the end of its input, or else by force."""
        with self._process:  # closes the pipes and waits
            with suppress(BrokenPipeError):
                self._input.close()
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()


def _arguments(setup: VllmSetUp) -> dict[str, Any]:
    rank = next((rank for rank in _RANKS if rank >= setup.rank), None)
    if rank is None:
        raise InvalidInputError(
            f"an adapter has the rank {setup.rank}; expected {_RANKS[-1]} at most, as vLLM takes no more. Leave --vllm "
            "out, or name another pool."
        )
    engine = {
        "model": setup.base_model,
        "dtype": setup.dtype,
        "enable_lora": True,
        "max_loras": len(setup.adapters),
        "max_lora_rank": rank,
        "max_num_seqs": setup.batch_size,
        "max_model_len": setup.max_length,
    }
    return {"engine": engine, "adapters": [str(folder) for folder in setup.adapters.values()]}


def _environment(setup: VllmSetUp) -> dict[str, str]:
    """Of vLLM's process. The OpenMP library that its CPU build asks for is loaded where its environment has it."""
    values = {
        "VLLM_CPU_KVCACHE_SPACE": str(_CACHE_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(setup.threads),
    }
    openmp = Path(setup.python).parent.parent / "lib" / "libiomp5.so"
    if openmp.is_file():
        values["LD_PRELOAD"] = str(openmp.absolute())
    return {**os.environ, **values}
