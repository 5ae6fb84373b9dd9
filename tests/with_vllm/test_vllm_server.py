"""What a vLLM server with our plug-in does with names, and what happens when it dies."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from loraretriever.pool import Pool
from tiny import WIDE, lora_tensors, tiny_spec, write_peft_folder
from unit.server.conftest import Served, serving
from vllm_server import TINY_OPTIONS, VllmServer, free_port, vllm_server

pytestmark = pytest.mark.vllm
CHAT = {"messages": [{"role": "user", "content": "Write a query that counts the users."}], "max_tokens": 6}


def complete(server: VllmServer, model: str, max_tokens: int = 4) -> httpx.Response:
    body = {"model": model, "prompt": "What?", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def names(server: VllmServer) -> list[str]:
    return [model["id"] for model in server.get("/v1/models")["data"]]


def pinned(pool: Pool, **weights: float) -> str:
    adapters = (f"{name}@{pool.get(name).digest[:12]}={weight}" for name, weight in sorted(weights.items()))
    return f"mixture({','.join(adapters)})"


def test_names_that_are_no_names_of_ours_are_not_found(tiny_server: VllmServer) -> None:
    for name in ("gpt-4", "nobody@000000000000", "mixture(nobody@000000000000=1,sql@000000000000=1)"):
        response = complete(tiny_server, name)
        assert response.status_code == 404 and "does not exist" in response.text


def test_names_whose_bytes_may_change_are_refused_with_the_pinned_one(tiny_server: VllmServer, tiny_pool: Path) -> None:
    response = complete(tiny_server, "mixture(sql=0.5,german=0.5)")
    assert response.status_code == 400
    with Pool.open(tiny_pool) as pool:
        name = pinned(pool, sql=0.5, german=0.5)
    assert f"Ask for {name}, or ask LoraRetriever's server" in response.json()["error"]["message"]
    assert complete(tiny_server, name).status_code == 200


def test_too_large_a_rank_is_refused_with_the_reason(tiny_server: VllmServer, tiny_pool: Path, tmp_path: Path) -> None:
    with Pool.open(tiny_pool) as pool:
        tensors = lora_tensors(rank=16, seed=9, spec=tiny_spec(WIDE))
        folder = write_peft_folder(tmp_path / "large", base_model=pool.base_model, tensors=tensors, rank=16)
        pool.add(folder, samples=["Something else."])
        try:
            response = complete(tiny_server, pinned(pool, sql=0.5, large=0.5))
            assert response.status_code == 400
            assert "has the rank 20 as one adapter, and the engine takes 16 at most" in response.text
            digest = pool.get("large").digest[:12]
            reduced = f"svd(large@{digest}=0.5,sql@{pool.get('sql').digest[:12]}=0.5;rank=16)"
            assert complete(tiny_server, reduced).status_code == 200
        finally:
            pool.remove("large")


def test_a_revision_has_another_name_and_the_old_one_keeps_its_bytes(
    tiny_server: VllmServer, tiny_pool: Path, tmp_path: Path
) -> None:
    with Pool.open(tiny_pool) as pool:
        for seed, name in ((20, "first"), (21, "second")):
            tensors = lora_tensors(seed=seed, spec=tiny_spec(WIDE))
            write_peft_folder(tmp_path / name, base_model=pool.base_model, tensors=tensors, alpha=64)
        pool.add(tmp_path / "first", name="revised", samples=["Revise."])
        old = f"revised@{pool.get('revised').digest[:12]}"
        before = complete(tiny_server, old).json()["choices"][0]["text"]
        pool.add(tmp_path / "second", name="revised", samples=["Revise."])
        new = f"revised@{pool.get('revised').digest[:12]}"
        assert complete(tiny_server, new).json()["choices"][0]["text"] != before
        assert complete(tiny_server, old).json()["choices"][0]["text"] == before
        pool.remove("revised")


def test_the_base_model_needs_the_zero_adapter_beside_rows_with_adapters(
    tiny_server: VllmServer, tiny_pool: Path
) -> None:
    """On a CPU vLLM adds the last slot's adapter to rows that have none. If the first part fails, it no longer does."""

    def text(model: str) -> str:
        return str(complete(tiny_server, model, max_tokens=100).json()["choices"][0]["text"])

    with Pool.open(tiny_pool) as pool:
        strong = [pinned(pool, sql=weight) for weight in (31, 32, 33, 34)]  # as many as there are slots
    alone = text("base-model")
    assert text("base") == alone
    for model in strong:
        assert text(model) != alone
    with ThreadPoolExecutor(12) as threads:

        def beside(model: str) -> list[str]:
            return list(threads.map(text, [strong[0], model] * 6))[1::2]

        # Which requests share a batch is chance.
        assert any(each != alone for _ in range(10) for each in beside("base-model"))
        assert beside("base") == [alone] * 6


def test_names_are_let_go_and_found_again(tmp_path: Path, wide: Path, tiny_pool: Path) -> None:
    """Five names are known at a time; and a server that is killed is waited for and used again."""
    port = free_port()
    start = {"port": port, "LORARETRIEVER_VLLM_NAMES": "5"}
    options = (tmp_path / "vllm", str(wide / "base"), str(tiny_pool), *TINY_OPTIONS)
    with vllm_server(*options, **start) as server:
        with Pool.open(tiny_pool) as pool:
            asked = [pinned(pool, sql=i / 10, german=0.5) for i in range(1, 9)]
        for name in asked:
            assert complete(server, name).status_code == 200
            assert complete(server, asked[0]).status_code == 200
        assert names(server) == ["base-model", *asked[4:7], asked[7], asked[0]]
        assert complete(server, asked[1]).status_code == 200
        with serving(tiny_pool, wide, engine="vllm", vllm_urls=[server.url]) as gateway:
            check_killed(gateway, server)
            with vllm_server(*options, **start):
                check_answers(gateway)


def check_killed(gateway: Served, server: VllmServer) -> None:
    """In the middle of a stream: it ends with an error, and what comes next is refused, until a server is there."""
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as ai:
        check_answers(gateway)
        long = CHAT | {"max_tokens": 400, "logit_bias": {"2": -100}}
        pieces = []
        with pytest.raises(openai.APIError, match="failed to do this"):
            for chunk in ai.chat.completions.create(model="auto", stream=True, **long):  # type: ignore[call-overload]
                pieces.append(chunk)
                if len(pieces) == 5:
                    server.kill()
        assert len(pieces) >= 5
        with pytest.raises(openai.InternalServerError):
            ai.chat.completions.create(model="auto", **CHAT)  # type: ignore[call-overload]
    assert gateway.retriever.engine.stats().running == 0


def check_answers(gateway: Served) -> None:
    with gateway.client() as client:
        response = client.post("/v1/chat/completions", json={"model": "auto", **CHAT})
    assert response.status_code == 200
    assert re.match(r"sql|mixture\(", response.json()["model"])
