"""/v1/feedback: clients say which adapter was right or wrong for a prompt; operators decide what the pool learns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import Field

from loraretriever.server import auth
from loraretriever.server.auth import Caller, require, require_operator
from loraretriever.server.schemas import Body, Name, Prompt
from loraretriever.server.state import State
from loraretriever.server.targets import Names
from loraretriever.types import Feedback

router = APIRouter(tags=["retrieval"])
FeedbackState = Literal["pending", "approved", "rejected", "all"]


class FeedbackBody(Body):
    """POST /v1/feedback: at least one of `right` and `wrong`."""

    prompt: Prompt
    right: Name | None = Field(None, description="The adapter that is right for the prompt.")
    wrong: Name | None = Field(None, description="An adapter that is wrong for it.")


class DecisionBody(Body):
    """POST /v1/feedback/decisions."""

    ids: Annotated[list[Annotated[int, Field(ge=1, lt=2**63)]], Field(min_length=1, max_length=1000)]
    decision: Literal["approve", "reject"]


@router.post("/v1/feedback", status_code=201)
async def give(
    body: FeedbackBody, state: State, caller: Annotated[Caller, Depends(require("route", "generate"))]
) -> dict[str, Any]:
    """Say which adapter was right for a prompt, or wrong. It has no effect until an operator approves it."""
    await state.run(auth.admit, state, caller)
    names = Names(state, caller)

    def store() -> Feedback:
        right, wrong = (name and names.adapter(name, "right").name for name in (body.right, body.wrong))
        return state.retriever.pool.give_feedback(body.prompt, right, wrong)

    given = _feedback_json(await state.run(store), names)
    return given if caller.is_operator else {**given, "id": None}  # it would tell how much feedback others give


@router.get("/v1/feedback", dependencies=[Depends(require_operator)])
async def listed(state: State, wanted: Annotated[FeedbackState, Query(alias="state")] = "pending") -> dict[str, Any]:
    """Feedback in a state, oldest first."""
    found = await state.run(state.retriever.pool.feedback, None if wanted == "all" else wanted)
    return {"object": "list", "data": [_feedback_json(each, None) for each in found]}


@router.post("/v1/feedback/decisions", dependencies=[Depends(require_operator)])
async def decide(body: DecisionBody, state: State) -> dict[str, Any]:
    """Approve feedback, whose prompts become samples and counter samples of the adapters, or put it aside."""
    pool = state.retriever.pool
    done = await state.run(pool.approve_feedback if body.decision == "approve" else pool.reject_feedback, body.ids)
    return {"object": "list", "data": [_feedback_json(each, None) for each in done]}


def _feedback_json(feedback: Feedback, names: Names | None) -> dict[str, Any]:
    def public(name: str | None) -> str | None:
        return name if name is None or names is None else names.public(name)

    return {
        "object": "feedback",
        "id": feedback.id,
        "prompt": feedback.prompt,
        "right": public(feedback.right),
        "wrong": public(feedback.wrong),
        "state": feedback.state,
        "created": int(feedback.created.timestamp()),
    }
