"""What the exchange of blocks answers with and counts. Values only, but for the tally."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True)
class Pushed:
    """What became of a chain that was sent. What is in neither count was not taken."""

    num_known: int = 0
    """Blocks that the peer had already."""
    num_sent: int = 0
    """Blocks that were written there and that it has taken."""
    num_bytes: int = 0

    def __add__(self, other: Pushed) -> Pushed:
        return Pushed(
            self.num_known + other.num_known,
            self.num_sent + other.num_sent,
            self.num_bytes + other.num_bytes,
        )


@dataclass(frozen=True, slots=True)
class PeersStats:
    """One moment of a process's exchange with its peers; the counters run from its start."""

    pushes: int = 0
    """Chains sent, in whole or in part."""
    blocks_pushed: int = 0
    bytes_pushed: int = 0
    blocks_received: int = 0
    """Blocks that peers wrote here and that were indexed."""
    fetches: int = 0
    blocks_fetched: int = 0
    bytes_fetched: int = 0
    declined: int = 0
    """Requests of peers that were turned down here."""
    corrupt_in_flight: int = 0
    """Blocks that peers wrote here which did not sum to what they said."""
    corrupt_on_arrival: int = 0
    """Blocks that were read from peers which did not sum to what they said."""
    quarantined: int = 0
    """Blocks that a peer, or a read of ours, may still write: now, not in all."""
    fenced: int = 0
    """Peers that were refused for good, each for one life of its transports."""
    expired_reservations: int = 0
    expired_leases: int = 0
    reopened: int = 0
    """Times that a peer had fenced us and our transports began anew."""
    failures: int = 0
    """Pushes and fetches that raised, but for those that were declined."""

    def __add__(self, other: PeersStats) -> PeersStats:
        return PeersStats(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


class Counters:
    """Counts, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = PeersStats()

    def add(self, counted: PeersStats) -> None:
        """Add up what happened."""
        with self._lock:
            self._counts += counted

    def stats(self, quarantined: int, reopened: int) -> PeersStats:
        """All counts of one moment, with those that others keep."""
        with self._lock:
            return replace(self._counts, quarantined=quarantined, reopened=reopened)
