"""Settings of the HTTP server: address, size and time limits, headers."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.core.errors import ConfigError
from memserve.core.flags import check_settings, setting


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """Checked when built; raises ConfigError."""

    host: str = setting("127.0.0.1", "address to listen on, for HTTP and for the control plane")
    port: int = setting(30000, "HTTP port; 0 picks a free one", at_least=0)
    max_body_bytes: int = setting(64 << 20, "largest request body; a larger one is answered 413", at_least=1)
    max_header_bytes: int = setting(
        16 << 10, "longest header, and longest request line; a longer one is answered 431", at_least=1024
    )
    max_connections: int | None = setting(
        None, "open client connections; default: three quarters of the open-file limit", at_least=1
    )
    client_header_timeout_secs: float = setting(
        30.0, "time for a client to send the head of a request", above=0
    )
    client_stall_timeout_secs: float = setting(
        60.0, "time without progress after which a client's upload or download is ended", above=0
    )
    client_keepalive_secs: float = setting(
        75.0, "time after which an idle client connection is closed", above=0
    )
    shutdown_grace_period_secs: float = setting(
        10.0, "time for running requests to finish after SIGTERM", at_least=0
    )
    request_id_headers: tuple[str, ...] = setting(
        (), "headers that may carry a request's id; the first one present is used; default: x-request-id"
    )
    cors_allowed_origins: tuple[str, ...] = setting(
        (), "origins whose web pages may send requests; * allows all", metavar="ORIGIN"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.port >= 65536:
            raise ConfigError(f"--port {self.port} is not a port")
        for origin in self.cors_allowed_origins:
            if origin != "*" and "://" not in origin:
                raise ConfigError(f"--cors-allowed-origins {origin}: write SCHEME://HOST[:PORT], or *")
