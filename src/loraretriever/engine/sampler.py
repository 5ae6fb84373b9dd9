"""Choosing the next token of every row of a batch at once, each row under its own settings.

A row's token must not depend on the rows beside it, but floating-point sums do: their order changes with the batch's
shape. Probabilities are therefore whole numbers here, `floor(2**40 p / max p)`, whose sums are exact in any order. A
token less than 2**-40 times as probable as the best one counts as impossible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from loraretriever.errors import InvalidInputError
from loraretriever.types import Sampling

_BITS = 40  # of the largest weight: the sum over 2**23 tokens still fits 63 bits
_NARROW = 128  # tokens ranked at first; the rows whose cut lies further down are sorted whole
_BLOCK = 32  # tokens whose largest logit stands for them when the best are looked for
_TOGETHER = 8  # rows that draw at once on a CPU: memory for more of them is taken anew from the system at each call
_FINITE = torch.finfo(torch.float32)


class SamplingRow(Protocol):
    """What the sampler reads of a row. While a row is in the batch, its lists of ids only grow at their ends."""

    sampling: Sampling
    prompt_ids: list[int]
    output_ids: list[int]
    generator: torch.Generator | None


@dataclass(frozen=True, slots=True)
class Sampled:
    """A row's next token. Where the row asks for log-probabilities: its own, and the best tokens with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def make_generator(sampling: Sampling, index: int) -> torch.Generator | None:
    """The source of chance of answer `index` of a request: None if greedy, of a random seed without a seed."""
    if sampling.temperature == 0:
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed((sampling.seed + index) % 2**63)
    return generator


def check_sampling(sampling: Sampling, vocabulary: int) -> None:
    """Refuse settings that do not fit the model; for the moment when a request comes in.

    Raises:
        InvalidInputError: `logit_bias` names a token that the model does not have.
    """
    for token, _ in sampling.logit_bias:
        if token >= vocabulary:
            raise InvalidInputError(
                f"logit_bias names the token {token}; expected ids below {vocabulary}, the size of the model's "
                "vocabulary. Take the ids from the model's own tokenizer."
            )


class Sampler:
    """Chooses tokens for a batch whose rows join and leave; what it makes of their settings lasts while they stay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._plan: _Plan | None = None

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
        """The next token of each row; takes one number from the generator of each row that is not greedy.

        A row's result depends on its own logits, settings, ids and generator alone. A logit that is NaN counts as
        -inf; where all are -inf, the token is 0, with the log-probability -inf.

        Shape: logits (rows, vocabulary), of any floating-point type.
        Semantics: x = logits + bias; x = x / repetition where x > 0, else x * repetition, for tokens of prompt and
        answer; x = x - presence [in the answer] - frequency * (times in the answer). Greedy: argmax x. Else a draw
        from softmax(x / temperature), cut by top-k, then top-p, then min-p. Log-probabilities: log softmax(x).
        """
        if self._plan is None or not self._plan.holds(rows, logits.shape[-1]):
            self._plan = _make_plan(rows, logits.shape[-1], self._device)
        plan, tokens, table = self._plan, [], None
        if plan.plain is not None:
            tokens.append(_greedy(plan.plain.of(logits)))
        if plan.treated is not None:
            edited = plan.edit(plan.treated.of(logits).to(torch.float32, copy=True))
            tokens.append(_choose(edited, plan))
            if plan.reported is not None:
                table = _report(plan.reported.of(edited), plan.reported.of(tokens[-1]), max(plan.tops))
        return plan.results(logits, tokens, table)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some of the rows of a tensor; no index is made for all of them."""

    places: tuple[int, ...]
    index: Tensor | None

    def of(self, values: Tensor) -> Tensor:
        return values if self.index is None else values.index_select(0, self.index)

    def put(self, values: Tensor, new: Tensor) -> Tensor:
        return new if self.index is None else values.index_copy_(0, self.index, new)


def _rows(wanted: Sequence[bool], device: torch.device) -> _Rows | None:
    """The rows that are wanted, or None if none is."""
    places = tuple(place for place, is_wanted in enumerate(wanted) if is_wanted)
    if not places:
        return None
    return _Rows(places, None if all(wanted) else torch.tensor(places, device=device))


@dataclass(frozen=True, slots=True)
class Limits:
    """Settings of the rows that draw, as columns (rows, 1). `top_k` is the vocabulary's size where it is off."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    floor: Tensor | None  # the least weight that min-p lets through; None: off in all rows
    cut: _Rows | None  # the rows with top-k or top-p

    def select(self, rows: _Rows) -> Limits:
        """The same for these rows, all of them with top-k or top-p, without min-p."""
        return Limits(rows.of(self.temperature), rows.of(self.top_k), rows.of(self.top_p), None, None)


def _column(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    # Settings too large for a float32 become its largest number: infinity times 0 would be NaN.
    finite = [min(max(value, _FINITE.min), _FINITE.max) for value in values]
    return torch.tensor(finite, dtype=dtype, device=device)[:, None]


def make_limits(samplings: Sequence[Sampling], vocabulary: int, device: torch.device) -> Limits:
    """The settings of rows that are not greedy as tensors."""
    top_k = [min(each.top_k or vocabulary, vocabulary) for each in samplings]
    floors = [math.ceil(each.min_p * 2**_BITS) for each in samplings]
    return Limits(
        _column([each.temperature for each in samplings], device),
        _column(top_k, device, torch.int64),
        _column([each.top_p for each in samplings], device, torch.float64),
        _column(floors, device, torch.int64) if any(floors) else None,
        _rows([each.top_p < 1 or k < vocabulary for each, k in zip(samplings, top_k, strict=True)], device),
    )


class _Penalties:
    """Which tokens the penalised rows have had. Kept from call to call: only new tokens are added."""

    def __init__(self, rows: Sequence[SamplingRow], places: _Rows, vocabulary: int, device: torch.device) -> None:
        self._of, self._device = [rows[place] for place in places.places], device
        self._place = torch.tensor(places.places, device=device)
        settings = [row.sampling for row in self._of]
        columns = (
            [each.repetition_penalty for each in settings],
            [each.presence_penalty for each in settings],
            [each.frequency_penalty for each in settings],
        )
        self._settings = torch.cat([_column(column, device) for column in columns], dim=1)
        self._rows, self._tokens = self._pairs([row.prompt_ids for row in self._of])
        self._counts = torch.zeros(len(settings), vocabulary, device=device)
        self._counted = [0] * len(settings)

    def _pairs(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        lengths = torch.tensor([len(each) for each in ids])
        tokens = torch.tensor(list(chain.from_iterable(ids)), dtype=torch.int64)
        rows = torch.arange(len(ids)).repeat_interleave(lengths)
        return torch.stack((rows, tokens)).to(self._device).unbind()

    def apply(self, logits: Tensor) -> None:
        """Shape: logits (treated rows, vocabulary), changed in place."""
        new = self._pairs([row.output_ids[start:] for row, start in zip(self._of, self._counted, strict=True)])
        self._counted = [len(row.output_ids) for row in self._of]
        self._counts.index_put_(new, torch.ones((), device=self._device), accumulate=True)
        self._rows, self._tokens = torch.cat((self._rows, new[0])), torch.cat((self._tokens, new[1]))
        repetition, presence, frequency = self._settings[self._rows].unbind(dim=1)
        x, counts = logits[self._place[self._rows], self._tokens], self._counts[self._rows, self._tokens]
        x = torch.where(x > 0, x / repetition, x * repetition)
        # A token that came more than once is written as often, each time with the same value.
        x = x - presence * (counts > 0) - frequency * counts
        logits.index_put_((self._place[self._rows], self._tokens), x)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Rows that draw their tokens together."""

    places: _Rows
    rows: tuple[SamplingRow, ...]
    limits: Limits


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a batch is treated. Rows of `plain` need an argmax only; all other groups are rows among the treated."""

    rows: tuple[SamplingRow, ...]
    vocabulary: int
    plain: _Rows | None
    treated: _Rows | None
    bias: tuple[Tensor, Tensor, Tensor] | None  # rows, tokens, what is added
    penalties: _Penalties | None
    greedy: _Rows | None
    drawn: tuple[_Drawn, ...]
    reported: _Rows | None  # those with log-probabilities
    tops: tuple[int, ...]  # how many best tokens each of them asks for

    def holds(self, rows: Sequence[SamplingRow], vocabulary: int) -> bool:
        """Whether the plan was made for exactly these rows."""
        same = len(rows) == len(self.rows) and vocabulary == self.vocabulary
        return same and all(one is other for one, other in zip(rows, self.rows, strict=True))

    def edit(self, logits: Tensor) -> Tensor:
        """The treated rows' logits with bias and penalties, without NaN and +inf."""
        if self.bias is not None:
            rows, tokens, values = self.bias
            logits.index_put_((rows, tokens), values, accumulate=True)
        if self.penalties is not None:
            self.penalties.apply(logits)
        return logits.nan_to_num_(nan=-math.inf, posinf=_FINITE.max, neginf=-math.inf)

    def results(self, logits: Tensor, tokens: list[Tensor], table: Tensor | None) -> list[Sampled]:
        """Bring all to the host in one transfer: tokens of the plain and of the treated, and what was reported."""
        groups = [group.places for group in (self.plain, self.treated) if group is not None]
        places = [place for group in groups for place in group]
        if table is None:
            found, reports = torch.cat(tokens).tolist() if tokens else [], []
        else:
            flat = torch.cat([*(each.double() for each in tokens), table.flatten()]).tolist()
            found, width = [int(token) for token in flat[: len(places)]], table.shape[1]
            reports = [flat[start : start + width] for start in range(len(places), len(flat), width)]
        sampled = {place: Sampled(token) for place, token in zip(places, found, strict=True)}
        for place in (place for place, each in sampled.items() if each.token < 0):
            sampled[place] = Sampled(int(logits[place].nan_to_num(nan=-math.inf, neginf=-math.inf).argmax()))
        if self.treated is not None and self.reported is not None:
            for row, top, report in zip(self.reported.places, self.tops, reports, strict=True):
                place, half = self.treated.places[row], len(report) // 2
                best = zip(map(int, report[1 : half + 1]), report[half + 1 :], strict=True)
                sampled[place] = Sampled(sampled[place].token, report[0], tuple(best)[:top])
        return [sampled[place] for place in range(len(self.rows))]


def _is_penalised(sampling: Sampling) -> bool:
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    return penalties != (1.0, 0.0, 0.0)


def _is_plain(sampling: Sampling) -> bool:
    edited = sampling.logit_bias or _is_penalised(sampling)
    return sampling.temperature == 0 and sampling.logprobs is None and not edited


def _make_plan(rows: Sequence[SamplingRow], vocabulary: int, device: torch.device) -> _Plan:
    treated = [row for row in rows if not _is_plain(row.sampling)]
    settings = [row.sampling for row in treated]
    penalised = _rows([_is_penalised(each) for each in settings], device)
    return _Plan(
        rows=tuple(rows),
        vocabulary=vocabulary,
        plain=_rows([_is_plain(row.sampling) for row in rows], device),
        treated=_rows([not _is_plain(row.sampling) for row in rows], device),
        bias=_make_bias(settings, device),
        penalties=None if penalised is None else _Penalties(treated, penalised, vocabulary, device),
        greedy=_rows([each.temperature == 0 for each in settings], device),
        drawn=tuple(_make_drawn(treated, vocabulary, device)),
        reported=_rows([each.logprobs is not None for each in settings], device),
        tops=tuple(each.logprobs for each in settings if each.logprobs is not None),
    )


def _make_drawn(treated: Sequence[SamplingRow], vocabulary: int, device: torch.device) -> Iterator[_Drawn]:
    drawn = [place for place, row in enumerate(treated) if row.sampling.temperature > 0]
    size = _TOGETHER if device.type == "cpu" else max(len(drawn), 1)
    for start in range(0, len(drawn), size):
        group = drawn[start : start + size]
        places, rows = _rows([place in group for place in range(len(treated))], device), [treated[at] for at in group]
        if places is not None:
            yield _Drawn(places, tuple(rows), make_limits([row.sampling for row in rows], vocabulary, device))


def _make_bias(settings: Sequence[Sampling], device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
    # Summed here where a token is named twice: the order in which a device would add them is not fixed.
    sums: dict[tuple[int, int], float] = {}
    for row, each in enumerate(settings):
        for token, value in each.logit_bias:
            sums[row, token] = sums.get((row, token), 0.0) + value
    if not sums:
        return None
    rows, tokens = torch.tensor(list(sums), device=device).unbind(1)
    return rows, tokens, torch.tensor(list(sums.values()), device=device)


def _greedy(logits: Tensor) -> Tensor:
    """The argmax of each row, -1 where it is NaN: the rare row is looked at again on the host."""
    tokens = logits.argmax(dim=-1, keepdim=True)
    return tokens.masked_fill(logits.gather(1, tokens).isnan(), -1).squeeze(1)


def _choose(logits: Tensor, plan: _Plan) -> Tensor:
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if plan.greedy is not None:
        tokens = plan.greedy.put(tokens, plan.greedy.of(logits).argmax(dim=-1))
    for group in plan.drawn:
        points = [torch.rand(1, generator=row.generator, dtype=torch.float64) for row in group.rows]
        weights = draw_weights(group.places.of(logits), group.limits)
        drawn = _draw(weights, torch.stack(points).to(logits.device, non_blocking=True))
        tokens = group.places.put(tokens, drawn)
    return tokens


def _draw(weights: Tensor, points: Tensor) -> Tensor:
    """The first token, in the order of ids, at which the sum of weights exceeds floor(point * total); 0 without any.

    Shape: weights (rows, vocabulary), points (rows, 1) in [0, 1) -> (rows,).
    """
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    aim = torch.minimum((points * total).long(), total - 1)
    return torch.searchsorted(cumulative, aim, right=True).squeeze(1)


def _weights(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Semantics: floor(2**40 exp((logits - max logits) / temperature)); 0 where no logit of the row is finite."""
    peak = logits.amax(dim=-1, keepdim=True).clamp(min=_FINITE.min)
    return (logits - peak).div_(temperature).exp_().mul_(2.0**_BITS).long()


def draw_weights(logits: Tensor, limits: Limits) -> Tensor:
    """Whole numbers in proportion to the probabilities with which tokens are drawn.

    Of equally probable tokens, top-k and top-p keep those with the lowest ids; min-p treats them alike.

    Shape: logits float32 (rows, vocabulary) without NaN and +inf -> int64 (rows, vocabulary).
    Semantics: softmax(logits / temperature); then its top_k best tokens; then the least number of best tokens whose
    share of those reaches top_p; then those at least min_p times as probable as the best.
    """
    weights = _weights(logits, limits.temperature)
    if limits.cut is not None:
        rows = limits.cut
        weights = rows.put(weights, _cut(rows.of(logits), rows.of(weights), limits.select(rows)))
    return weights if limits.floor is None else weights.mul_(weights >= limits.floor)


@dataclass(frozen=True, slots=True)
class _Border:
    """Where the best tokens of each row end, as columns: the least logit among them, how many of that logit stay."""

    least: Tensor
    stay: Tensor
    tied: Tensor  # whether some of that logit must go
    known: Tensor  # whether the ranks that were looked at were enough to say all this


def _cut(logits: Tensor, weights: Tensor, limits: Limits) -> Tensor:
    """The weights, 0 beyond top-k and top-p, changed in place. Only logits are ranked, so that ties do no harm."""
    totals, vocabulary = weights.sum(dim=-1, keepdim=True), logits.shape[1]
    border = _border(logits.gather(1, _best(logits, min(_NARROW, vocabulary))), totals, limits, vocabulary)
    least, stay = border.least, border.stay
    known, tied = torch.cat((border.known, border.tied), dim=1).T.tolist()
    wide = _rows([not each for each in known], logits.device)
    if wide is not None:
        border = _border(_descending(wide.of(logits)), wide.of(totals), limits.select(wide), vocabulary)
        least, stay = wide.put(least, border.least), wide.put(stay, border.stay)
        for place, (is_tied,) in zip(wide.places, border.tied.tolist(), strict=True):
            tied[place] = is_tied
    weights.mul_(logits >= least)  # here and below a product: a masked fill takes several times as long
    rows = _rows(tied, logits.device)
    if rows is None:
        return weights
    equal = rows.of(logits) == rows.of(least)
    stays = ~equal | (equal.cumsum(dim=-1) <= rows.of(stay))
    return rows.put(weights, rows.of(weights).mul_(stays))


def _border(ranked: Tensor, totals: Tensor, limits: Limits, vocabulary: int) -> _Border:
    """Shape: ranked (rows, ranks): each row's largest logits in descending order."""
    weights = _weights(ranked, limits.temperature)
    cumulative, ranks = weights.cumsum(dim=-1), ranked.shape[1]
    of_top_k = cumulative.gather(1, (limits.top_k - 1).clamp(max=ranks - 1))
    share = limits.top_p * torch.where(limits.top_k < vocabulary, of_top_k, totals)
    # A token is kept while the sum before it is below the share: one more than have a sum below it themselves.
    in_top_p = torch.searchsorted(cumulative, share.ceil().long()) + 1
    kept = torch.minimum(in_top_p, limits.top_k).clamp(max=ranks)
    least = ranked.gather(1, kept - 1)
    ascending = -ranked
    above = torch.searchsorted(ascending, -least)
    through = torch.searchsorted(ascending, -least, right=True)
    # Logits equal to the last ranked one may go on behind it, and so may what is kept.
    known = (through < ranks) & ((limits.top_k <= ranks) | (limits.top_k == vocabulary))
    return _Border(least, kept - above, through > kept, known | (ranks == vocabulary))


def _descending(logits: Tensor) -> Tensor:
    if logits.device.type == "cpu":  # NumPy sorts without carrying an index along: ten times as fast
        return torch.from_numpy(np.sort(logits.numpy())).flip(-1)
    return logits.sort(dim=-1, descending=True).values


def _best(logits: Tensor, count: int) -> Tensor:
    """The ids of the largest logits, in descending order, equal ones in the order of ids.

    The best tokens lie in the blocks that have the best tokens, so that few others have to be ranked.

    Shape: logits (rows, vocabulary) -> (rows, count).
    """
    if count * _BLOCK >= logits.shape[1]:
        return _first(logits, count)
    padded = pad(logits, (0, -logits.shape[1] % _BLOCK), value=-math.inf)
    blocks = padded.view(len(logits), -1, _BLOCK)
    chosen = _first(blocks.amax(dim=-1), count).sort(dim=-1).values
    ids = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(1)
    return ids.gather(1, _first(padded.gather(1, ids), count))


def _first(values: Tensor, count: int) -> Tensor:
    """The places of the largest values, the first of equals first, by whole numbers that are never equal."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the floats' order, as whole numbers
    backwards = torch.arange(values.shape[1] - 1, -1, -1, device=values.device)
    return ((ascending.long() << 32) | backwards).topk(count).indices


def _report(logits: Tensor, tokens: Tensor, top: int) -> Tensor:
    """Log-probabilities at temperature 1, as columns: the token's, then the best tokens' ids, then theirs.

    Shape: logits (rows, vocabulary), tokens (rows,) -> float64 (rows, 1 + 2 * top).
    """
    best = _best(logits, min(top, logits.shape[1])) if top else tokens.new_empty(len(tokens), 0)
    peak = logits.amax(dim=-1, keepdim=True).clamp(min=_FINITE.min)
    sums = _weights(logits, 1.0).sum(dim=-1, keepdim=True).clamp(min=1)
    norm = sums.double().log() - _BITS * math.log(2)
    logprobs = logits.gather(1, torch.cat((tokens[:, None], best), dim=1)).double() - peak - norm
    return torch.cat((logprobs[:, :1], best.double(), logprobs[:, 1:]), dim=1)
