"""What `test_kernels.py` runs in a process of its own: the kernels against the functions of `lora.py` and the formula.

On the CPU they run in Triton's interpreter, which the environment must ask for before Triton is first imported.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_helpers import ATTENTION, Library, check_rows, mixed_rows, tiny_model
from loraretriever.batch import LoraLayers, Routing, lora
from loraretriever.batch.kernels.gathered import KernelPath, expand, shrink
from loraretriever.batch.paths import GatheredPath
from loraretriever.batch.reference import merged_update
from loraretriever.types import LoraPair, Mixer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS = 5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Batch:
    """Random factors and inputs; of the rows, the second uses no slot and every other one averages parameters."""

    def __init__(
        self, members: int, rank: int, width: int, rows: int, features: int, out: int, tokens: int = 1, seed: int = 0
    ) -> None:
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=DEVICE)

        self.x = randn(rows, tokens, features)
        self.a = randn(SLOTS, members, rank, features) / features**0.5
        self.b = [randn(SLOTS, rank, out + 3 * g) / rank**0.5 for g in range(members)]
        self.y = [randn(rows, tokens, out + 3 * g) for g in range(members)]
        self.slots = torch.randint(SLOTS, (rows, width), generator=generator, device=DEVICE)
        self.weights = randn(rows, width)
        self.weights[self.weights < -0.8] = 0.0
        self.weights[1:2] = 0.0
        self.parameters = torch.arange(rows, device=DEVICE) % 2 == 0

    def to(self, dtype: torch.dtype) -> "Batch":
        self.x, self.a = self.x.to(dtype), self.a.to(dtype)
        self.b, self.y = [b.to(dtype) for b in self.b], [y.to(dtype) for y in self.y]
        return self

    def by_kernels(self, mixed: bool = True) -> list[torch.Tensor]:
        results = [y.clone() for y in self.y]
        h = shrink(self.x, self.a, self.slots, self.weights)
        for g, y in enumerate(results):
            expand(y, h, g, self.b[g], self.slots, self.weights, self.parameters if mixed else None)
        return results

    def by_functions(self, mixed: bool = True) -> list[torch.Tensor]:
        """The functions of `lora.py`, in float64."""
        results = [y.double() for y in self.y]
        slots, weights = self.slots.view(-1), self.weights.double()[:, None, :, None]
        h = lora.shrink_gathered(self.x.double(), self.a.double(), slots)
        h = lora.mix(h, weights, self.parameters.view(-1, 1, 1, 1) if mixed else None)
        for g, y in enumerate(results):
            lora.expand_gathered(y, h[g], self.b[g].double(), slots)
        return results


def check(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        tolerance = TOLERANCE[one.dtype]
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [  # members, rank, width, rows, features, out, tokens
        *((dtype, (2, 4, 3, 3, 70, 45)) for dtype in TOLERANCE),
        (torch.float32, (1, 1, 1, 1, 70, 45)),
        (torch.bfloat16, (3, 4, 3, 5, 64, 128)),
        (torch.float16, (1, 64, 1, 5, 100, 300)),
        (torch.bfloat16, (3, 64, 1, 1, 33, 130)),
        (torch.float32, (2, 12, 3, 2, 300, 17, 2)),
        (torch.float32, (1, 8, 16, 2, 1, 1)),
        (torch.float16, (1, 4, 1, 33, 48, 45)),
        (torch.bfloat16, (1, 4, 3, 2, 1100, 45)),  # two parts of the input
        (torch.float32, (2, 5, 1, 2, 4200, 45)),  # eight
    ],
    ids=str,
)
def test_the_kernels_equal_the_functions(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    batch = Batch(*sizes).to(dtype)
    check(batch.by_kernels(), batch.by_functions())


def test_many_rows_and_many_slots() -> None:
    batch = Batch(1, 8, 8, 33, 40, 20)
    batch.weights[4:, 1:6] = 0.0  # these cost the interpreter next to nothing
    check(batch.by_kernels(), batch.by_functions())


def test_without_rows_that_average_parameters() -> None:
    batch = Batch(2, 4, 3, 4, 70, 45)
    check(batch.by_kernels(mixed=False), batch.by_functions(mixed=False))


@pytest.mark.parametrize(("features", "parts"), [(1, 1), (1023, 1), (1024, 2), (2047, 2), (4096, 8), (20000, 8)])
def test_long_inputs_are_cut_into_parts(features: int, parts: int) -> None:
    batch = Batch(1, 2, 1, 1, features, 1)
    h = shrink(batch.x, batch.a, batch.slots, torch.ones_like(batch.weights))
    assert h.shape == (parts, 1, 2)
    expected = batch.a[batch.slots[0, 0], 0].double() @ batch.x[0, 0].double()
    torch.testing.assert_close(h.sum(dim=0)[0].double(), expected, rtol=1e-5, atol=1e-5)


@st.composite
def batches(draw: Any) -> Any:
    weight = st.floats(-1, 1).filter(lambda w: abs(w) > 0.01)
    row = st.dictionaries(st.integers(0, SLOTS - 1), weight, max_size=SLOTS)
    rows = draw(st.lists(row, min_size=1, max_size=3).filter(any))
    mixers = draw(st.lists(st.sampled_from(list(Mixer)), min_size=len(rows), max_size=len(rows)))
    return [list(r.items()) for r in rows], mixers


@settings(max_examples=10, deadline=None)
@given(batches(), st.integers(1, 2), st.integers(1, 2), st.integers(1, 5))
def test_the_path_equals_the_formula(drawn: Any, members: int, tokens: int, rank: int) -> None:
    pairs, mixers = drawn
    batch = Batch(members, rank, 1, len(pairs), 6, 4, tokens)
    flags = torch.tensor([mixer is Mixer.PARAMETERS for mixer in mixers], device=DEVICE)
    path = KernelPath(pairs, flags if flags.any() else None, torch.float32, DEVICE)
    h = path.hidden(batch.x, batch.a)
    for g, b in enumerate(batch.b):
        y = torch.zeros_like(batch.y[g])
        path.add(y, h, g, b)
        for n, row in enumerate(pairs):
            if not row:
                assert not y[n].any()
                continue
            factors = [LoraPair(batch.a[slot, g].cpu(), b[slot].t().cpu(), 1.0) for slot, _ in row]
            update = merged_update(factors, [w for _, w in row], mixers[n])
            expected = batch.x[n].cpu().double() @ update.t()
            torch.testing.assert_close(y[n].cpu().double(), expected, rtol=1e-4, atol=1e-4)


def test_slots_that_no_row_uses_cannot_leak() -> None:
    batch = Batch(2, 4, 3, 4, 70, 45)
    batch.weights[:, 1] = 0.0
    batch.slots[:, 0], batch.slots[:, 2] = 0, 1
    expected = batch.by_functions()
    batch.slots[:, 1] = 2  # named, but with weight zero
    for stack in (batch.a, *batch.b):
        stack[2:] = torch.nan
    found = batch.by_kernels()
    check(found, expected)
    for one, before in zip(found, batch.y, strict=True):
        assert torch.equal(one[1], before[1])  # a base row


def test_a_row_does_not_depend_on_its_batch() -> None:
    batch = Batch(2, 4, 3, 5, 1100, 45)
    together = batch.by_kernels()
    for n in range(5):
        alone = Batch(2, 4, 3, 1, 1100, 45)
        alone.a, alone.b = batch.a, batch.b
        alone.x, alone.y = batch.x[n : n + 1], [y[n : n + 1] for y in batch.y]
        alone.slots, alone.weights = batch.slots[n : n + 1], batch.weights[n : n + 1]
        alone.parameters = batch.parameters[n : n + 1]
        for one, other in zip(alone.by_kernels(), together, strict=True):
            assert torch.equal(one[0], other[n])


def replayable(call: Callable[[], list[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
    """The call as a CUDA graph, where there is CUDA."""
    if DEVICE.type != "cuda":
        return call
    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> list[torch.Tensor]:
        graph.replay()
        return results

    return replay


def test_replays_follow_the_contents_of_their_tensors() -> None:
    batch = Batch(2, 4, 3, 4, 70, 45)
    call = replayable(batch.by_kernels)
    check(call(), batch.by_functions())
    for seed in (1, 2):
        other = Batch(2, 4, 3, 4, 70, 45, seed=seed)
        for name in ("x", "a", "slots", "weights"):
            getattr(batch, name).copy_(getattr(other, name))
        batch.parameters.logical_not_()
        check(call(), batch.by_functions())


def test_gradients_are_refused() -> None:
    path = KernelPath([[(0, 1.0)]], None, torch.float32, DEVICE)
    x, a = torch.randn(1, 1, 4, device=DEVICE), torch.randn(1, 1, 2, 4, device=DEVICE)
    with pytest.raises(RuntimeError, match="no gradients"):
        path.hidden(x.requires_grad_(), a)
    with torch.no_grad():
        path.hidden(x, a)


def test_a_model_decodes_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []

    def path(self: Routing, tokens: int, dtype: torch.dtype, stack: object) -> GatheredPath:
        kinds.append(KernelPath if tokens == 1 else GatheredPath)
        return kinds[-1](self._pairs, self._parameters(), dtype, self._device)

    monkeypatch.setattr(Routing, "path", path)
    model = tiny_model(num_hidden_layers=1)
    library = Library(model)
    refs = [library.add(rank, ATTENTION) for rank in (1, 4, 8)]
    served = copy.deepcopy(model).to(DEVICE)
    layers = LoraLayers(served, 3, library.load)
    check_rows(served, layers, library, mixed_rows(refs, largest=2), model)
    assert KernelPath in kinds
