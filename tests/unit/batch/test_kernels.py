"""The GPU kernels: right in Triton's interpreter, on a GPU if there is one, and compiled for GPUs without one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from loraretriever.batch import kernels

CHECKS = Path(__file__).with_name("kernel_checks.py")
has_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which has packages for Linux alone")
has_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# Whether kernels are interpreted is settled when a process first imports Triton, so that each way has its own.
@has_triton
@pytest.mark.slow
@pytest.mark.parametrize("interpret", ["1", pytest.param("0", marks=[pytest.mark.gpu, has_cuda])])
def test_the_kernels_are_right(interpret: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    if interpret == "1":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


COMPILE = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from loraretriever.batch.kernels import gathered

POINTERS = {"slots": "*i64", "weights": "*fp32", "h": "*fp32", "parameters": "*i1"}
TILES = {"ROWS": 16, "INPUTS": 256, "WIDTH": 4, "PARTS": 8, "RANKS": 16, "OUTPUTS": 128}
KERNELS = (gathered.shrink_kernel, gathered.expand_kernel)
# Sizes of one are constants to Triton, and multiples of 16 let it read 16 bytes at once.
CONSTANTS = ({}, {"tokens": 1, "width": 1, "rows": 1, "ranks": 1}, {"parameters": None})
for kernel, constants, architecture in itertools.product(KERNELS, CONSTANTS, (80, 90)):
    names = kernel.arg_names
    constants = {name: value for name, value in (constants | TILES).items() if name in names}
    signature = {name: POINTERS.get(name, "*bf16" if name in "xyab" else "i32") for name in names}
    signature |= {name: "constexpr" for name in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in (*constants, "width")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(kernel, signature, values, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    assert "ld.global.v4.b32" in compiled.asm["ptx"], "no reads of 16 bytes"
"""


@has_triton
@pytest.mark.slow
def test_the_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("device", "capability", "package", "expected"),
    [
        ("cuda", (9, 0), "triton", True),
        ("cuda", (8, 0), "triton", True),
        ("cuda", (7, 5), "triton", False),
        ("cuda", (9, 0), None, False),
        ("cpu", (9, 0), "triton", False),
    ],
)
def test_where_the_kernels_are_available(
    device: str, capability: tuple[int, int], package: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernels, "find_spec", lambda name: name if name == package else None)
    assert kernels.available(torch.device(device)) is expected
