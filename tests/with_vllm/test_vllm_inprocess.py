"""vLLM in the process of the command line, in vLLM's environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from loraretriever.pipeline import LoraRetriever
from loraretriever.types import Sampling
from vllm_server import environment, vllm_python

pytestmark = pytest.mark.vllm

PROMPTS = ["What?", "Who?", "Where?"]


def test_answers_are_those_of_the_local_engine(tmp_path: Path, wide: Path, tiny_pool: Path) -> None:
    variables = environment(
        LORARETRIEVER_POOL=str(tiny_pool),
        LORARETRIEVER_CACHE=str(tmp_path / "cache"),
        LORARETRIEVER_VLLM_RANK="16",
        VLLM_PLUGINS="",
    )
    for adapters in ("sql=0.5,german=0.5,math=-1", "base"):
        expected = local_texts(wide, tiny_pool, adapters)
        command = [
            vllm_python(), "-m", "loraretriever", "generate", *PROMPTS, "--adapters", adapters, "--engine", "vllm",
            "--slots", "2", "--batch-size", "4", "--dtype", "float32", "--max-tokens", "12", "--json",
        ]  # fmt: skip
        done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert {row["inputs"]: row["text"] for row in rows} == expected
        assert "Traceback" not in done.stderr


def local_texts(wide: Path, pool: Path, adapters: str) -> dict[str, str]:
    named = {} if adapters == "base" else {"sql": 0.5, "german": 0.5, "math": -1.0}
    with LoraRetriever.open(pool, encoder=str(wide / "encoder"), cache_mib=64, dtype="float32") as opened:
        return {
            each.prompt: each.text
            for each in opened.generate(PROMPTS, adapters=named, sampling=Sampling(max_tokens=12))
        }
