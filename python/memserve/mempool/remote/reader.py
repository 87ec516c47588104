"""Reads blocks from a peer: lease there, read one-sidedly, compare checksums, index here, release.

The target blocks are a reservation of our own pool, so that a failed read that may still land has a
quarantine, as a peer's write has. Knows no sockets. Any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memserve.core.block_keys import BlockKey
from memserve.core.errors import InstanceLost, MemServeError, StaleEpoch, WireMismatch
from memserve.core.kv_layout import TransferMode
from memserve.mempool.pool import MemPool
from memserve.mempool.records import Reservation
from memserve.mempool.remote.pools import RemotePool
from memserve.mempool.remote.records import Counters, PeersStats
from memserve.mempool.remote.sender import chunk_blocks
from memserve.mempool.remote.write_reservations import indexed, num_equal, pinned
from memserve.peering.local_regions import LocalRegions
from memserve.peering.remote_process import PeerConnection
from memserve.transport.base import Peer
from memserve.wire.peer_messages import AcquireLease, Leased, ReleaseLease

logger = logging.getLogger(__name__)


@dataclass(eq=False, frozen=True, slots=True)
class _QuarantinedRead:
    """A failed read whose bytes may still land."""

    connection: PeerConnection
    pool: MemPool
    reservation: Reservation


class QuarantinedReads:
    """Failed reads, each until its bytes cannot land any more. Any thread; one thread sweeps."""

    def __init__(self, regions: LocalRegions, timeout_s: float, *, retry_s: float = 1.0) -> None:
        """`retry_s`: time between two attempts to settle a read."""
        self._retry_s = retry_s
        self._regions = regions
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._waiting: list[_QuarantinedRead] = []

    def abandon(self, connection: PeerConnection, pool: MemPool, reservation: Reservation) -> None:
        """Free the blocks that a failed read was to fill, or quarantine them until that is safe."""
        if self._is_settled(connection):
            pool.cancel(reservation)
            return
        pool.quarantine(reservation)
        with self._lock:
            self._waiting.append(_QuarantinedRead(connection, pool, reservation))

    def num_blocks(self) -> int:
        """Blocks in quarantine."""
        with self._lock:
            return sum(len(one.reservation.addrs) for one in self._waiting)

    def sweep(self) -> float:
        """Try again to settle; returns the seconds until the next attempt, or infinity."""
        with self._lock:
            waiting = list(self._waiting)
        silent: set[Peer] = (
            set()
        )  # Ask a peer that does not answer once per sweep: each question takes its timeout.
        for one in waiting:
            if one.connection.peer in silent:
                continue
            if self._is_settled(one.connection):
                one.pool.settle(one.reservation)
                with self._lock:
                    self._waiting.remove(one)
            else:
                silent.add(one.connection.peer)
        with self._lock:
            return self._retry_s if self._waiting else float("inf")

    def close(self) -> None:
        """The transports are closed, so nothing lands any more: free all blocks."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.pool.settle(one.reservation)

    def _is_settled(self, connection: PeerConnection) -> bool:
        if connection.own_epoch != self._regions.epoch:  # Those transports are closed.
            return True
        try:
            connection.transport.settle(connection.peer, timeout_s=self._timeout_s)
        except (InstanceLost, StaleEpoch):
            return True
        except MemServeError as error:
            logger.warning("a read may still land peer=%s: %s", connection.peer.name, error)
            return False
        return True


class Reader:
    """Fetches from the pool of one peer. Any thread may call any method."""

    def __init__(
        self,
        remote: RemotePool,
        next_id: Callable[[], int],
        quarantined: QuarantinedReads,
        counters: Counters,
    ) -> None:
        """`next_id` gives ascending ids, never one twice in this process."""
        self._remote = remote
        self._next_id = next_id
        self._quarantined = quarantined
        self._counters = counters

    def fetch(self, keys: Sequence[BlockKey], parent: BlockKey | None, timeout_s: float) -> int:
        """See `Peers.fetch`."""
        pool = self._remote.pool
        step = chunk_blocks(pool.layout.block_bytes)
        deadline = time.monotonic() + timeout_s
        num_here = pool.num_cached(keys)
        while num_here < len(keys) and time.monotonic() < deadline:
            last = keys[num_here - 1] if num_here else parent
            pin = pinned(pool, last) if last is not None else None
            if last is not None and pin is None:  # Without its parent a block cannot be found.
                break
            try:
                num_new = self._fetch_some(keys[num_here : num_here + step], last, deadline)
            finally:
                if pin is not None:
                    pool.release(pin)
            if not num_new:
                break
            num_here = pool.num_cached(keys)
        return pool.num_cached(keys)

    def _fetch_some(self, keys: Sequence[BlockKey], parent: BlockKey | None, deadline: float) -> int:
        def fetch(connection: PeerConnection) -> int:
            lease_id = self._next_id()
            answer = self._remote.ask(
                AcquireLease(self._remote.epoch, lease_id, self._remote.pool.layout.digest, tuple(keys)),
                timeout_s=self._left_s(deadline),
            )
            if not isinstance(answer, Leased) or len(answer.addrs) != len(answer.checksums):
                raise WireMismatch(f"{self._remote.name} gave no lease: {type(answer).__name__}")
            if not answer.addrs:
                return 0
            is_there = True
            try:
                return self._read(connection, keys, answer, parent, deadline)
            except InstanceLost:
                is_there = False
                raise
            finally:
                if is_there:
                    self._release(lease_id)

        return self._remote.exchange(fetch)

    def _read(
        self,
        connection: PeerConnection,
        keys: Sequence[BlockKey],
        leased: Leased,
        parent: BlockKey | None,
        deadline: float,
    ) -> int:
        """Read, compare and index the leased blocks; returns their number, 0 if one is corrupt."""
        pool = self._remote.pool
        reservation = pool.reserve(len(leased.addrs))
        try:
            (extents,) = pool.layout.copy_plan(TransferMode.AGGREGATED)
            copies = self._remote.copies(connection, reservation.addrs, leased.addrs, extents)
            connection.transport.read(connection.peer, copies, timeout_s=self._left_s(deadline))
        except MemServeError:
            self._quarantined.abandon(connection, pool, reservation)
            raise
        addrs = pool.commit(reservation)
        good = num_equal(pool.seal(addrs), leased.checksums)
        corrupt = len(addrs) - good and 1
        if corrupt:
            logger.error(
                "block corrupt on arrival from=%s block=%d of=%d", self._remote.name, good, len(addrs)
            )
        num_new = indexed(pool, keys[: len(addrs)], addrs, good, parent)
        num_bytes = len(addrs) * pool.layout.block_bytes
        self._counters.add(
            PeersStats(blocks_fetched=num_new, bytes_fetched=num_bytes, corrupt_on_arrival=corrupt)
        )
        return 0 if corrupt else good

    def _release(self, lease_id: int) -> None:
        try:
            self._remote.ask(ReleaseLease(self._remote.epoch, lease_id), attempts=1)
        except MemServeError as error:
            logger.warning("lease left to run out peer=%s: %s", self._remote.name, error)

    def _left_s(self, deadline: float) -> float:
        return max(0.001, min(self._remote.timeout_s, deadline - time.monotonic()))
