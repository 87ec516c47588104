"""Answers the control messages of peers, and ends their reservations and leases in time.

`answer` runs on the control server's thread, `sweep` on the sweeper's, other methods on any thread. One
lock is held for microseconds, and while the checksums of one commit are computed; fencing, which may
take seconds, happens outside it. Knows no sockets and moves no bytes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from memserve.core.block_keys import BlockKey
from memserve.core.errors import (
    BlockStateError,
    LayoutMismatch,
    MemServeError,
    TransferFailed,
    TransferTimeout,
)
from memserve.core.ids import Epoch
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.config import PeersConfig
from memserve.mempool.remote.pools import ServedPools
from memserve.mempool.remote.read_leases import ReadLeases
from memserve.mempool.remote.records import Counters, PeersStats
from memserve.mempool.remote.sessions import PeerSession, PeerSessions
from memserve.mempool.remote.write_reservations import PeerReservations
from memserve.peering.local_regions import LocalRegions
from memserve.peering.remote_process import welcome_of
from memserve.wire.messages import Done, Message, Refused, Unknown
from memserve.wire.peer_messages import (
    AcquireLease,
    Cancel,
    Commit,
    Declined,
    Hello,
    Locate,
    Located,
    ReleaseLease,
    Reserve,
    Welcome,
)

logger = logging.getLogger(__name__)


class PeerServer:
    """The receiver of writes and the holder of leases."""

    def __init__(
        self,
        config: PeersConfig,
        epoch: Epoch,
        regions: LocalRegions,
        pools: ServedPools,
        counters: Counters,
        now: Callable[[], float],
    ) -> None:
        self._epoch = epoch
        self._regions = regions
        self._pools = pools
        self._counters = counters
        self._now = now
        self._retry_s = config.retry_s
        self._lock = threading.Lock()
        self._sessions = PeerSessions(config.max_sessions)
        self._writes = PeerReservations(counters, config.reservation_s)
        self._leases = ReadLeases(counters, config.lease_s)

    def answer(self, message: Message) -> Message:
        """The answer to a peer. Raises BlockStateError for a message that is not one to a pool."""
        if isinstance(message, Hello):
            return self._welcome(message)
        if isinstance(message, Locate):
            return _located(self._pools.get(message.layout), message.keys)
        with self._lock:
            if isinstance(message, Cancel | ReleaseLease):
                session = self._sessions.get(message.epoch)
                if session is None:
                    return Done()
                if isinstance(message, Cancel):
                    return self._writes.cancel(session, message)
                return self._leases.release(session, message)
            if isinstance(message, Commit):
                session = self._sessions.get(message.epoch)
                return self._writes.commit(session, message) if session is not None else Unknown()
            if isinstance(message, Reserve | AcquireLease):
                return self._begin(message)
        raise BlockStateError(f"not a message to a pool: {type(message).__name__}")

    def gone(self, epoch: Epoch) -> None:
        """That process is gone: the next `sweep` fences it and frees what it held."""
        with self._lock:
            session = self._sessions.gone(epoch)
            self._writes.abandon(session, self._now())
            self._leases.abandon(session)

    def num_quarantined(self) -> int:
        """Blocks that a peer may still write to."""
        with self._lock:
            return sum(
                len(write.reservation.addrs)
                for session in self._sessions
                for write in session.writes.values()
                if write.is_quarantined
            )

    def sweep(self) -> float:
        """End overdue reservations and leases; returns the seconds until the next is due, or infinity."""
        with self._lock:
            now = self._now()
            for session in self._sessions:
                self._writes.expire(session, now)
                self._leases.expire(session, now)
                if session.is_overdue(now):
                    self._sessions.refuse(session)
            # When all data epochs of a session are refused, fencing them settles its whole quarantine.
            overdue = [
                (session, [] if session.data_epochs else session.quarantined(), frozenset(session.to_fence))
                for session in self._sessions
                if (session.to_fence or session.is_overdue(now)) and session.retry_at <= now
            ]
        for session, transfer_ids, epochs in overdue:
            self._fence(session, transfer_ids, epochs)
        with self._lock:
            self._sessions.forget_gone()
            now = self._now()
            deadlines = [deadline for session in self._sessions for deadline in session.deadlines(now)]
            return max(0.0, min(deadlines, default=float("inf")) - now)

    def close(self) -> None:
        """The transports are closed, so no peer writes or reads here: free everything."""
        with self._lock:
            for session in self._sessions:
                self._writes.abandon(session, self._now())
                self._writes.settle(session, session.quarantined())
                self._leases.abandon(session)

    def _begin(self, message: Reserve | AcquireLease) -> Message:
        """Holds the lock."""
        pool = self._pools.get(message.layout)
        if isinstance(message, AcquireLease):
            session = self._sessions.get(message.epoch)
            if session is None or pool is None:
                return Unknown()
            return self._leases.acquire(session, pool, message, self._now())
        session = self._sessions.writer(message.epoch)
        if session is None or pool is None:
            return Unknown()
        return self._writes.reserve(session, pool, message, self._now())

    def _welcome(self, hello: Hello) -> Message:
        if hello.peer_epoch != self._epoch:
            return Welcome(self._epoch, self._epoch, (), ())
        if hello.layout is None:
            return Declined("a pool exchanges blocks of a layout only")
        try:
            pool = self._pools.of(hello.layout)
        except LayoutMismatch as error:
            return Refused(str(error))
        except MemServeError as error:
            return Declined(str(error))
        with self._lock:
            if not self._sessions.admit(hello.epoch, hello.data_epoch):
                return Welcome(self._epoch, self._regions.epoch, (), (), is_fenced=True)
        region = self._pools.region(pool)
        return welcome_of(self._epoch, self._regions.served(), (region,), pool.arena.slot_bytes)

    def _fence(self, session: PeerSession, transfer_ids: list[int], epochs: frozenset[Epoch]) -> None:
        """Keep late bytes of a peer out, then free the blocks that they could have hit."""
        try:
            for epoch in epochs:
                self._regions.fence(epoch)
        except (TransferTimeout, TransferFailed) as error:
            logger.warning("not fenced, will try again peer=%016x: %s", session.epoch, error)
            with self._lock:
                session.retry_at = self._now() + self._retry_s
            return
        with self._lock:
            session.to_fence -= epochs
            self._writes.settle(session, transfer_ids)
        if epochs:
            self._counters.add(PeersStats(fenced=len(epochs)))
            logger.warning("fenced peer=%016x settled=%d", session.epoch, len(transfer_ids))


def _located(pool: MemPool | None, keys: Sequence[BlockKey]) -> Located:
    if pool is None:
        return Located(0)
    stats = pool.stats()
    return Located(pool.num_cached(keys), stats.free, stats.evictable)
