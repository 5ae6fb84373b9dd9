"""The equality tests of tests/unit/batch on a CUDA device, against the same references on the CPU."""

import copy

import pytest
import torch

from batch_helpers import FAMILIES, Library, OnePath, check_rows, mixed_rows, tiny_model
from loraretriever.batch import LoraLayers, routing
from loraretriever.batch.kernels import available

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("path", ["dense", "gathered", "grouped", "split", "kernels"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06), (torch.float16, 0.01)])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_rows_on_cuda(
    family: str, dtype: torch.dtype, tolerance: float, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "kernels" and not available(torch.device("cuda")):
        pytest.skip("needs Triton and a GPU that it supports")
    monkeypatch.setattr(routing, "cost_model", lambda device, dtype: OnePath(path))
    model = tiny_model(family)
    library = Library(model)
    refs = [library.add(rank, FAMILIES[family]) for rank in (1, 8, 64)]
    served = copy.deepcopy(model).to("cuda", dtype)
    layers = LoraLayers(served, 3, library.load)
    check_rows(served, layers, library, mixed_rows(refs), model, tolerance)
