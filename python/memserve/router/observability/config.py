"""Settings of logs, metrics, traces and the dashboard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memserve.core.errors import ConfigError
from memserve.core.flags import check_settings, setting

METRICS_PORT = 29000


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Checked when built; raises ConfigError."""

    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info",
        "how much to log; debug: a line for every request; info: a line for failed requests",
        synonyms={"warn": "warning"},
    )
    log_format: Literal["text", "json"] = setting("text", "text lines, or one JSON object per line")
    log_dir: Path | None = setting(None, "folder for router.log, in addition to stderr", metavar="DIR")
    log_max_mib: int = setting(64, "size at which router.log is rotated", at_least=1)
    log_backups: int = setting(4, "rotated log files to keep", at_least=0)

    log_queue_lines: int = setting(
        10_000, "log lines that wait to be written; further ones are lost", at_least=1
    )
    log_retry_secs: float = setting(
        5.0, "time until a log file that could not be written is tried again", above=0
    )
    log_close_secs: float = setting(2.0, "time limit for writing the waiting lines at exit", above=0)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class ObservabilityConfig:
    """Checked when built; raises ConfigError."""

    prometheus_port: int | None = setting(
        None,
        f"extra port that serves /metrics only; {METRICS_PORT} if --prometheus-host is given",
        at_least=0,
    )
    prometheus_host: str | None = setting(None, "address of that port; default: --host")
    prometheus_duration_buckets: tuple[float, ...] = setting(
        (), "bucket bounds of the duration histograms", metavar="SECONDS"
    )
    ui_show_prompts: bool = setting(
        False, "show the beginnings of prompts on /ui; otherwise only their lengths and hashes"
    )
    recent_requests: int = setting(1024, "ended requests that /ui can show", at_least=1)
    recent_faults: int = setting(
        128, "ended requests with a 5xx answer that /ui can show, beside the recent ones", at_least=1
    )
    hot_prefixes: int = setting(4096, "prefixes that are watched for /ui", at_least=1)
    hot_prefix_half_life_secs: float = setting(
        60.0, "time after which a request counts half among the hot prefixes", above=0
    )
    enable_trace: bool = setting(
        False, "send OpenTelemetry spans of requests; needs pip install 'memserve[otel]'"
    )
    otlp_traces_endpoint: str = setting(
        "localhost:4317", "HOST:PORT that receives the spans, OTLP over gRPC", metavar="ADDRESS"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.prometheus_port is not None and self.prometheus_port >= 65536:
            raise ConfigError(f"--prometheus-port {self.prometheus_port} is not a port")
        bounds = self.prometheus_duration_buckets
        if list(bounds) != sorted(set(bounds)) or any(bound <= 0 for bound in bounds):
            raise ConfigError("--prometheus-duration-buckets have to be positive and to rise")

    @property
    def metrics_port(self) -> int | None:
        """The extra port for metrics; None: there is none."""
        if self.prometheus_port is None and self.prometheus_host is not None:
            return METRICS_PORT
        return self.prometheus_port
