"""POST /v1/embeddings: the vectors that retrieval works with."""

from __future__ import annotations

import base64
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends

from loraretriever.server import auth, observe
from loraretriever.server.auth import Caller, require
from loraretriever.server.errors import ApiError
from loraretriever.server.schemas import EmbeddingBody
from loraretriever.server.state import State
from loraretriever.server.targets import AUTO

router = APIRouter(tags=["retrieval"])


@router.post("/v1/embeddings")
async def embeddings(
    body: EmbeddingBody,
    state: State,
    caller: Annotated[Caller, Depends(require("route"))],
) -> dict[str, Any]:
    """Unit vectors of texts, by the pool's sentence encoder."""
    observe.current().asked("embeddings", body.model)
    state.check_serving()
    await state.run(auth.admit, state, caller)
    if len(body.texts) > state.settings.max_prompts:
        message = f"input has {len(body.texts)} texts; expected at most {state.settings.max_prompts}."
        raise ApiError(400, message, param="input")
    retriever = state.retriever
    name = await state.run(lambda: retriever.embedding_model)
    if body.model not in (AUTO, name):
        message = f"model {body.model!r:.200} makes no embeddings here; expected {name!r} or 'auto'."
        raise ApiError(404, message, code="model_not_found", param="model")
    vectors = await state.run(retriever.encode, body.texts, caller.view)
    tokens = await state.run(retriever.count_tokens, body.texts)
    size = vectors.shape[1]
    if body.dimensions is not None and body.dimensions != size:
        raise ApiError(400, f"dimensions is {body.dimensions}; this encoder gives {size}.", param="dimensions")
    rows = [_form(row, body.encoding_format) for row in vectors.astype("<f4")]
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "model": name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _form(row: np.ndarray[Any, Any], encoding: str) -> str | list[float]:
    return base64.b64encode(row.tobytes()).decode() if encoding == "base64" else row.tolist()
