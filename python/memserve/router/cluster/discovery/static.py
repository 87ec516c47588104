"""Static servers: named by URL, they do not register and report no epoch."""

from __future__ import annotations

from urllib.parse import urlsplit

from memserve.core.errors import ConfigError
from memserve.core.ids import Epoch, InstanceId
from memserve.wire.messages import InstanceInfo, Role

DEFAULT_BOOTSTRAP_PORT = 8998
STATIC_EPOCH = Epoch(0)
"""The epoch of every server that does not register."""


def static_server(url: str, role: Role, bootstrap_port: int | None = None) -> InstanceInfo:
    """The record of the server at `url`. Raises ConfigError for a malformed URL, or one with a password."""
    url = url.rstrip("/")
    if "@" in url:
        raise ConfigError("a server's URL has no user and no password: write http://HOST:PORT, and --api-key")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{url} is not a server's URL; write http://HOST:PORT")
    return InstanceInfo(InstanceId(url), STATIC_EPOCH, role, url, bootstrap_port)
