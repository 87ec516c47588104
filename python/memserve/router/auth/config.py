"""Settings of API keys and certificates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memserve.core.errors import ConfigError
from memserve.core.flags import setting


@dataclass(frozen=True, slots=True)
class AuthConfig:
    """Checked when built; raises ConfigError."""

    api_keys_file: Path | None = setting(
        None,
        "file with lines of KEY TENANT [rps=N] [tps=N] [weight=N]; requests need one of the keys; tenants "
        "share no cached blocks; rps and tps limit a tenant's requests and tokens per second, weight is its "
        "share of the queue; the file is read again when it changes",
    )
    api_key: str | None = setting(
        None,
        "key that the servers require, and clients too unless --api-keys-file is given; other users of this "
        "machine can see it in the process list",
        metavar="KEY",
        is_secret=True,
    )
    admin_api_key_file: Path | None = setting(
        None,
        "file with one admin key per line; admins see and change workers; without it, every client is an "
        "admin on loopback, or holders of --api-key are if that is given; otherwise there are no admins",
    )

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ConfigError("--api-key has to be ASCII, and not empty")


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Checked when built; raises ConfigError."""

    ssl_certfile: Path | None = setting(None, "PEM file with the router's certificate; enables HTTPS")
    ssl_keyfile: Path | None = setting(None, "PEM file with the key of --ssl-certfile")
    ssl_ca_certs: Path | None = setting(
        None, "PEM file with the authorities that verify https servers; default: the system's"
    )
    ssl_client_certfile: Path | None = setting(
        None, "PEM file with the certificate that the router presents to https servers"
    )
    ssl_client_keyfile: Path | None = setting(
        None, "PEM file with the key of --ssl-client-certfile, if in another file"
    )

    def __post_init__(self) -> None:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("--ssl-certfile and --ssl-keyfile go together")
