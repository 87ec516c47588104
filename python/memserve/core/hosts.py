"""Host names, read without asking the network; free ports of this machine."""

from __future__ import annotations

import ipaddress
import socket

_kept: list[socket.socket] = []


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach itself as `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def bracketed(host: str) -> str:
    """`host` as written before `:port`: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def can_listen(host: str, port: int) -> bool:
    """Whether a server could listen at `host` and `port` now."""
    with _sharing_socket(host) as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def keep_port(host: str = "127.0.0.1") -> int:
    """A free TCP port that the system gives to no other socket or connection while this process lives.

    A server of this process or of a child can still listen on it, if it sets SO_REUSEADDR as asyncio does.
    """
    keeper = _sharing_socket(host)
    keeper.bind((host, 0))
    _kept.append(keeper)
    port: int = keeper.getsockname()[1]
    return port


def _sharing_socket(host: str) -> socket.socket:
    """A TCP socket that shares its port with other sockets, of which one may listen."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return made
