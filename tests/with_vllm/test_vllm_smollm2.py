"""SmolLM2 with the demo pool through a real vLLM server, against the local engine in float32."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from loraretriever.compose import compose_explicit
from loraretriever.models import DEFAULT_BASE_MODEL, resolve_base_model
from loraretriever.pipeline import LoraRetriever
from loraretriever.types import BASE_COMPOSITION, Composition, Request, Sampling
from unit.server.conftest import serving_app
from vllm_server import ROOT, VllmServer, vllm_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

POOL = ROOT / "demo" / "pool"
PROMPTS = 100
TOKENS = 16
TIE = 1e-3  # of two log-probabilities: what other orders of summing can turn round


# One adapter made for each composition; or the pool's adapters as they are, in few slots, composed in vLLM's batch.
MODES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "adapters": (("--max-loras", "8", "--max-lora-rank", "64"), {}),
    "lanes": (
        ("--max-loras", "16", "--max-lora-rank", "16"),
        {"LORARETRIEVER_VLLM_LANES": "1", "LORARETRIEVER_VLLM_SLOTS": "7"},
    ),
}


@pytest.fixture(scope="module", params=MODES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    options, variables = MODES[request.param]
    folder, model = tmp_path_factory.mktemp("vllm"), resolve_base_model(DEFAULT_BASE_MODEL)
    with vllm_server(folder, model, str(POOL), "--max-model-len", "1024", *options, **variables) as running:
        yield running


@pytest.fixture(scope="module")
def remote(server: VllmServer) -> Iterator[LoraRetriever]:
    with LoraRetriever.open(POOL, engine="vllm", vllm_urls=[server.url], weight_step=0.05) as opened:
        yield opened


@pytest.fixture(scope="module")
def local() -> Iterator[LoraRetriever]:
    with LoraRetriever.open(POOL, dtype="float32", batch_size=16) as opened:
        yield opened


def prompts() -> list[str]:
    lines = (ROOT / "tests" / "data" / "rewordings.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line)["inputs"] for line in lines), key=len)[:PROMPTS]  # vLLM's CPU path is slow


def texts(retriever: LoraRetriever, requests: list[Request]) -> list[str]:
    found = {position: answer.text for position, answer in retriever.engine.run(requests)}
    return [found[position] for position in range(len(requests))]


def requests_with(compositions: list[Composition]) -> list[Request]:
    pairs = zip(prompts(), compositions, strict=True)
    return [Request(prompt, composition, Sampling(max_tokens=TOKENS), chat=False) for prompt, composition in pairs]


def is_tie(local: LoraRetriever, request: Request, other: str) -> bool:
    """Whether two texts part where two tokens were as good as equally probable."""
    sampling = Sampling(max_tokens=TOKENS, logprobs=2)
    (answer,) = local.engine.submit(replace(request, sampling=sampling)).result()
    text = ""
    for token in answer.logprobs:
        if not other.startswith(text + token.text):
            return token.top[0].logprob - token.top[1].logprob < TIE
        text += token.text
    return False


@pytest.fixture(scope="module")
def mixtures(local: LoraRetriever) -> tuple[list[Request], list[str]]:
    """Requests for mixtures of three adapters, nearly all different, and the local engine's answers."""
    chance = random.Random(0)
    compositions = []
    for route in local.route(prompts(), k=3):
        weights = [chance.randint(1, 10) for _ in route.hits]
        named = {hit.adapter: weight / sum(weights) for hit, weight in zip(route.hits, weights, strict=True)}
        compositions.append(compose_explicit("mixture", named))
    assert all(len(composition.adapters) == 3 for composition in compositions)
    requests = requests_with(compositions)
    return requests, texts(local, requests)


def test_mixtures_of_three_adapters_give_the_local_engines_text(
    local: LoraRetriever, remote: LoraRetriever, mixtures: tuple[list[Request], list[str]]
) -> None:
    requests, expected = mixtures
    found = texts(remote, requests)
    differing = [i for i in range(PROMPTS) if expected[i] != found[i]]
    assert len(differing) <= PROMPTS // 20
    for i in differing:
        assert is_tie(local, requests[i], found[i]), (expected[i], found[i])


@pytest.mark.parametrize("strategy", ["selection", "fusion", "ties", "svd;rank=16"])
def test_other_strategies_too(local: LoraRetriever, remote: LoraRetriever, strategy: str) -> None:
    named = {"wikisql": 0.6, "nl2bash": 0.4}
    requests = requests_with([compose_explicit(strategy, named)] * PROMPTS)[:8]
    expected, found = texts(local, requests), texts(remote, requests)
    for request, one, other in zip(requests, expected, found, strict=True):
        assert one == other or is_tie(local, request, other)


def test_the_base_model_is_the_base_model_beside_rows_with_adapters(
    local: LoraRetriever, remote: LoraRetriever, server: VllmServer
) -> None:
    """On a CPU vLLM adds the last slot's adapter to rows that name none; the zero adapter keeps them from it."""
    adapter = compose_explicit("mixture", {"wikisql": 3.0})
    mixed = requests_with([BASE_COMPOSITION if i % 2 else adapter for i in range(PROMPTS)])[:16]
    base = [i for i in range(16) if i % 2]
    expected = texts(local, [mixed[i] for i in base])
    found = texts(remote, mixed)
    for place, i in enumerate(base):
        assert expected[place] == found[i] or is_tie(local, mixed[i], found[i])
    info = server.get("/loraretriever")
    assert info["base"] == ("base-model" if info["lanes"] else "base")


def test_auto_streams_through_the_gateway(remote: LoraRetriever) -> None:
    with serving_app(remote) as served, served.client() as client:
        for prompt in prompts()[:5]:
            body = {
                "model": "auto",
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": 12,
                "temperature": 0,
            }
            whole = client.post("/v1/chat/completions", json=body).json()
            with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
                text = streamed(response)
            assert text == whole["choices"][0]["message"]["content"]
            weights = [each["weight"] for each in whole["lora"]["adapters"]]
            assert sum(weights) == pytest.approx(1) or not weights
            assert all(weight == pytest.approx(round(weight / 0.05) * 0.05) for weight in weights)


def streamed(response: httpx.Response) -> str:
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    return "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines)
