import pytest
import torch

from loraretriever.compose.spectral import FORMS, spectral_digest, spectral_form
from loraretriever.errors import InvalidInputError
from loraretriever.types import AdapterWeights, LoraPair


def adapter(rank: int, features: int = 12, out: int = 9, scaling: float = 2.0) -> AdapterWeights:
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, features, generator=generator)
    return AdapterWeights("x", "d", {"m": LoraPair(a, torch.randn(out, rank, generator=generator), scaling)})


def update(pair: LoraPair) -> torch.Tensor:
    return pair.scaling * pair.b.double() @ pair.a.double()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 4, 9, 20])
def test_the_update_stays_and_its_factors_are_its_decomposition(rank: int, form: str) -> None:
    given = adapter(rank)
    expected = update(given.modules["m"])
    values = torch.linalg.svdvals(expected)[: min(rank, 9)]
    made = spectral_form(given, form)
    pair = made.modules["m"]
    assert (made.name, made.digest) == ("x", spectral_digest("d", form))
    assert pair.a.shape == (min(rank, 9), 12) and pair.b.shape == (9, min(rank, 9))
    torch.testing.assert_close(update(pair), expected, rtol=1e-4, atol=1e-5)
    norms = pair.a.double().norm(dim=1), pair.b.double().norm(dim=0)
    ones = torch.ones_like(values)
    for found, wanted in zip(norms, (ones, values) if form == "unit" else (values, ones), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    rows = torch.nn.functional.normalize(pair.a.double())
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-5)
    first = torch.linalg.svd(expected).Vh[0]
    assert abs(float(rows[0] @ first)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_directions_without_an_update_are_zero(form: str) -> None:
    given = adapter(4)
    given.modules["m"].b.zero_()
    assert not any(factor.any() for factor in (spectral_form(given, form).modules["m"].a,))
    lower = adapter(4)
    lower.modules["m"].b[:, 2:] = 0  # an update of rank 2
    pair = spectral_form(lower, form).modules["m"]
    assert pair.a[:2].any(dim=1).all() and not pair.a[2:].any() and not pair.b[:, 2:].any()
    torch.testing.assert_close(update(pair), update(lower.modules["m"]), rtol=1e-4, atol=1e-5)


def test_half_precision_is_decomposed_in_float32() -> None:
    given = adapter(4)
    halved = AdapterWeights(
        "x", "d", {"m": LoraPair(given.modules["m"].a.bfloat16(), given.modules["m"].b.bfloat16(), 2.0)}
    )
    pair = spectral_form(halved, "unit").modules["m"]
    assert pair.a.dtype == pair.b.dtype == torch.float32
    torch.testing.assert_close(update(pair), update(halved.modules["m"]), rtol=1e-4, atol=1e-5)


def test_digests_differ_by_adapter_and_form() -> None:
    assert len({spectral_digest(digest, form) for digest in ("a", "b") for form in FORMS} | {"a", "b"}) == 6


def test_numbers_that_are_not_finite_are_refused() -> None:
    given = adapter(4)
    given.modules["m"].a[0, 0] = torch.nan
    with pytest.raises(InvalidInputError, match=r"'x' has NaN or infinite numbers in m"):
        spectral_form(given, "unit")
