"""What is not OpenAI's client's business: paths, bodies, disconnections, the page's headers, the start and the end."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from loraretriever.types import EngineStats
from unit.server.conftest import Served

CHAT = [{"role": "user", "content": "Write a query that counts the users."}]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_unknown_path_and_method(client: httpx.Client) -> None:
    assert error_of(client.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(client.get("/v1/chat/completions"), 405)["code"] == "method_not_allowed"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"messages": 3}', b"[" * 100_000])
def test_bodies_that_are_no_requests(client: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    error_of(client.post("/v1/chat/completions", content=body, headers=headers), 400)


def test_lone_surrogates_are_refused(client: httpx.Client) -> None:
    body = '{"messages": [{"role": "user", "content": "\\ud800"}]}'
    headers = {"content-type": "application/json"}
    assert "Unicode" in error_of(client.post("/v1/chat/completions", content=body, headers=headers), 400)["message"]


def test_large_bodies_are_refused_with_and_without_a_length(client: httpx.Client) -> None:
    error_of(client.post("/v1/route", content=b" " * (5 << 20)), 413)
    error_of(client.post("/v1/route", content=(b" " * (1 << 20) for _ in range(5))), 413)


def test_other_hosts_and_pages_are_refused_without_keys(client: httpx.Client) -> None:
    error_of(client.get("/v1/models", headers={"host": "evil.example"}), 403)
    error_of(client.get("/v1/models", headers={"origin": "http://evil.example"}), 403)
    error_of(client.get("/v1/models", headers={"x-forwarded-for": "10.0.0.1"}), 403)
    own = str(client.base_url).rstrip("/")
    assert client.get("/v1/models", headers={"origin": own}).status_code == 200


def test_route(client: httpx.Client) -> None:
    body = {"input": ["Add 3 and 4.", "Translate to German: bread."], "k": 2, "explain": True, "map": True}
    answer = client.post("/v1/route", json=body).json()
    first, second = answer["data"]
    assert [first["hits"][0]["adapter"], second["hits"][0]["adapter"]] == ["math", "german"]
    assert len(first["hits"]) == 2
    assert first["why"][0]["samples"][0]["text"] == "Add 3 and 4."
    assert len(first["point"]) == 2
    alone = client.post("/v1/route", json={"input": "Add 3 and 4.", "k": 2}).json()["data"][0]
    assert [hit["adapter"] for hit in alone["hits"]] == [hit["adapter"] for hit in first["hits"]]
    assert alone["hits"][0]["score"] == pytest.approx(first["hits"][0]["score"])  # the encoder's sums differ by batch
    assert "why" not in alone
    shown = client.get("/v1/map").json()
    assert [each["name"] for each in shown["adapters"]] == ["german", "math", "sql"]
    assert {each["adapter"] for each in shown["samples"]} == {"german", "math", "sql"}


def test_too_many_prompts(client: httpx.Client) -> None:
    assert error_of(client.post("/v1/route", json={"input": ["x"] * 65}), 400)["param"] == "input"
    assert error_of(client.post("/v1/completions", json={"prompt": ["x"] * 65}), 400)["param"] == "prompt"


def stats(served: Served) -> EngineStats:
    return served.retriever.engine.stats()


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(2000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_room(served: Served, stream: bool) -> None:
    body = json.dumps(
        {"model": "sql", "messages": CHAT, "max_tokens": 450, "ignore_eos": True, "stream": stream, "temperature": 0}
    )
    before = stats(served).generated_tokens
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        wait_until(lambda: stats(served).generated_tokens > before)
    wait_until(lambda: stats(served).running == stats(served).waiting == 0)
    assert stats(served).generated_tokens < before + 450


def test_a_full_queue_is_told_with_a_time(serve: Any) -> None:
    with serve(queue=1, batch_size=1) as served, served.client() as client:
        slow = {"model": "base", "messages": CHAT, "max_tokens": 450, "ignore_eos": True}
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(client.post("/v1/chat/completions", json=slow)))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    for answer in refused:
        assert error_of(answer, 503)["code"] == "overloaded"
        assert int(answer.headers["retry-after"]) >= 1
    assert len(answers) - len(refused) >= 2


def test_a_request_that_takes_too_long_ends_with_what_it_has(serve: Any) -> None:
    with serve(request_timeout=0.2) as served, served.client() as client:
        body = {"model": "base", "messages": CHAT, "max_tokens": 400, "ignore_eos": True, "n": 8}
        answer = client.post("/v1/chat/completions", json=body)
        if answer.status_code == 200:  # else it never came to run
            assert answer.json()["lora"]["timed_out"]
            assert answer.json()["choices"][0]["finish_reason"] == "length"
        else:
            error_of(answer, 503)


def test_models_that_cannot_be_loaded(serve: Any) -> None:
    with pytest.raises(AssertionError, match="cannot be loaded"), serve(encoder="/nowhere"):
        pass


def test_page_and_its_headers(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert client.get("/static/../app.py").status_code == 404
    assert client.get("/static/%2e%2e/app.py").status_code == 404


def test_health_and_request_ids(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    first, second = (client.get("/health").headers["x-request-id"] for _ in range(2))
    assert first != second


def test_nothing_is_left_of_an_answer_to_many_prompts_one_of_which_fails(served: Served, client: httpx.Client) -> None:
    body = {"prompt": ["Add 3 and 4.", "x" * 600], "max_tokens": 100, "ignore_eos": True}
    error_of(client.post("/v1/completions", json=body), 400)
    wait_until(lambda: stats(served).running == stats(served).waiting == 0)
