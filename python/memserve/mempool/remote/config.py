"""Time limits of the exchange of blocks with other processes' pools."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PeersConfig:
    """Seconds. Raises ConfigError for a limit that is not positive."""

    timeout_s: float = 5.0
    """Of each step of an exchange."""
    reservation_s: float = 30.0
    """A reservation that has not ended by then is quarantined, its owner fenced, its blocks freed."""
    lease_s: float = 30.0
    """A peer's lease ends by itself after that time."""

    def __post_init__(self) -> None:
        if min(self.timeout_s, self.reservation_s, self.lease_s) <= 0:
            raise ConfigError("the peers' timeouts must be above 0 seconds")
