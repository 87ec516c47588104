"""Results and counters of the exchange of blocks."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True)
class Pushed:
    """The outcome of a sent chain. Blocks in neither count were not taken."""

    num_known: int = 0
    """Blocks that the peer had before."""
    num_sent: int = 0
    """Blocks that were written there and that the peer has indexed."""
    num_bytes: int = 0

    def __add__(self, other: Pushed) -> Pushed:
        return Pushed(
            self.num_known + other.num_known,
            self.num_sent + other.num_sent,
            self.num_bytes + other.num_bytes,
        )


@dataclass(frozen=True, slots=True)
class PeersStats:
    """The exchange of a process with its peers: counters since its start, and one gauge."""

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
    """Requests of peers that were declined here."""
    corrupt_in_flight: int = 0
    """Writes of peers that ended at a block with another checksum than the peer sent."""
    corrupt_on_arrival: int = 0
    """Reads from peers that ended at a block with another checksum than the peer sent."""
    quarantined: int = 0
    """Gauge: blocks that a peer, or a read of this process, may still write to."""
    fenced: int = 0
    """Data epochs of peers that were refused for good."""
    expired_reservations: int = 0
    expired_leases: int = 0
    reopened: int = 0
    """Times that this process opened its transports anew because a peer had fenced them."""
    failures: int = 0
    """Pushes and fetches that raised an error, declined ones not counted."""

    def __add__(self, other: PeersStats) -> PeersStats:
        return PeersStats(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


class Counters:
    """Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = PeersStats()

    def add(self, counted: PeersStats) -> None:
        """Add these counts."""
        with self._lock:
            self._counts += counted

    def stats(self, quarantined: int, reopened: int) -> PeersStats:
        """All counts of one moment, with the two that other objects keep."""
        with self._lock:
            return replace(self._counts, quarantined=quarantined, reopened=reopened)
