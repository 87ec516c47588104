"""Files that only their owner may read."""

from __future__ import annotations

from pathlib import Path

from memserve.core.errors import ConfigError


def read_secret_file(path: Path, what: str) -> bytes:
    """The bytes of a file of secrets; `what` it is, for people.

    Raises ConfigError if it cannot be read, or others could.
    """
    try:
        mode = path.stat().st_mode
        secret = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the {what} file {path}: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(f"the {what} file {path} is open to other users: chmod 600 {path}")
    return secret
