"""The secret that the instances of one cluster share, and the keys derived from it.

Knows no protocol: `wire` and `transport` ask for a key under their own label, so that a key
learned in one place opens nothing in another.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from memserve.core.errors import ConfigError
from memserve.core.secret_file import read_secret_file

MIN_KEY_BYTES = 16


class ClusterKey:
    """A cluster's shared secret. Its repr and errors never show it."""

    def __init__(self, secret: bytes) -> None:
        """`secret` is at least 16 bytes. Raises ConfigError if it is shorter."""
        if len(secret) < MIN_KEY_BYTES:
            raise ConfigError(f"the cluster key has {len(secret)} bytes; use at least {MIN_KEY_BYTES}")
        self._root = hmac.digest(b"memserve cluster key v1", secret, hashlib.sha256)

    @classmethod
    def read(cls, path: Path) -> ClusterKey:
        """The key in a file, surrounding white space removed.

        Raises ConfigError if the file cannot be read, is too short, or is readable by others.
        """
        return cls(read_secret_file(path, "cluster key").strip())

    def derive(self, label: str) -> bytes:
        """32 bytes for one use, named by `label`; other labels give unrelated keys."""
        return hmac.digest(self._root, label.encode(), hashlib.sha256)

    def __repr__(self) -> str:
        return "ClusterKey(…)"
