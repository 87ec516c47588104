"""Static servers: named by URL, they do not register and report no epoch."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from memserve.core.errors import ConfigError
from memserve.core.hosts import bracketed
from memserve.core.ids import Epoch, InstanceId
from memserve.wire.messages import InstanceInfo, Role

DEFAULT_BOOTSTRAP_PORT = 8998
STATIC_EPOCH = Epoch(0)
"""The epoch of every server that does not register."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?")
_UNUSABLE = re.compile(r"[^!-~]|[?#\\]")
"""Characters that no server's URL has: a path is a prefix of the servers' paths, so it ends no URL."""


def static_server(url: str, role: Role, bootstrap_port: int | None = None) -> InstanceInfo:
    """The record of the server at `url`. Raises ConfigError as `server_url` does."""
    url = server_url(url)
    return InstanceInfo(InstanceId(url), STATIC_EPOCH, role, url, bootstrap_port)


def server_url(url: str) -> str:
    """The one spelling of a server's URL: no slash at its end, a host in lower case, no default port.

    Raises ConfigError, without the URL's text if it may hold a password, for anything else than
    http[s]://HOST[:PORT][/PATH].
    """
    if "@" in url:
        raise ConfigError("a server's URL has no user and no password: write http://HOST:PORT, and --api-key")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if _UNUSABLE.search(url) or port == 0 or not (_NAME.fullmatch(host) or _is_ipv6(host)):
        host = ""
    if not host or parts.scheme not in _DEFAULT_PORTS:
        raise ConfigError(f"{url!r} is not a server's URL; write http://HOST:PORT")
    port_text = "" if port in (None, _DEFAULT_PORTS[parts.scheme]) else f":{port}"
    return f"{parts.scheme}://{bracketed(host)}{port_text}{parts.path.rstrip('/')}"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
