"""This process's arenas as its transports serve them, and their life: the data epoch.

    data epoch A:  transports, regions  --- a peer has fenced A --->  data epoch B: all of it anew

Nobody may move bytes while that happens, so whoever does holds the life it began with.
Knows no control messages.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from memserve.core.errors import MemServeError, TransferTimeout
from memserve.core.ids import Epoch, new_epoch
from memserve.mempool.arena import Arena
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.faults import HandshakeRequired
from memserve.transport.base import Transport
from memserve.transport.regions import Region, RegionTable

logger = logging.getLogger(__name__)

OpenTransports = Callable[[Epoch], Sequence[Transport]]
"""The transports of a data epoch, best first."""


class Served(NamedTuple):
    """How one arena can be reached at a moment."""

    epoch: Epoch
    transports: tuple[Transport, ...]
    region: Region


class LocalRegions:
    """Transports and the regions they serve. Any thread may call anything."""

    def __init__(self, open_transports: OpenTransports, epoch: Epoch, timeout_s: float) -> None:
        """Raises what `open_transports` raises."""
        self._open = open_transports
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._num_users = 0
        self._is_reopening = False
        self._ids = RegionTable()
        self._regions: dict[bytes, Region] = {}
        self.epoch = epoch
        """Of the transports that are open now; 0 if none are."""
        self.transports = tuple(open_transports(epoch))
        self.num_reopened = 0

    def served(self, pool: MemPool) -> Served:
        """How the pool's arena can be reached; registers it if it was not."""
        digest = pool.layout.digest
        with self._changed:
            if digest not in self._regions:
                self._register(digest, pool.arena)
            return Served(self.epoch, self.transports, self._regions[digest])

    def resized(self, pool: MemPool) -> None:
        """The arena has another size: register it anew. Peers that name the old region are refused.

        Raises TransferTimeout if a peer is still copying; the new region is registered all the same,
        but the bytes that were taken back are not free yet.
        """
        digest = pool.layout.digest
        with self._changed:
            before = self._regions.pop(digest, None)
            if before is None:
                return
            late: MemServeError | None = None
            for transport in self.transports:
                try:
                    transport.deregister(before.region_id, timeout_s=self._timeout_s)
                except TransferTimeout as error:
                    late = error
            self._ids.remove(before.region_id)
            self._register(digest, pool.arena)
        if late is not None:
            raise late

    @contextmanager
    def hold(self, epoch: Epoch) -> Iterator[None]:
        """Keep the transports of that data epoch open. Raises HandshakeRequired if they are not any more."""
        with self._changed:
            if self._is_reopening or self.epoch != epoch:
                raise HandshakeRequired(f"data epoch {epoch:016x} is over")
            self._num_users += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_users -= 1
                self._changed.notify_all()

    def reopen(self, seen: Epoch) -> bool:
        """End the data epoch `seen` and begin another, unless somebody has; returns whether it was us.

        Waits for those who hold it. Raises TransferTimeout, changing nothing, if they take too long.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._is_reopening, self._timeout_s):
                raise TransferTimeout("another thread's reopening", self._timeout_s)
            if self.epoch != seen:
                return False
            self._is_reopening = True
            try:
                if not self._changed.wait_for(lambda: self._num_users == 0, self._timeout_s):
                    raise TransferTimeout("running copies", self._timeout_s)
                for transport in self.transports:
                    transport.close()
                self.epoch = new_epoch()
                self.num_reopened += 1
                self.transports = tuple(self._open(self.epoch))
                for region in self._regions.values():
                    for transport in self.transports:
                        transport.register(region)
            finally:
                self._is_reopening = False
                self._changed.notify_all()
        logger.warning("fenced by a peer, transports opened anew data_epoch=%016x", self.epoch)
        return True

    def fence(self, epoch: Epoch) -> None:
        """Refuse that data epoch of a peer on all transports. Errors as of `Transport.fence`."""
        for transport in self.transports:
            transport.fence(epoch, timeout_s=self._timeout_s)

    def close(self) -> None:
        """Stop serving. Idempotent."""
        with self._changed:
            self.epoch = Epoch(0)
        for transport in self.transports:
            transport.close()

    def _register(self, digest: bytes, arena: Arena) -> None:
        region = Region(self._ids.next_id(), arena.address, arena.slot_bytes * arena.num_slots)
        self._ids.add(region)
        for transport in self.transports:
            transport.register(region)
        self._regions[digest] = region
