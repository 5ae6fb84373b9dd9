from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from loraretriever.errors import InvalidInputError, LoraRetrieverError
from loraretriever.server.sockets import is_loopback, listen, resolve_address


def test_a_port_in_use_is_named() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(LoraRetrieverError, match=f"cannot listen at 127.0.0.1 port {port}.*--port"):
            listen("127.0.0.1", port)


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(InvalidInputError, match="'256.1.1.1' is not known"):
        listen("256.1.1.1", 0)


@pytest.mark.parametrize(
    ("host", "address", "loopback"),
    [
        ("localhost", "127.0.0.1", True),
        ("127.8.8.8", "127.8.8.8", True),
        ("::1", "::1", True),
        ("[::1]", "::1", True),
        ("0.0.0.0", "0.0.0.0", False),
        ("::", "::", False),
        ("192.0.2.7", "192.0.2.7", False),
    ],
)
def test_addresses(host: str, address: str, loopback: bool) -> None:
    _, (found, port) = resolve_address(host, 8000)
    assert (found, port, is_loopback(found)) == (address, 8000, loopback)


def test_the_limit_of_open_files_is_raised() -> None:
    code = """
import resource
from loraretriever.server.sockets import raise_file_limit
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
raise_file_limit()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    soft, hard = map(int, done.stdout.split())
    assert hard == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert soft > 256
