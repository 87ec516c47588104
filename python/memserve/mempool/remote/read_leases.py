"""Leases that peers read by: on what is cached here, for as long as they read, and not for ever.

A reader that outstays its lease reads whatever is there; it compares checksums and takes nothing
that does not fit. Knows no sockets and no clock. Not thread-safe: its server locks.
"""

from __future__ import annotations

import logging
from itertools import takewhile

from memserve.core.block_addr import Tier, tier_of
from memserve.mempool.pool import MemPool
from memserve.mempool.records import Match
from memserve.mempool.remote.records import Counters, PeersStats
from memserve.mempool.remote.sessions import CompletedExchange, OutgoingRead, PeerSession
from memserve.wire.messages import Done, Message
from memserve.wire.peer_messages import AcquireLease, Leased, ReleaseLease

logger = logging.getLogger(__name__)

_NOTHING = Leased((), ())


def readable(match: Match) -> Match:
    """The front of a match that lies in DRAM, where peers can read and write."""
    addrs = list(takewhile(lambda addr: tier_of(addr) is Tier.DRAM, match.addrs))
    return Match(match.keys[: len(addrs)], addrs, match.num_wanted)


class ReadLeases:
    """The holder's half of a fetch."""

    def __init__(self, tally: Counters, lease_s: float) -> None:
        self._tally = tally
        self._lease_s = lease_s

    def acquire(self, guest: PeerSession, pool: MemPool, message: AcquireLease, now: float) -> Message:
        """Hold the longest prefix that is here."""
        lent = guest.lent.get(message.lease_id)
        if lent is not None:
            return lent.answer
        over = guest.leases.get(message.lease_id)
        if over is not None:
            return _NOTHING
        lease = pool.acquire(readable(pool.match(message.keys)))
        if not len(lease):
            pool.release(lease)
            guest.leases.add(message.lease_id, CompletedExchange(_NOTHING))
            return _NOTHING
        answer = Leased(tuple(lease.addrs), tuple(pool.checksums(lease)))
        guest.lent[message.lease_id] = OutgoingRead(pool, lease, answer, now + self._lease_s)
        return answer

    def release(self, guest: PeerSession, message: ReleaseLease) -> Message:
        """End a lease. One that ends before it began never begins."""
        self._end(guest, message.lease_id)
        return Done()

    def expire(self, guest: PeerSession, now: float) -> None:
        """End the leases whose time is over."""
        for lease_id, lent in list(guest.lent.items()):
            if lent.deadline <= now:
                self._end(guest, lease_id)
                self._tally.add(PeersStats(expired_leases=1))
                logger.warning("lease ran out peer=%016x blocks=%d", guest.epoch, len(lent.lease))

    def abandon(self, guest: PeerSession) -> None:
        """Its process is gone: end all its leases."""
        for lease_id in list(guest.lent):
            self._end(guest, lease_id)

    def _end(self, guest: PeerSession, lease_id: int) -> None:
        lent = guest.lent.pop(lease_id, None)
        if lent is not None:
            lent.pool.release(lent.lease)
        guest.leases.add(lease_id, CompletedExchange(_NOTHING))
