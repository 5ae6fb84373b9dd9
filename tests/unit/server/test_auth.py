"""Keys over HTTP, as OpenAI's client meets them: its error classes, what each scope allows, limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from loraretriever.pool import KeyStore
from unit.server.conftest import Served

CHAT: Any = {"model": "base", "messages": [{"role": "user", "content": "Add 3 and 4."}], "max_tokens": 2}


@pytest.fixture
def served(serve: Callable[..., Any]) -> Iterator[Served]:
    with serve() as running:
        yield running


@pytest.fixture
def keys(served: Served) -> KeyStore:
    return served.retriever.pool.keys


def ask(served: Served, key: str, **how: Any) -> Any:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0) as client:
        return client.chat.completions.create(**CHAT | how)


def test_without_keys_any_will_do_and_the_first_one_closes_the_server(served: Served, keys: KeyStore) -> None:
    ask(served, "anything")
    secret, key = keys.create("one", ["generate"])
    ask(served, secret)
    with pytest.raises(openai.AuthenticationError) as caught:
        ask(served, "anything")
    assert caught.value.code == "invalid_api_key"
    assert caught.value.response.headers["www-authenticate"] == "Bearer"
    keys.revoke(key.id)
    with pytest.raises(openai.AuthenticationError):
        ask(served, secret)
    with served.client() as client:  # the last key is revoked: nobody gets in
        assert client.get("/v1/models").status_code == 401
        assert client.get("/health").status_code == 200


def test_a_key_does_what_its_scopes_allow(served: Served, keys: KeyStore) -> None:
    secret, _ = keys.create("router", ["route"])
    with pytest.raises(openai.PermissionDeniedError) as caught:
        ask(served, secret)
    assert "generate" in caught.value.message
    with served.client(secret) as client:
        assert client.post("/v1/route", json={"input": "Add 3 and 4."}).status_code == 200
        assert client.delete("/v1/adapters/sql").status_code == 403
        assert client.get("/metrics").status_code == 403
        mine = client.get("/v1/keys/me").json()
    assert (mine["scopes"], mine["open"], mine["operator"]) == (["route"], False, False)


def test_limits_of_a_key(served: Served, keys: KeyStore) -> None:
    secret, _ = keys.create("slow", ["generate"], requests_per_minute=2, max_tokens=5)
    assert ask(served, secret, max_tokens=5).usage.completion_tokens <= 5
    with pytest.raises(openai.BadRequestError, match="at most 5"):
        ask(served, secret, max_tokens=6)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(served, secret)
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60


def test_tokens_are_charged(served: Served, keys: KeyStore) -> None:
    secret, _ = keys.create("frugal", ["generate"], tokens_per_minute=10)
    ask(served, secret, extra_body={"ignore_eos": True})  # its prompt alone has more tokens
    with pytest.raises(openai.RateLimitError):
        for _ in range(100):  # the charge comes a moment after the answer
            ask(served, secret)


def test_a_server_that_stops_says_so(served: Served) -> None:
    served.app.state.server.is_stopping = True
    with pytest.raises(openai.InternalServerError) as caught:
        ask(served, "none")
    assert caught.value.status_code == 503
    assert caught.value.code == "stopping"
    assert "retry-after" in caught.value.response.headers


@pytest.mark.parametrize("header", ["", "Basic abc", "Bearer", "lr-abc"])
def test_headers_that_hold_no_key(served: Served, keys: KeyStore, header: str) -> None:
    keys.create("one", ["generate"])
    with served.client() as client:
        response = client.get("/v1/models", headers={"authorization": header})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
