"""The two ends of an exchange of blocks: the pools that this process serves, and a peer's pool."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from memserve.core.block_addr import BlockAddr, slot_of
from memserve.core.kv_layout import Extents, KVLayout
from memserve.mempool.pool import MemPool
from memserve.peering.local_regions import LocalRegions
from memserve.peering.remote_process import OwnSide, PeerAddress, PeerConnection, RemoteProcess
from memserve.transport.copies import Copies
from memserve.transport.regions import Region

PoolOf = Callable[[KVLayout], MemPool]
"""The one pool of such blocks. Raises LayoutMismatch, naming what differs, if there is none."""


class ServedPools:
    """This process's pools by layout, and the regions that their arenas are registered as.

    Any thread may call any method. The pools stay the caller's.
    """

    def __init__(self, local: LocalRegions, pool_of: PoolOf) -> None:
        """`pool_of` is called by one thread at a time; it may make a pool, which may take seconds."""
        self._local = local
        self._pool_of = pool_of
        self._making = threading.Lock()
        self._lock = threading.Lock()
        self._pools: dict[bytes, MemPool] = {}
        self._regions: dict[bytes, Region] = {}

    def add(self, pool: MemPool) -> None:
        """Serve the pool to peers that name the digest of its layout. Idempotent."""
        with self._lock:
            self._pools[pool.layout.digest] = pool

    def get(self, digest: bytes) -> MemPool | None:
        """The pool of blocks of that layout, if it was ever used or added."""
        with self._lock:
            return self._pools.get(digest)

    def of(self, layout: KVLayout) -> MemPool:
        """The pool of such blocks, made if there is none. Raises what `PoolOf` raises."""
        with self._making:
            pool = self._pool_of(layout)
        self.add(pool)
        return pool

    def region(self, pool: MemPool) -> Region:
        """The pool's arena as peers reach it; registered now if it was not."""
        digest = pool.layout.digest
        with self._lock:
            if digest not in self._regions:
                self._register(pool)
            return self._regions[digest]

    def resized(self, pool: MemPool) -> None:
        """The arena has another size: register it anew. Peers that name the old region are refused.

        Raises TransferTimeout if a peer is still copying; the new region is registered all the same,
        but the bytes that were taken back are not free yet.
        """
        with self._lock:
            before = self._regions.pop(pool.layout.digest, None)
            if before is None:
                return
            try:
                self._local.remove(before)
            finally:
                self._register(pool)

    def _register(self, pool: MemPool) -> None:
        num_bytes = pool.arena.slot_bytes * pool.arena.num_slots
        self._regions[pool.layout.digest] = self._local.add(pool.arena.address, num_bytes)


class RemotePool(RemoteProcess):
    """A peer's pool of the blocks of one of our pools."""

    def __init__(self, address: PeerAddress, pool: MemPool, own: OwnSide, pools: ServedPools) -> None:
        super().__init__(address, own, layout=pool.layout)
        self.pool = pool
        self._pools = pools

    def copies(
        self,
        connection: PeerConnection,
        own: Sequence[BlockAddr],
        theirs: Sequence[int],
        extents: Extents,
    ) -> Copies:
        """The copies of these extents of blocks of ours, from or to blocks of theirs (`BlockAddr`s)."""
        (arena,) = connection.memory.regions
        offsets = np.array(extents.offsets, np.int64)
        starts = np.array(self.pool.slots(own), np.int64) * self.pool.arena.slot_bytes
        slots = np.array([slot_of(BlockAddr(addr)) for addr in theirs], np.int64)
        local = (starts[:, None] + offsets).ravel()
        remote = (slots[:, None] * connection.slot_bytes + offsets).ravel()
        lengths = np.tile(np.array(extents.lengths, np.int64), len(starts))
        ones = np.ones(len(local), np.int64)
        return Copies(
            ones * self._pools.region(self.pool).region_id, local, ones * arena.region_id, remote, lengths
        )
