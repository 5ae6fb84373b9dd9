"""What travels between the steps: prompt -> retrieve -> compose -> batch -> generate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from loraretriever.errors import InvalidInputError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt that an adapter is meant for; a counter sample is one that it must not be chosen for.

    `source` says where it came from.
    """

    text: str
    source: str = "given"  # "given", "feedback", "model_card", "description" or "name"
    counter: bool = False


@dataclass(frozen=True, slots=True)
class Adapter:
    """One revision of a LoRA in the pool. `digest` is the SHA-256 of its content and names its folder."""

    name: str
    revision: int
    digest: str
    folder: Path
    base_model: str
    enabled: bool
    description: str
    tags: tuple[str, ...]
    source: str
    created: datetime
    ranks: tuple[int, ...]  # the distinct ranks of its modules, ascending
    targets: tuple[str, ...]  # the distinct last names of its modules, such as "q_proj"
    size: int  # bytes of the weights file
    samples: int  # counter samples aside
    tenant: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PoolEntry:
    """What retrieval reads of an enabled adapter. Vectors are None when not all samples are embedded.

    Without counter samples, `counter_vectors` has shape (0, dimension), or is None where `vectors` is.
    """

    name: str
    tags: tuple[str, ...]
    tenant: str | None
    base_model: str
    texts: tuple[str, ...]
    sources: tuple[str, ...]  # of the texts
    counter_texts: tuple[str, ...]
    vectors: NDArray[np.float32] | None  # (texts, dimension)
    counter_vectors: NDArray[np.float32] | None  # (counter texts, dimension)


@dataclass(frozen=True, slots=True)
class Feedback:
    """What a user says of a prompt: the adapter that is right for it, the one that is wrong, or both."""

    id: int
    prompt: str
    right: str | None
    wrong: str | None
    state: str  # "pending", "approved" or "rejected"
    created: datetime


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The two factors of one module: a (rank, in), b (out, rank); its update is `scaling * b @ a`."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """All factors of an adapter, keyed by module path in the base model ("model.layers.0.self_attn.q_proj")."""

    name: str
    digest: str
    modules: Mapping[str, LoraPair]


@dataclass(frozen=True, slots=True)
class BaseModelSpec:
    """What admission must know of a base model: (out, in) features of each linear module, by module path."""

    name: str
    linear: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Hit:
    """An adapter found for a prompt.

    `score` is the retriever's: a probability by default, a cosine for the paper's formula. `logit` is on the scale of
    a logarithm of a probability, up to a number that all hits of a prompt share: weights come from it. `distance` is
    the Euclidean one of the unit vectors of prompt and adapter, where the retriever has such: the paper's formula.
    `effect` is how much the adapter would move the model (`Engine.effects`), where a weighting asks for it.
    """

    adapter: str
    score: float
    logit: float = 0.0
    distance: float | None = None
    effect: float | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """What a retriever finds for one prompt: the best hits, best first, and how well the best adapter fits.

    A `fit` below `threshold` means that no adapter does. Both are on the scale of the retriever's scores: the
    probability that any adapter fits by default, the greatest cosine for the paper's formula.
    """

    hits: tuple[Hit, ...]
    fit: float
    threshold: float


@dataclass(frozen=True, slots=True)
class AdapterFilter:
    """Which adapters may be found: all of the conditions hold. The default lets all through.

    `only`: None, or the only names. `tags`: the adapter has all of them. `tenant`: it belongs to that tenant or to
    none.
    """

    exclude: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    tags: frozenset[str] = frozenset()
    tenant: str | None = None
    base_model: str | None = None


class Mixer(StrEnum):
    """How the chosen adapters act together on a row, with weights w and scalings s.

    OUTPUTS:    y += Σ_p w_p s_p B_p A_p x            (selection, mixture)
    PARAMETERS: y += (Σ_p w_p s_p B_p)(Σ_q w_q A_q) x (the paper's fusion: A and B averaged each)
    """

    OUTPUTS = "outputs"
    PARAMETERS = "parameters"


@dataclass(frozen=True, slots=True)
class Merge:
    """A merge of adapters in weight space into a new one: the method's name in `compose/merge.py` and its options.

    `density` is the share of entries that TIES and DARE keep; `rank` that of the result of a method that ends in a
    singular value decomposition (None: the largest of the adapters'); `seed` makes DARE's random choice.
    """

    method: str
    density: float = 0.5
    rank: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Gate:
    """A router that weighs a composition's adapters anew for every token, in every module (`batch/gates.py`).

    `kind` is its name there. `top_k` adapters at most act on a token (None: all). The gate's logits are divided by
    `temperature`. Gates that are trained are found by their kind among the engine's routers.
    """

    kind: str
    top_k: int | None = None
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Composition:
    """Which adapters answer one prompt, and how. No adapters: the base model answers.

    With `merge`, the adapters become one new adapter, and `mixer` plays no part. With `gate`, the weights are those
    before a token is seen: their logarithms are added to the gate's logits. Equal weights leave them as they are.
    """

    strategy: str
    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    mixer: Mixer = Mixer.OUTPUTS
    merge: Merge | None = None
    gate: Gate | None = None


BASE_COMPOSITION = Composition("base")


def _is_temperature(value: float) -> bool:
    return value == 0 or 1e-6 <= value < math.inf


def _is_bias(token: int, value: float) -> bool:
    return token >= 0 and not math.isnan(value)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; the other defaults are off.

    `repetition_penalty` divides positive logits of tokens of prompt and answer, and multiplies negative ones;
    `presence_penalty` and `frequency_penalty` are subtracted once, or as often as a token is in the answer.
    `logit_bias` holds (token id, what is added to its logit). `logprobs` asks for each token's log-probability and
    that many alternatives. `n` answers are made; answer i of a seeded request has the seed `seed + i`. `ignore_end`
    goes on after the model's end token, up to `max_tokens`: for measurements.

    Raises:
        InvalidInputError: a value is out of its range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    n: int = 1
    ignore_end: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        rules = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, _is_temperature(self.temperature), "0 (greedy), or from 1e-6"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 (off), or a whole number below 2**31"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "a whole number from 0, below 2**63"),
            ("stop", self.stop, all(self.stop), "strings that are not empty"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", self.presence_penalty, math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", self.frequency_penalty, math.isfinite(self.frequency_penalty), "a finite number"),
            ("logit_bias", self.logit_bias, all(_is_bias(*each) for each in self.logit_bias), "token ids and numbers"),
            ("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= 20, "from 0 to 20, or None"),
            ("n", self.n, 1 <= self.n <= 128, "from 1 to 128"),
        )
        for name, value, is_valid, expected in rules:
            if not is_valid:
                raise InvalidInputError(f"{name} is {value!r}; expected {expected}.")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role` is whatever the model's chat template knows: "user", "assistant", "system"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for the engine, with its composition. `chat` puts it into the model's chat template.

    With `messages`, the template renders them in place of `prompt`; with `tokens`, the model reads these ids as they
    are, and `chat` plays no part. Requests of a lower `priority` number go first. A request not done `timeout` seconds
    after its submission ends with what it has. What was computed of a prompt's beginning serves later requests of
    the same `namespace` only. `digests` are the revisions of the composition's adapters, where they were looked up
    before; without them the engine takes those of the moment of submission.
    """

    prompt: str
    composition: Composition = BASE_COMPOSITION
    sampling: Sampling = field(default_factory=Sampling)
    chat: bool = True
    priority: int = 0
    timeout: float | None = None
    messages: tuple[Message, ...] = ()
    tokens: tuple[int, ...] = ()
    namespace: str = ""
    digests: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            InvalidInputError: a value is out of its range.
        """
        if abs(self.priority) > 1000:
            raise InvalidInputError(f"the priority is {self.priority}; expected a number from -1000 to 1000.")
        if self.timeout is not None and not 0 <= self.timeout < math.inf:
            raise InvalidInputError(f"the timeout is {self.timeout}; expected seconds from 0, or None.")
        if self.messages and self.tokens:
            raise InvalidInputError(
                f"a request has {len(self.messages)} messages and {len(self.tokens)} token ids; expected only one of "
                "the two."
            )
        if self.digests and len(self.digests) != len(self.composition.adapters):
            raise InvalidInputError(
                f"a request has {len(self.digests)} digests; expected one for each of its composition's "
                f"{len(self.composition.adapters)} adapters, or none."
            )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that was chosen, its log-probability, and the most probable tokens at its place, best first.

    The log-probabilities are those of the model's distribution with penalties and bias, at temperature 1, before
    anything is cut off.
    """

    token: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer, as it is streamed. The last piece of each answer has a `finish_reason`."""

    text: str
    index: int = 0  # which of the request's n answers
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer to a request. Times are in seconds from the request's submission.

    `finish_reason` is "stop" (end token or stop string), "length", "timeout" or "aborted".
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float  # to its end
    index: int = 0  # which of the request's n answers
    first_token_seconds: float | None = None
    cached_tokens: int = 0  # tokens of the prompt that did not have to be computed
    logprobs: tuple[TokenLogprob, ...] = ()
    queue_seconds: float | None = None  # to its first step; None: it never ran


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine is doing, and what it has done since it was made.

    Counters only grow. `batch_sizes` says of how many steps had so many sequences: pairs of an upper bound and the
    steps above the bound before, ascending; larger steps are in `steps` only.
    """

    running: int  # sequences; each of a request's n answers is one
    waiting: int
    batch_size: int  # sequences that can run at once
    queue: int  # sequences that can wait
    slots: int  # adapters that can be on the device at once
    slots_used: int
    cache_tokens: int  # tokens that the memory of keys and values has room for
    cache_tokens_used: int  # of them, in pages that belong to running sequences
    host_bytes: int  # of adapters in host memory

    # Counters.
    steps: int = 0
    step_sequences: int = 0  # sum of the sequences of all steps
    batch_sizes: tuple[tuple[int, int], ...] = ()
    prompt_tokens: int = 0  # of prompts whose computation has ended
    cached_tokens: int = 0  # of them, those that did not have to be computed
    generated_tokens: int = 0
    preemptions: int = 0  # running sequences that had to give their room up
    adapter_hits: int = 0  # adapters of sequences that began to run, found on the device
    slot_loads: int = 0  # those that had to be copied to it from host memory
    adapter_loads: int = 0  # adapters read from disk, or merged, into host memory
    adapter_evictions: int = 0  # adapters that left host memory for others


@dataclass(frozen=True, slots=True)
class Route:
    """What retrieval says of one prompt: the ranked hits, and whether none fits (fit < threshold)."""

    prompt: str
    hits: tuple[Hit, ...]
    fallback: bool
    fit: float = 1.0
    threshold: float = 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt, with all that led to it."""

    prompt: str
    text: str
    hits: tuple[Hit, ...]
    fallback: bool
    composition: Composition
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    retrieval_seconds: float
    generation_seconds: float
    fit: float = 1.0
    threshold: float = 0.0
    index: int = 0  # which of the prompt's n answers
    first_token_seconds: float | None = None
    cached_tokens: int = 0  # tokens of the prompt that did not have to be computed
    logprobs: tuple[TokenLogprob, ...] = ()
