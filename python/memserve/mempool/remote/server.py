"""Answers the control messages of peers, and sees to it that what they hold here ends.

`answer` runs on the control server's thread, `sweep` on the sweeper's, anything else on any. One
lock is held for microseconds, and while the blocks of one commit are summed; fencing, which may
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

RETRY_S = 1.0
"""Between attempts to fence a peer."""


class PeerServer:
    """What this process does for its peers."""

    def __init__(
        self,
        config: PeersConfig,
        epoch: Epoch,
        memory: LocalRegions,
        pools: ServedPools,
        counters: Counters,
        now: Callable[[], float],
    ) -> None:
        self._epoch = epoch
        self._memory = memory
        self._pools = pools
        self._counters = counters
        self._now = now
        self._lock = threading.Lock()
        self._guests = PeerSessions()
        self._receiving = PeerReservations(counters, config.reservation_s)
        self._lending = ReadLeases(counters, config.lease_s)

    def answer(self, message: Message) -> Message:
        """The answer to a peer. Raises BlockStateError if the message makes no sense."""
        if isinstance(message, Hello):
            return self._welcome(message)
        if isinstance(message, Locate):
            return _located(self._pools.get(message.layout), message.keys)
        with self._lock:
            if isinstance(message, Cancel | ReleaseLease):
                guest = self._guests.get(message.epoch)
                if guest is None:
                    return Done()
                if isinstance(message, Cancel):
                    return self._receiving.cancel(guest, message)
                return self._lending.release(guest, message)
            if isinstance(message, Commit):
                guest = self._guests.get(message.epoch)
                return self._receiving.commit(guest, message) if guest is not None else Unknown()
            if isinstance(message, Reserve | AcquireLease):
                return self._begun(message)
        raise BlockStateError(f"not a message to a pool: {type(message).__name__}")

    def gone(self, epoch: Epoch) -> None:
        """That process is gone: have it fenced, then free what it held, at the next `sweep`."""
        with self._lock:
            guest = self._guests.gone(epoch)
            self._receiving.abandon(guest, self._now())
            self._lending.abandon(guest)

    def num_quarantined(self) -> int:
        """Blocks that a peer may still write."""
        with self._lock:
            return sum(
                len(incoming.reservation.addrs)
                for guest in self._guests
                for incoming in guest.incoming.values()
                if incoming.is_quarantined
            )

    def sweep(self) -> float:
        """End what is overdue; returns the seconds until there may be more to do, or infinity."""
        with self._lock:
            now = self._now()
            for guest in self._guests:
                self._receiving.expire(guest, now)
                self._lending.expire(guest, now)
                if guest.is_overdue(now):
                    self._guests.refuse(guest)
            # Once all its data epochs are refused, fencing them settles all that is in quarantine.
            overdue = [
                (guest, [] if guest.data_epochs else guest.quarantined(), frozenset(guest.to_fence))
                for guest in self._guests
                if (guest.to_fence or guest.is_overdue(now)) and guest.retry_at <= now
            ]
        for guest, transfer_ids, epochs in overdue:
            self._fence(guest, transfer_ids, epochs)
        with self._lock:
            self._guests.forget_gone()
            now = self._now()
            deadlines = [deadline for guest in self._guests for deadline in guest.deadlines(now)]
            return max(0.0, min(deadlines, default=float("inf")) - now)

    def close(self) -> None:
        """The transports are closed: nobody writes or reads here any more, so everything is free."""
        with self._lock:
            for guest in self._guests:
                self._receiving.abandon(guest, self._now())
                self._receiving.settle(guest, guest.quarantined())
                self._lending.abandon(guest)

    def _begun(self, message: Reserve | AcquireLease) -> Message:
        """Holds the lock."""
        pool = self._pools.get(message.layout)
        if isinstance(message, AcquireLease):
            guest = self._guests.get(message.epoch)
            if guest is None or pool is None:
                return Unknown()
            return self._lending.acquire(guest, pool, message, self._now())
        guest = self._guests.writer(message.epoch)
        if guest is None or pool is None:
            return Unknown()
        return self._receiving.reserve(guest, pool, message, self._now())

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
            if not self._guests.welcome(hello.epoch, hello.data_epoch):
                return Welcome(self._epoch, self._memory.epoch, (), (), is_fenced=True)
        region = self._pools.region(pool)
        return welcome_of(self._epoch, self._memory.served(), (region,), pool.arena.slot_bytes)

    def _fence(self, guest: PeerSession, transfer_ids: list[int], epochs: frozenset[Epoch]) -> None:
        """Keep a guest's late bytes out, then free what they could have hit."""
        try:
            for epoch in epochs:
                self._memory.fence(epoch)
        except (TransferTimeout, TransferFailed) as error:
            logger.warning("not fenced, will try again peer=%016x: %s", guest.epoch, error)
            with self._lock:
                guest.retry_at = self._now() + RETRY_S
            return
        if epochs:
            self._counters.add(PeersStats(fenced=len(epochs)))
            logger.warning("fenced peer=%016x settled=%d", guest.epoch, len(transfer_ids))
        with self._lock:
            guest.to_fence -= epochs
            self._receiving.settle(guest, transfer_ids)


def _located(pool: MemPool | None, keys: Sequence[BlockKey]) -> Located:
    if pool is None:
        return Located(0)
    stats = pool.stats()
    return Located(pool.num_cached(keys), stats.free, stats.evictable)
