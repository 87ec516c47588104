"""Limits of the exchange of blocks with other processes' pools."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PeersConfig:
    """Time limits in seconds, and bounds of work. Raises ConfigError for one that is not positive."""

    timeout_s: float = 5.0
    """Of each step of an exchange."""
    reservation_s: float = 30.0
    """A reservation that has not ended by then is quarantined, its owner fenced, its blocks freed."""
    lease_s: float = 30.0
    """A peer's lease ends by itself after that time."""
    retry_s: float = 1.0
    """Time between two attempts to fence a peer, or to settle a failed read."""
    max_fetches: int = 32
    """Fetches that the router directs, running or waiting; further ones are answered at once."""
    fetch_threads: int = 4
    """Fetches that run at a time."""
    max_evacuations: int = 4
    """Evacuations, running or waiting."""
    evacuation_niceness: int = 10
    """Niceness of the evacuating thread: running requests come first."""
    max_hellos: int = 256
    """Peers that wait at a time until the pool of their blocks is made."""
    max_sessions: int = 256
    """The oldest idle sessions beyond that are forgotten: those peers repeat the handshake."""

    def __post_init__(self) -> None:
        if min(self.timeout_s, self.reservation_s, self.lease_s, self.retry_s) <= 0:
            raise ConfigError("the peers' timeouts must be above 0 seconds")
        counts = (
            self.max_fetches,
            self.fetch_threads,
            self.max_evacuations,
            self.max_hellos,
            self.max_sessions,
        )
        if min(counts) < 1:
            raise ConfigError("the bounds of the peers' work must be at least 1")
