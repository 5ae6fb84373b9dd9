"""Where a server listens."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket

from loraretriever.errors import InvalidInputError, LoraRetrieverError

_OPEN_FILES = 65_536  # a connection each


def resolve_address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """The address to listen at; of a name's addresses the first of IPv4, or else the first.

    Raises:
        InvalidInputError: the host is not known.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InvalidInputError(
            f"host {host!r} is not known ({error.strerror}); expected an address of this machine, such as 127.0.0.1."
        ) from error
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    return family, (str(address[0]), port)


def is_loopback(address: str) -> bool:
    """Whether only programs on this machine can reach an address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes any free one.

    Raises:
        InvalidInputError: the host is not known.
        LoraRetrieverError: the port is in use, or not ours to take.
    """
    family, address = resolve_address(host, port)
    try:
        return socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        raise LoraRetrieverError(
            f"cannot listen at {host} port {port}: {os.strerror(error.errno or 0)}; "
            "choose another with --port (0 takes any free one), or stop what uses it."
        ) from error


def url_of(listener: socket.socket) -> str:
    """The address that clients use."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def raise_file_limit() -> None:
    """Allow as many open files as the system lets us: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
