"""Files of secrets; the secret that the instances of one cluster share, and the keys derived from it.

Knows no protocol: `wire` and `transport` ask for a key under their own label, so that a key
learned in one place opens nothing in another.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from memserve.core.errors import ConfigError

MIN_KEY_BYTES = 16


class ClusterKey:
    """A cluster's shared secret. Its repr and its errors never show the secret."""

    def __init__(self, secret: bytes) -> None:
        """`secret` is at least 16 bytes. Raises ConfigError if it is shorter."""
        if len(secret) < MIN_KEY_BYTES:
            raise ConfigError(f"the cluster key has {len(secret)} bytes; use at least {MIN_KEY_BYTES}")
        self._root = hmac.digest(b"memserve cluster key v1", secret, hashlib.sha256)

    @classmethod
    def read(cls, path: Path) -> ClusterKey:
        """Read the key from a file, without surrounding white space.

        Raises ConfigError if the file cannot be read, is too short, or is readable by others.
        """
        return cls(read_secret_file(path, "cluster key").strip())

    def derive(self, label: str) -> bytes:
        """32 bytes for one use, named by `label`. Other labels give unrelated keys."""
        return hmac.digest(self._root, label.encode(), hashlib.sha256)

    def __repr__(self) -> str:
        return "ClusterKey(…)"


def read_secret_file(path: Path, what: str) -> bytes:
    """The bytes of a file of secrets, which errors call `what`.

    Raises ConfigError if the file cannot be read, or if other users could read it.
    """
    try:
        mode = path.stat().st_mode
        secret = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the {what} file {path}: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(f"the {what} file {path} is open to other users: chmod 600 {path}")
    return secret
