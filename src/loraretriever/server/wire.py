"""Parts of answers in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraretriever.retrieve import Explanation
from loraretriever.types import TokenLogprob

if TYPE_CHECKING:
    from loraretriever.server.targets import Names

# What OpenAI's clients know. The answer to a request that ran out of time is cut off, as by its length; `lora` says so.
FINISH_REASONS = {"stop": "stop", "length": "length", "timeout": "length"}
DONE = b"data: [DONE]\n\n"


def dump(value: object) -> str:
    """JSON, as short as it can be."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def event(value: object) -> bytes:
    """A server-sent event."""
    return f"data: {dump(value)}\n\n".encode()


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Log-probabilities in the form of chat completions."""
    return {
        "content": [
            {**_chat_logprob(each), "top_logprobs": [_chat_logprob(other) for other in each.top]} for each in logprobs
        ],
        "refusal": None,
    }


def _chat_logprob(logprob: TokenLogprob) -> dict[str, Any]:
    return {"token": logprob.text, "logprob": logprob.logprob, "bytes": list(logprob.text.encode())}


def plain_logprobs(logprobs: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any]:
    """Log-probabilities in the form of plain completions; `offset`: characters of the answer before them."""
    offsets = []
    for each in logprobs:
        offsets.append(offset)
        offset += len(each.text)
    return {
        "tokens": [each.text for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [{other.text: other.logprob for other in each.top} for each in logprobs],
        "text_offset": offsets,
    }


def explanation_json(why: Explanation, names: Names) -> list[dict[str, Any]]:
    """Why each adapter was found, in the caller's names."""
    return [
        {
            "adapter": names.public(hit.adapter),
            "probability": hit.probability,
            "dense": hit.dense,
            "sparse": hit.sparse,
            "penalty": hit.penalty,
            "samples": [{"text": sample.text, "cosine": sample.cosine} for sample in hit.samples],
            "terms": [{"term": term.term, "part": term.part} for term in hit.terms],
        }
        for hit in why.hits
    ]
