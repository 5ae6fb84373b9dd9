"""OpenAI's own client against the server: what it sends, what it understands, which errors it raises."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tiny_text import tiny_tokenizer
from unit.server.conftest import Served

CHAT: Any = [{"role": "user", "content": "Write a query that counts the users."}]


@pytest.fixture
def ai(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_auto_retrieves_and_composes(ai: openai.OpenAI) -> None:
    raw = ai.chat.completions.with_raw_response.create(model="auto", messages=CHAT, max_tokens=8, temperature=0)
    answer = raw.parse()
    lora: Any = answer.model_extra["lora"]  # type: ignore[index]
    assert lora["hits"][0]["adapter"] == "sql"
    assert not lora["fallback"]
    assert answer.model == lora["composition"]
    assert sum(each["weight"] for each in lora["adapters"]) == pytest.approx(1)
    assert set(lora["milliseconds"]) == {"retrieve", "queue", "first_token", "total"}
    assert raw.headers["x-lora-composition"] == lora["composition"]
    assert raw.headers["x-lora-hits"].startswith("sql=0.")
    assert raw.headers["x-lora-fallback"] == "false"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens <= 8


def test_stream_tells_the_same_as_the_whole_answer(ai: openai.OpenAI) -> None:
    how: Any = {"model": "auto", "messages": CHAT, "max_tokens": 12, "temperature": 0}
    whole = ai.chat.completions.create(**how)
    chunks = list(ai.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].model_extra["lora"]["hits"] == whole.model_extra["lora"]["hits"]  # type: ignore[index]
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    last: Any = chunks[-2].model_extra["lora"]  # type: ignore[index]
    assert last["milliseconds"]["total"] > 0
    assert chunks[-1].choices == []
    assert whole.usage is not None and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_without_usage_always_has_a_choice(ai: openai.OpenAI) -> None:
    chunks = list(ai.chat.completions.create(model="auto", messages=CHAT, max_tokens=4, stream=True))
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason is not None


def test_composition_as_model_is_what_the_same_adapters_give(ai: openai.OpenAI) -> None:
    how: Any = {"messages": CHAT, "max_tokens": 12, "temperature": 0}
    named = ai.chat.completions.create(model="mixture(sql=0.7,german=0.3)", **how)
    extra = {"lora": {"adapters": {"sql": 0.7, "german": 0.3}, "strategy": "mixture"}}
    listed = ai.chat.completions.create(model="auto", **how, extra_body=extra)
    weights = {"lora": {"adapters": ["sql", "german"], "weights": [0.7, 0.3], "strategy": "mixture"}}
    third = ai.chat.completions.create(model="auto", **how, extra_body=weights)
    assert named.model == listed.model == third.model == "mixture(sql=0.7,german=0.3)"
    contents = {each.choices[0].message.content for each in (named, listed, third)}
    assert len(contents) == 1
    base = ai.chat.completions.create(model="base", **how)
    assert base.model == "base"
    assert base.model_extra["lora"]["adapters"] == []  # type: ignore[index]
    assert base.choices[0].message.content not in contents


def test_adapter_as_model(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model="math", messages=CHAT, max_tokens=2)
    assert answer.model == "math"
    assert answer.model_extra["lora"]["hits"] == []  # type: ignore[index]


@pytest.mark.parametrize("wanted", [{"exclude": ["sql"]}, {"only": ["german"]}, {"threshold": 2.0}, {"k": 1}])
def test_lora_options(ai: openai.OpenAI, wanted: dict[str, Any]) -> None:
    answer = ai.chat.completions.create(model="auto", messages=CHAT, max_tokens=1, extra_body={"lora": wanted})
    lora: Any = answer.model_extra["lora"]  # type: ignore[index]
    found = [hit["adapter"] for hit in lora["hits"]]
    if "exclude" in wanted:
        assert "sql" not in found
    elif "only" in wanted:
        assert found == ["german"]
    elif "threshold" in wanted:
        assert lora["fallback"] and answer.model == "base"
    else:
        assert found == ["sql"]


def test_query_routes_in_place_of_the_prompt(ai: openai.OpenAI) -> None:
    extra = {"lora": {"query": "Translate to German: thank you.", "explain": True}}
    answer = ai.chat.completions.create(model="auto", messages=CHAT, max_tokens=1, extra_body=extra)
    lora: Any = answer.model_extra["lora"]  # type: ignore[index]
    assert lora["hits"][0]["adapter"] == "german"
    assert lora["why"][0]["samples"][0]["text"] == "Translate to German: thank you."


def test_seed_makes_answers_repeat_and_n_makes_several(ai: openai.OpenAI) -> None:
    how: Any = {"model": "sql", "messages": CHAT, "max_tokens": 8, "temperature": 1.0, "n": 3}
    first = ai.chat.completions.create(**how, seed=5)
    again = ai.chat.completions.create(**how, seed=5)
    other = ai.chat.completions.create(**how, seed=6000)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    assert texts != [choice.message.content for choice in other.choices]


def test_streams_of_several_answers_are_told_apart(ai: openai.OpenAI) -> None:
    how: Any = {"model": "sql", "messages": CHAT, "max_tokens": 8, "temperature": 1.0, "n": 3, "seed": 5}
    whole = ai.chat.completions.create(**how)
    texts = ["", "", ""]
    for chunk in ai.chat.completions.create(**how, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_stop_ends_an_answer(ai: openai.OpenAI) -> None:
    how: Any = {"model": "sql", "messages": CHAT, "max_tokens": 30, "temperature": 0}
    text = ai.chat.completions.create(**how).choices[0].message.content
    assert text is not None and len(text) > 4
    stopped = ai.chat.completions.create(**how, stop=text[3:5]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == text[: text.index(text[3:5])]


def test_logprobs(ai: openai.OpenAI) -> None:
    how: Any = {"model": "sql", "messages": CHAT, "max_tokens": 5, "temperature": 0}
    choice = ai.chat.completions.create(**how, logprobs=True, top_logprobs=2).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    tokens = [each.token for each in choice.logprobs.content]
    assert "".join(token for token in tokens if not token.startswith("<")) == choice.message.content
    for each in choice.logprobs.content:
        assert len(each.top_logprobs) == 2
        assert each.logprob == pytest.approx(max(other.logprob for other in each.top_logprobs))
    streamed = []
    for chunk in ai.chat.completions.create(**how, logprobs=True, top_logprobs=2, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert [each.token for each in streamed] == [each.token for each in choice.logprobs.content]


def test_plain_completions_of_several_prompts(ai: openai.OpenAI) -> None:
    prompts = ["Translate to German: good day.", "How much is 12 times 9?"]
    how: Any = {"model": "auto", "prompt": prompts, "max_tokens": 6, "temperature": 0, "logprobs": 1}
    answer = ai.completions.create(**how, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    found = [choice.model_extra["lora"]["hits"][0]["adapter"] for choice in answer.choices]  # type: ignore[index]
    assert found == ["german", "german", "math", "math"]
    alone = ai.completions.create(**{**how, "prompt": prompts[1]})
    assert alone.choices[0].text == answer.choices[2].text
    assert alone.choices[0].logprobs is not None
    logprobs = alone.choices[0].logprobs
    assert logprobs.tokens is not None and logprobs.text_offset is not None
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
    texts = ["", ""]
    for chunk in ai.completions.create(**how, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [answer.choices[0].text, answer.choices[2].text]


def test_prompt_as_tokens(ai: openai.OpenAI) -> None:
    text = "How much is 12 times 9?"
    tokens = tiny_tokenizer()(text).input_ids
    how: Any = {"model": "auto", "max_tokens": 6, "temperature": 0}
    assert ai.completions.create(prompt=tokens, **how).choices[0].text == (
        ai.completions.create(prompt=text, **how).choices[0].text
    )


def test_conversation_reads_all_turns_and_routes_by_the_last(ai: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Write a query for all orders."},
        {"role": "assistant", "content": "SELECT * FROM orders"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Translate to German: "}, {"type": "text", "text": "bread"}],
        },
    ]
    answer = ai.chat.completions.create(model="auto", messages=messages, max_tokens=4, temperature=0)
    assert answer.model_extra["lora"]["hits"][0]["adapter"] == "german"  # type: ignore[index]
    last = ai.chat.completions.create(model="auto", messages=messages[-1:], max_tokens=4, temperature=0)
    assert answer.usage is not None and last.usage is not None
    assert answer.usage.prompt_tokens > last.usage.prompt_tokens


def test_models(ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == ["auto", "base", "german", "math", "sql"]
    assert ai.models.retrieve("sql").id == "sql"
    assert ai.models.retrieve("mixture(sql=0.5,math=0.5)").id == "mixture(sql=0.5,math=0.5)"
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("nothing")


def test_embeddings_in_both_encodings(ai: openai.OpenAI, client: httpx.Client) -> None:
    answer = ai.embeddings.create(model="auto", input=["good day", "thank you"])  # the client asks for base64
    plain = client.post("/v1/embeddings", json={"input": ["good day", "thank you"]}).json()
    vectors = np.array([each.embedding for each in answer.data])
    np.testing.assert_allclose(vectors, np.array([each["embedding"] for each in plain["data"]]), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    coded = client.post("/v1/embeddings", json={"input": "good day", "encoding_format": "base64"}).json()
    decoded = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(decoded, vectors[0], atol=1e-5)
    assert answer.usage.prompt_tokens > 0


@pytest.mark.parametrize(
    ("how", "error", "param"),
    [
        ({"model": "nothing"}, openai.NotFoundError, "model"),
        ({"model": "mixture(sql=0.5,nothing=0.5)"}, openai.NotFoundError, "model"),
        ({"model": "mixture(sql=0.5"}, openai.BadRequestError, "model"),
        ({"model": "juggling(sql=1,math=1)"}, openai.BadRequestError, None),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 100_000}, openai.BadRequestError, None),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, openai.BadRequestError, None),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
        ({"extra_body": {"lora": {"k": 0}}}, openai.BadRequestError, "lora.k"),
        ({"extra_body": {"lora": {"exclude": ["nothing"]}}}, openai.NotFoundError, "lora.exclude"),
        ({"extra_body": {"lora": {"weights": [1]}}}, openai.BadRequestError, "lora.weights"),
        ({"model": "sql", "extra_body": {"lora": {"adapters": ["math"]}}}, openai.BadRequestError, "lora.adapters"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(
    ai: openai.OpenAI, how: Any, error: type[openai.APIStatusError], param: str | None, stream: bool
) -> None:
    with pytest.raises(error) as caught:
        ai.chat.completions.create(**{"model": "auto", "messages": CHAT, "max_tokens": 4, "stream": stream} | how)
    body: Any = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert body["param"] == param
    assert len(body["message"]) > 10


def test_async_client_runs_many_at_once(served: Served) -> None:
    """Different compositions in one batch give what each gives alone."""
    models = ["base", "sql", "math", "mixture(sql=0.5,german=0.5)", "fusion(sql=0.5,math=0.5)", "auto"] * 3

    async def run() -> tuple[list[str | None], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
            how: Any = {"messages": CHAT, "max_tokens": 16, "temperature": 0}
            wholes = [client.chat.completions.create(model=model, **how) for model in models]

            async def read(model: str) -> str:
                stream = await client.chat.completions.create(model=model, stream=True, **how)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            answers = await asyncio.gather(*wholes)
            return [each.choices[0].message.content for each in answers], list(await asyncio.gather(*map(read, models)))

    together, streamed = asyncio.run(run())
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
        how: Any = {"messages": CHAT, "max_tokens": 16, "temperature": 0}
        alone = [client.chat.completions.create(model=model, **how).choices[0].message.content for model in models[:6]]
    assert together == streamed == alone * 3
