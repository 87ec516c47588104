"""API keys with their tenants and limits, read from a file that may change while the router runs.

    # KEY TENANT [rps=NUMBER] [tps=NUMBER] [weight=NUMBER]
    8f2c…  alice  rps=20 tps=50000 weight=2

Limits belong to the tenant, whichever of its keys they are written behind. Keys are kept as hashes under a
secret of this process: a client cannot choose the compared bytes, so the duration of a look-up reveals
nothing, and no dump of an object shows a key. Knows no requests.
"""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from memserve.core.cluster_key import read_secret_file
from memserve.core.errors import ConfigError
from memserve.router.tenant import Rates, Tenant

logger = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = "KEY TENANT [rps=NUMBER] [tps=NUMBER] [weight=NUMBER]"

UNNAMED_ADMIN = "-"


class Keys(Generic[T]):
    """Owners by key."""

    def __init__(self, owners: Mapping[str, T]) -> None:
        self._secret = secrets.token_bytes(32)
        self._owners = {self._digest(key): owner for key, owner in owners.items()}

    def owner(self, key: str) -> T | None:
        """The owner of `key`; None if the key is unknown."""
        return self._owners.get(self._digest(key))

    def __len__(self) -> int:
        return len(self._owners)

    def _digest(self, key: str) -> bytes:
        return hashlib.blake2b(
            key.encode(errors="surrogateescape"), key=self._secret, digest_size=32
        ).digest()


class KeyFile(Generic[T]):
    """The keys in a file, kept up to date. Event loop thread only."""

    def __init__(self, path: Path, what: str, parse: Callable[[Path, list[str]], dict[str, T]]) -> None:
        """`what`: the kind of key, for messages. `parse` turns path and lines into owners by key.

        Raises ConfigError if the file cannot be read, other users may read it, or `parse` raises it.
        """
        self._path, self._what, self._parse = path, what, parse
        self._seen = self._stamp()
        self.keys = self._read()

    def reload(self, *, is_forced: bool = False) -> None:
        """Read the file again if it has changed, or if `is_forced`.

        If the new file is invalid, the old keys stay and one error is logged.
        """
        stamp = self._stamp()
        if stamp == self._seen and not is_forced:
            return
        self._seen = stamp
        try:
            self.keys = self._read()
        except ConfigError as error:
            logger.error("the old %ss stay in use: %s", self._what, error)
        else:
            logger.info("%ss read again path=%s keys=%d", self._what, self._path, len(self.keys))

    def _read(self) -> Keys[T]:
        try:
            lines = read_secret_file(self._path, self._what).decode().splitlines()
        except UnicodeDecodeError:
            raise ConfigError(f"the {self._what} file {self._path} is no text") from None
        owners = self._parse(self._path, lines)
        if not owners:
            raise ConfigError(f"{self._path} has no {self._what}")
        return Keys(owners)

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            now = self._path.stat()
        except OSError:
            return None
        return now.st_mtime_ns, now.st_size, now.st_ino, now.st_mode


def tenant_keys(path: Path) -> KeyFile[Tenant]:
    """A file of lines as `FORMAT` says. Raises ConfigError."""
    return KeyFile(path, "API key", parse_tenants)


def admin_keys(path: Path) -> KeyFile[str]:
    """A file of lines KEY [NAME]. Raises ConfigError."""
    return KeyFile(path, "admin API key", parse_admins)


def parse_tenants(path: Path, lines: list[str]) -> dict[str, Tenant]:
    """Tenants by key. Raises ConfigError with the number of an invalid line, never with its text."""
    names: dict[str, str] = {}
    rates: dict[str, dict[str, float]] = {}
    for number, words in _entries(lines):
        where = f"{path}, line {number}"
        if len(words) < 2 or words[0] in names:
            raise ConfigError(f"{where}: write {FORMAT}, each key once")
        names[words[0]] = words[1]
        own = rates.setdefault(words[1], {})
        for word in words[2:]:
            name, value = _rate(where, word)
            if own.setdefault(name, value) != value:
                raise ConfigError(f"{where}: {name} of {words[1]} differs from an earlier line")
    tenants = {name: Tenant(name, Rates(**own)) for name, own in rates.items()}
    return {key: tenants[name] for key, name in names.items()}


def parse_admins(path: Path, lines: list[str]) -> dict[str, str]:
    """Names by key. Raises ConfigError."""
    keys: dict[str, str] = {}
    for number, words in _entries(lines):
        if len(words) > 2:
            raise ConfigError(f"{path}, line {number}: write KEY [NAME]")
        keys[words[0]] = words[1] if len(words) == 2 else UNNAMED_ADMIN
    return keys


def _entries(lines: list[str]) -> list[tuple[int, list[str]]]:
    """Numbers and words of the lines that are neither empty nor comments (#)."""
    entries = ((number, line.split()) for number, line in enumerate(lines, start=1))
    return [(number, words) for number, words in entries if words and not words[0].startswith("#")]


def _rate(where: str, word: str) -> tuple[str, float]:
    name, _, text = word.partition("=")
    if name not in ("rps", "tps", "weight"):
        raise ConfigError(f"{where}: write {FORMAT}")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"{where}: {name} has to be a number that is more than 0")
    return name, value
