"""What is told of the router, to whom and where: the part of its configuration that is about watching it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memserve.core.errors import ConfigError
from memserve.core.flags import setting

METRICS_PORT = 29000


@dataclass(frozen=True, slots=True)
class ObservabilityConfig:
    """Checked when built."""

    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info",
        "how much to log; debug has a line for every request, info for those that failed",
        synonyms={"warn": "warning"},
    )
    log_format: Literal["text", "json"] = setting("text", "lines for people, or one JSON object per line")
    log_dir: Path | None = setting(
        None, "folder for router.log, which is renamed when it has grown; beside stderr", metavar="DIR"
    )
    log_max_mib: int = setting(64, "how large router.log may grow; four older ones are kept")
    prometheus_port: int | None = setting(
        None,
        f"port for /metrics alone, which the HTTP port has too; {METRICS_PORT} with --prometheus-host",
    )
    prometheus_host: str | None = setting(None, "address of that port; --host unless given")
    prometheus_duration_buckets: tuple[float, ...] = setting(
        (), "bounds of the histograms of what clients wait for", metavar="SECONDS"
    )
    request_id_headers: tuple[str, ...] = setting(
        (), "headers that may carry a request's id, the first one that does wins; x-request-id unless given"
    )
    cors_allowed_origins: tuple[str, ...] = setting(
        (), "web pages of these origins may send requests; * is any", metavar="ORIGIN"
    )
    ui_show_prompts: bool = setting(
        False, "show on /ui how prompts begin; otherwise their lengths and hashes only"
    )
    enable_trace: bool = setting(
        False, "send OpenTelemetry spans of requests; needs the extra: pip install 'memserve[otel]'"
    )
    otlp_traces_endpoint: str = setting(
        "localhost:4317", "where to: HOST:PORT, OTLP over gRPC", metavar="ADDRESS"
    )

    def __post_init__(self) -> None:
        port = self.prometheus_port
        if port is not None and not 0 <= port < 65536:
            raise ConfigError(f"--prometheus-port {port} is not a port")
        if self.log_max_mib < 1:
            raise ConfigError("--log-max-mib has to be at least 1")
        bounds = self.prometheus_duration_buckets
        if list(bounds) != sorted(set(bounds)) or any(bound <= 0 for bound in bounds):
            raise ConfigError("--prometheus-duration-buckets have to be positive and to rise")
        for origin in self.cors_allowed_origins:
            if origin != "*" and "://" not in origin:
                raise ConfigError(f"--cors-allowed-origins {origin}: write SCHEME://HOST[:PORT], or *")

    @property
    def metrics_port(self) -> int | None:
        """The port for metrics alone; None if nobody asked for one."""
        if self.prometheus_port is None and self.prometheus_host is not None:
            return METRICS_PORT
        return self.prometheus_port
