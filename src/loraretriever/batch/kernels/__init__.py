"""The rank-space product as GPU kernels, for decoding: the adapters' factors are read where they lie.

`gathered.py` imports Triton, which comes with PyTorch's CUDA builds; ask `available` before importing it.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

CAPABILITY = (8, 0)  # Triton supports GPUs from Ampere on


def available(device: torch.device) -> bool:
    """Whether the kernels can run on this device: a GPU that Triton supports, with Triton installed."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY
