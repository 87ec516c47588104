"""What a host's name says by itself, without asking the network; and ports of this one."""

from __future__ import annotations

import ipaddress
import socket

_kept: list[socket.socket] = []


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine to itself only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def bracketed(host: str) -> str:
    """`host` as it stands before `:port`: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def can_listen(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with _sharing_socket(host) as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def keep_port(host: str = "127.0.0.1") -> int:
    """A free TCP port that the system offers nobody else, nor uses for connections, while this process lives.

    A server of this process or of a child can still listen on it, if it sets SO_REUSEADDR as asyncio does.
    """
    keeper = _sharing_socket(host)
    keeper.bind((host, 0))
    _kept.append(keeper)
    port: int = keeper.getsockname()[1]
    return port


def _sharing_socket(host: str) -> socket.socket:
    """A TCP socket whose port another may have too, as long as only one of them listens."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return made
