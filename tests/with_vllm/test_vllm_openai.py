"""The tests of OpenAI's client, with vLLM as the engine."""

from __future__ import annotations

import pytest

from unit.server.conftest import Served
from unit.server.test_openai import *  # noqa: F403

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def served(gateway: Served) -> Served:
    return gateway
