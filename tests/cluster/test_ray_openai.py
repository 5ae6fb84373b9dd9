"""The server's tests with OpenAI's client, against the application on Ray."""

from __future__ import annotations

import pytest

from unit.server.test_openai import *  # noqa: F403

pytestmark = pytest.mark.ray
