"""What the model reads for a request: messages, token ids, namespaces; and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from loraretriever.engine.local import LocalEngine
from loraretriever.errors import InvalidInputError
from loraretriever.models import BaseModel, render_prompt
from loraretriever.pool import Pool
from loraretriever.types import Composition, Message, Request, Sampling
from tiny import TINY_BASE, VOCABULARY, tiny_llama
from tiny_text import tiny_tokenizer

ROLES = (
    "{% for m in messages %}{% if m.role not in ['user', 'system'] %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
)
SYSTEM, USER = Message("system", "be brief"), Message("user", "hello")
ASK = Sampling(max_tokens=4)


@pytest.fixture
def engine(base: BaseModel, pool: Pool) -> Iterator[LocalEngine]:
    engine = LocalEngine(base, pool, cache_mib=8, prefix_mib=1)
    yield engine
    engine.close()


def answer(engine: LocalEngine, request: Request) -> Any:
    return engine.submit(request).result()[0]


def test_messages_go_through_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    assert render_prompt(tokenizer, "ignored", messages=(SYSTEM, USER)) == "<be brief><hello>="
    assert render_prompt(tokenizer, "hello") == render_prompt(tokenizer, "", messages=(USER,)) == "<hello>="
    tokenizer.chat_template = ROLES
    assert render_prompt(tokenizer, "", messages=(SYSTEM, USER)) == "[system]be brief[user]hello"


@pytest.mark.parametrize("chat", [True, False])
def test_messages_without_a_template(chat: bool) -> None:
    tokenizer = tiny_tokenizer(chat=not chat)
    assert render_prompt(tokenizer, "as it is", chat) == "as it is"
    assert render_prompt(tokenizer, "", chat, (USER,)) == "hello"
    assert render_prompt(tokenizer, "", chat, (SYSTEM, USER)) == "system: be brief\n\nuser: hello\n\nassistant:"


@pytest.mark.parametrize(
    ("template", "match"),
    [(ROLES, "roles robot: no such role"), ("{{ messages[0].content + 1 }}", "robot"), ("{{ 1 / 0 }}", "robot")],
)
def test_what_a_template_refuses_is_invalid_input(template: str, match: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InvalidInputError, match=match):
        render_prompt(tokenizer, "", messages=(Message("robot", "hello"),))


def test_lone_surrogates_in_messages() -> None:
    assert render_prompt(tiny_tokenizer(), "", messages=(Message("user", "a\ud800b"),)) == "<a?b>="


def test_prompt_messages_and_tokens_are_one(engine: LocalEngine, base: BaseModel) -> None:
    ids = tuple(base.tokenizer("<hello>=", add_special_tokens=False).input_ids)
    texts = [
        answer(engine, Request("hello", sampling=ASK)),
        answer(engine, Request("other", sampling=ASK, messages=(USER,))),
        answer(engine, Request("other", sampling=ASK, tokens=ids)),
    ]
    assert len({generation.text for generation in texts}) == 1
    assert {generation.prompt_tokens for generation in texts} == {len(ids)}
    assert answer(engine, Request("other", sampling=ASK)).text != texts[0].text
    assert engine.count_tokens(Request("", tokens=ids)) == engine.count_tokens(Request("hello")) == len(ids)
    assert engine.count_tokens(Request("hello", chat=False)) == 5
    assert engine.detokenize(ids) == "<hello>="
    assert engine.detokenize((1, *ids, 2)) == "<hello>=" and engine.detokenize(()) == ""


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_ids_that_the_model_does_not_know(engine: LocalEngine, token: int) -> None:
    request = Request("", tokens=(5, token, 6))
    for call in (engine.submit, engine.count_tokens):
        with pytest.raises(InvalidInputError, match=f"prompt 1 has the token {token}, .* below {VOCABULARY}"):
            call(request)
    with pytest.raises(InvalidInputError, match=f"token {token}"):
        engine.detokenize(request.tokens)


def test_an_empty_prompt_has_no_tokens_and_is_refused(engine: LocalEngine) -> None:
    request = Request("", chat=False)
    assert engine.count_tokens(request) == 0
    with pytest.raises(InvalidInputError, match="empty"):
        engine.submit(request)


def test_messages_and_tokens_together_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="1 messages and 2 token ids"):
        Request("", messages=(USER,), tokens=(5, 6))


def test_beginnings_are_shared_within_a_namespace_only(engine: LocalEngine) -> None:
    prompt, adapter = "the secret plan of our company is " * 2, Composition("selection", ("a1",), (1.0,))
    cached = [
        answer(engine, Request(prompt + str(i), adapter, ASK, namespace=namespace)).cached_tokens
        for i, namespace in enumerate(("acme", "other", "", "acme", "other", ""))
    ]
    assert cached == [0, 0, 0, 64, 64, 64]


def test_the_longest_request_is_that_of_model_or_memory(base: BaseModel, pool: Pool) -> None:
    with pytest.raises(InvalidInputError, match="takes 512 in all"):
        LocalEngine(base, pool, cache_mib=8).submit(Request("x", sampling=Sampling(max_tokens=512)))
    assert LocalEngine(base, pool, cache_mib=8).max_length == 512
    long = BaseModel(TINY_BASE, tiny_llama(max_length=1 << 20), tiny_tokenizer())
    engine = LocalEngine(long, pool, cache_mib=1)
    ids = (5,) * (engine.max_length - 1)
    assert 512 < engine.max_length < 1 << 20
    assert answer(engine, Request("", sampling=Sampling(max_tokens=1), tokens=ids)).completion_tokens == 1
    with pytest.raises(InvalidInputError, match="cache"):
        engine.submit(Request("", sampling=Sampling(max_tokens=2), tokens=ids))
    engine.close()


def test_a_text_that_is_far_too_long_is_not_read_as_a_whole(
    engine: LocalEngine, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    tokenizer = type(base.tokenizer)
    original = tokenizer.__call__

    def spy(self: Any, text: str, **options: Any) -> Any:
        read.append(len(text))
        return original(self, text, **options)

    monkeypatch.setattr(tokenizer, "__call__", spy)
    with pytest.raises(InvalidInputError, match="prompt 1 has more than 4096 tokens; the model takes 512 in all"):
        engine.submit(Request("x" * 100_000))
    assert read == [4096]
    with pytest.raises(InvalidInputError, match="prompt 1 has 1003 tokens and asks"):  # nearer, and told exactly
        engine.submit(Request("x" * 1000, sampling=ASK))
