"""Settings of the request queue, the rate limit and the memory budget."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.core.flags import check_settings, setting


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """Checked when built; raises ConfigError."""

    max_concurrent_requests: int = setting(
        -1, "requests that run at once; further ones queue, fairly by tenant; below 1: no limit"
    )
    queue_size: int = setting(100, "requests that may queue; further ones are answered 429", at_least=0)
    queue_timeout_secs: float = setting(
        60.0, "time a request may queue; then it is answered 503 with Retry-After", above=0
    )
    rate_limit_tokens_per_second: float | None = setting(
        None,
        "requests admitted per second, all clients together; further ones are answered 429",
        metavar="N",
        above=0,
    )
    max_buffered_mib: int | None = setting(
        None,
        "memory for requests in progress, their bodies and what is derived from them; further ones are "
        "answered 503; default: a quarter of the machine's memory",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check_settings(self)
