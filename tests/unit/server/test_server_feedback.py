"""Feedback over HTTP: kept until an operator decides, and then a sample that retrieval reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROMPT = "Wer hat wann bestellt?"


def test_approved_feedback_changes_what_is_found(serve: Callable[..., Any]) -> None:
    with serve() as served, served.client() as client:
        given = client.post("/v1/feedback", json={"prompt": PROMPT, "right": "sql", "wrong": "german"})
        assert given.status_code == 201
        assert given.json()["state"] == "pending"
        assert [each["prompt"] for each in client.get("/v1/feedback").json()["data"]] == [PROMPT]
        assert PROMPT not in served.retriever.pool.samples("sql")
        body = {"ids": [given.json()["id"]], "decision": "approve"}
        assert client.post("/v1/feedback/decisions", json=body).json()["data"][0]["state"] == "approved"
        assert client.post("/v1/route", json={"input": PROMPT}).json()["data"][0]["hits"][0]["adapter"] == "sql"
        assert [each.text for each in served.retriever.pool.counter_samples("german")] == [PROMPT]
        again = client.post("/v1/feedback/decisions", json=body)
        assert again.status_code == 400 and "approved already" in again.json()["error"]["message"]


def test_rejected_feedback_changes_nothing(serve: Callable[..., Any]) -> None:
    with serve() as served, served.client() as client:
        number = client.post("/v1/feedback", json={"prompt": PROMPT, "right": "sql"}).json()["id"]
        client.post("/v1/feedback/decisions", json={"ids": [number], "decision": "reject"})
        assert PROMPT not in [each.text for each in served.retriever.pool.samples("sql")]
        assert client.get("/v1/feedback", params={"state": "rejected"}).json()["data"][0]["id"] == number


def test_who_may_do_what(serve: Callable[..., Any]) -> None:
    with serve() as served:
        keys = served.retriever.pool.keys
        admin, _ = keys.create("ops", ["admin"])
        tenant, _ = keys.create("acme", ["admin"], "acme")
        with served.client(tenant) as client:
            given = client.post("/v1/feedback", json={"prompt": PROMPT, "right": "sql"})
            assert given.status_code == 201
            assert given.json()["id"] is None
            assert client.get("/v1/feedback").status_code == 403
            assert client.post("/v1/feedback/decisions", json={"ids": [1], "decision": "reject"}).status_code == 403
            assert client.post("/v1/feedback", json={"prompt": PROMPT, "right": "nothing"}).status_code == 404
            assert client.post("/v1/feedback", json={"prompt": PROMPT}).status_code == 400
        with served.client(admin) as client:
            assert len(client.get("/v1/feedback").json()["data"]) == 1
