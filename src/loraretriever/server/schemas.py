"""What clients send: OpenAI's wire format, and the `lora` fields beside it.

A field that is not known is refused, so that a misspelt one is noticed. Fields of OpenAI's that would change the answer
in a way that is not there (tools, say) are refused as well; those that do not (user, metadata) are taken and ignored.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

MAX_NAMES = 256
Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Names = Annotated[list[Name], Field(max_length=MAX_NAMES)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it is not Unicode text ({error.reason}); send UTF-8 without lone surrogates") from error
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty; expected some text")
    return _encodable(text)


def _absent(value: Any) -> None:
    if value not in (None, [], {}, "none", False) and value != {"type": "text"}:
        raise ValueError("this is not supported here; leave it out")


def _ignored(_: Any) -> None:
    return None


Text = Annotated[str, AfterValidator(_encodable)]
Prompt = Annotated[str, AfterValidator(_not_blank)]
Unsupported = Annotated[None, BeforeValidator(_absent), Field(json_schema_extra={"deprecated": True})]
Ignored = Annotated[None, BeforeValidator(_ignored), Field(json_schema_extra={"deprecated": True})]


class Body(BaseModel):
    """A request's body."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RouteOptions(Body):
    """How adapters are found, for one request. What is left out is as the server is set."""

    k: Annotated[int, Field(ge=1, le=1000)] | None = Field(None, description="Adapters per prompt at most.")
    threshold: Finite | None = Field(None, description="Where the fit is lower, the base model answers.")
    exclude: Names = Field(default_factory=list, description="Adapters never to be found.")
    only: Names | None = Field(None, description="The only adapters that may be found.")
    tags: Names = Field(default_factory=list, description="Only adapters with all of these tags.")
    strategy: Name | None = Field(None, description="selection, mixture, fusion, a merge, a gate, or a plug-in's.")
    weighting: Name | None = Field(None, description="score or uniform.")
    explain: bool = Field(False, description="Say why: nearest samples, terms, parts of the score.")
    tenant: Name | None = Field(None, description="For operators: see what this tenant sees.")


class LoraOptions(RouteOptions):
    """The field `lora` of a request for an answer."""

    adapters: Annotated[dict[Name, Finite], Field(max_length=MAX_NAMES)] | Names | None = Field(
        None, description="No retrieval: these adapters, with weights, or names alone."
    )
    weights: Annotated[list[Finite], Field(max_length=MAX_NAMES)] | None = Field(
        None, description="Weights of `adapters`, where that is a list of names."
    )
    query: Prompt | None = Field(None, description="Retrieve by this text instead of the prompt.")


class StreamOptions(Body):
    """OpenAI's `stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False  # taken, and never done


class AnswerBody(Body):
    """What chat and plain completions have in common."""

    model: Name = Field("auto", description="auto, the base model, an adapter, or mixture(a=0.7,b=0.3).")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="0 or -1: off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]
        | None
    ) = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    ignore_eos: bool = Field(False, description="Go on to max_tokens after the model's end token: for measurements.")
    priority: Annotated[int, Field(ge=-1000, le=1000)] = Field(0, description="Lower ones go first; operators' only.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    lora: LoraOptions = Field(default_factory=lambda: LoraOptions.model_validate({}))
    user: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None

    @property
    def longest(self) -> int | None:
        """Tokens of the answer at most, where the client says so."""
        return self.max_tokens

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many log-probabilities beside each token's own; None: none at all."""


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """A turn of a conversation."""

    role: Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,32}$")]
    content: Text | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    name: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: Unsupported = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatBody(AnswerBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Unsupported = None
    tool_choice: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    response_format: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    modalities: Annotated[None, BeforeValidator(lambda value: _absent(None if value == ["text"] else value))] = None
    parallel_tool_calls: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @property
    def longest(self) -> int | None:
        """Tokens of the answer at most, where the client says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many log-probabilities beside each token's own; None: none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(AnswerBody):
    """POST /v1/completions."""

    prompt: (
        Prompt
        | Annotated[list[Prompt], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    echo: Unsupported = None
    suffix: Annotated[None, BeforeValidator(lambda value: _absent(value or None))] = None

    @property
    def alternatives(self) -> int | None:
        """How many log-probabilities beside each token's own; None: none at all."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each prompt by itself: text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(each, int) for each in self.prompt):
            return [tuple(self.prompt)]  # type: ignore[arg-type]
        return [each if isinstance(each, str) else tuple(each) for each in self.prompt]  # type: ignore[arg-type]


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    input: Prompt | Annotated[list[Prompt], Field(min_length=1)]
    model: Name = "auto"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Ignored = None

    @property
    def texts(self) -> list[str]:
        """Each text by itself."""
        return [self.input] if isinstance(self.input, str) else self.input


class RouteBody(RouteOptions):
    """POST /v1/route."""

    input: Prompt | Annotated[list[Prompt], Field(min_length=1)]
    map: bool = Field(False, description="Where each prompt lies on the map of /v1/map.")

    @property
    def texts(self) -> list[str]:
        """Each prompt by itself."""
        return [self.input] if isinstance(self.input, str) else self.input


def check_bias(bias: Mapping[str, float] | None) -> tuple[tuple[int, float], ...]:
    """OpenAI's `logit_bias`, whose keys are token ids as text.

    Raises:
        ValueError: a key is no number.
    """
    pairs = []
    for token, value in (bias or {}).items():
        if not token.isascii() or not token.isdigit() or not math.isfinite(value):
            raise ValueError(f"logit_bias has the key {token!r:.40}; expected the number of a token")
        pairs.append((int(token), value))
    return tuple(pairs)
