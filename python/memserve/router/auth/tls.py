"""TLS: the router's certificate for its clients, and how it verifies servers. Knows no HTTP."""

from __future__ import annotations

import logging
import ssl
from functools import cache
from pathlib import Path

from memserve.core.cluster_key import read_secret_file
from memserve.core.errors import ConfigError

logger = logging.getLogger(__name__)


class Certificate:
    """The router's certificate; a renewed one is read again. Event loop thread only."""

    def __init__(self, certfile: Path, keyfile: Path) -> None:
        """PEM files: the certificate with its chain, and its key.

        Raises ConfigError if they cannot be read, do not match, or other users may read the key.
        """
        self._certfile, self._keyfile = certfile, keyfile
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.set_alpn_protocols(["http/1.1"])
        self._seen = self._stamp()
        self._load()

    def reload(self, *, is_forced: bool = False) -> None:
        """Use changed files for new connections. If they are invalid, keep the old ones and log it once."""
        stamp = self._stamp()
        if stamp == self._seen and not is_forced:
            return
        self._seen = stamp
        try:
            # A context whose loading fails half-way may keep a key that does not match its certificate.
            Certificate(self._certfile, self._keyfile)
            self._load()
        except ConfigError as error:
            logger.error("the old certificate stays in use: %s", error)
        else:
            logger.info("certificate read again path=%s", self._certfile)

    def _load(self) -> None:
        read_secret_file(self._keyfile, "TLS key")
        try:
            self.context.load_cert_chain(self._certfile, self._keyfile, password="")
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "reason", None) or error.strerror or "it is no PEM file"
            raise ConfigError(f"cannot use {self._certfile} with {self._keyfile}: {reason}") from error

    def _stamp(self) -> tuple[int, ...]:
        stamp: list[int] = []
        for path in (self._certfile, self._keyfile):
            try:
                now = path.stat()
            except OSError:
                continue
            stamp += [now.st_mtime_ns, now.st_size, now.st_ino, now.st_mode]
        return tuple(stamp)


def client_context(
    ca_certs: Path | None, certfile: Path | None = None, keyfile: Path | None = None
) -> ssl.SSLContext:
    """How https servers are verified: by the system's authorities, or only by those in `ca_certs` (PEM).

    `certfile` and `keyfile` are the router's own certificate, for servers that require one.
    Raises ConfigError for files that cannot be read.
    """
    is_shared = ca_certs is None and certfile is None
    context = _system_context() if is_shared else _verifying(ca_certs)
    if certfile is not None:
        read_secret_file(keyfile or certfile, "TLS key")
        try:
            context.load_cert_chain(certfile, keyfile, password="")
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "reason", None) or error.strerror or "it is no PEM file"
            raise ConfigError(f"cannot use {certfile} as a certificate for servers: {reason}") from error
    return context


def _verifying(ca_certs: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_certs)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"cannot read certificates from {ca_certs}: {error.strerror or error}") from error
    context.set_alpn_protocols(["http/1.1"])
    return context


@cache
def _system_context() -> ssl.SSLContext:
    """One for all routers of a process: to read the system's authorities takes some 50 ms."""
    return _verifying(None)
