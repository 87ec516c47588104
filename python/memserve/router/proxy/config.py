"""Settings of sending requests to servers: time limits, retries, resumption of streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memserve.core.flags import check_settings, setting


@dataclass(frozen=True, slots=True)
class ProxyConfig:
    """Checked when built; raises ConfigError."""

    request_timeout_secs: float = setting(
        1800.0, "time limit of a request; a longer one ends with an error", above=0
    )
    retry_max_retries: int = setting(
        3, "times that a request is retried after an instance was lost or failed (5xx); 0: never", at_least=0
    )
    retry_initial_backoff_ms: int = setting(
        50, "wait before the first retry; doubles with each further one", metavar="MS", at_least=0
    )
    retry_max_backoff_ms: int = setting(2000, "longest wait before a retry", metavar="MS", at_least=0)
    poison_threshold: int = setting(
        2, "instances of one role that a request may lose; then it is refused as a poison request", at_least=1
    )
    resume: Literal["auto", "never"] = setting(
        "auto",
        "whether another instance continues a stream whose instance was lost, if the text stays the same: "
        "greedy requests, and all requests under --enable-deterministic-inference",
    )
    connect_timeout_secs: float = setting(3.0, "time to connect to a server", above=0)
    upstream_keepalive_secs: float = setting(
        2.0, "time after which an idle connection to a server is closed", above=0
    )

    abort_timeout_secs: float = setting(
        3.0, "time limit for telling a server that a request was given up", above=0
    )

    def __post_init__(self) -> None:
        check_settings(self)
