"""Leases on blocks of this process while peers read them, each with a deadline.

A reader that outlives its lease may read other bytes; it compares checksums and rejects those blocks.
Knows no sockets and no clock. Not thread-safe: the server locks.
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

    def __init__(self, counters: Counters, lease_s: float) -> None:
        self._counters = counters
        self._lease_s = lease_s

    def acquire(self, session: PeerSession, pool: MemPool, message: AcquireLease, now: float) -> Message:
        """Lease the longest prefix that is cached here."""
        read = session.reads.get(message.lease_id)
        if read is not None:
            return read.answer
        if session.leases.get(message.lease_id) is not None:
            return _NOTHING
        lease = pool.acquire(readable(pool.match(message.keys)))
        if not len(lease):
            pool.release(lease)
            session.leases.add(message.lease_id, CompletedExchange(_NOTHING))
            return _NOTHING
        answer = Leased(tuple(lease.addrs), tuple(pool.checksums(lease)))
        session.reads[message.lease_id] = OutgoingRead(pool, lease, answer, now + self._lease_s)
        return answer

    def release(self, session: PeerSession, message: ReleaseLease) -> Message:
        """End a lease. A lease that is released before it is acquired is never acquired."""
        self._end(session, message.lease_id)
        return Done()

    def expire(self, session: PeerSession, now: float) -> None:
        """End the leases that have passed their deadline."""
        for lease_id, read in list(session.reads.items()):
            if read.deadline <= now:
                self._end(session, lease_id)
                self._counters.add(PeersStats(expired_leases=1))
                logger.warning("lease ran out peer=%016x blocks=%d", session.epoch, len(read.lease))

    def abandon(self, session: PeerSession) -> None:
        """The peer's process is gone: end all its leases."""
        for lease_id in list(session.reads):
            self._end(session, lease_id)

    def _end(self, session: PeerSession, lease_id: int) -> None:
        read = session.reads.pop(lease_id, None)
        if read is not None:
            read.pool.release(read.lease)
        session.leases.add(lease_id, CompletedExchange(_NOTHING))
