"""The pools of peers that this process has exchanged blocks with, by address and layout."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

from memserve.core.errors import PeerDeclined
from memserve.core.ids import Epoch
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.pools import RemotePool, ServedPools
from memserve.mempool.remote.reader import QuarantinedReads, Reader
from memserve.mempool.remote.records import Counters
from memserve.mempool.remote.sender import Sender
from memserve.peering.remote_process import OwnSide, PeerAddress


@dataclass(frozen=True, slots=True)
class PeerHandle:
    """A peer's pool of one layout, and the two ways to exchange blocks with it."""

    remote: RemotePool
    sender: Sender
    reader: Reader


class PeerTable:
    """Any thread may call any method."""

    def __init__(
        self, own: OwnSide, pools: ServedPools, quarantined_reads: QuarantinedReads, counters: Counters
    ) -> None:
        self._own = own
        self._pools = pools
        self._quarantined_reads = quarantined_reads
        self._counters = counters
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._handles: dict[tuple[PeerAddress, bytes], PeerHandle] = {}
        self._is_closed = False

    def use(self, peer: PeerAddress, pool: MemPool) -> PeerHandle:
        """The peer's pool of the blocks of `pool`. Raises PeerDeclined after `close`."""
        key = (peer, pool.layout.digest)
        with self._lock:
            if self._is_closed:
                raise PeerDeclined(str(peer), "this end is closed")
            if key not in self._handles:
                remote = RemotePool(peer, pool, self._own, self._pools)
                sender = Sender(remote, self._next_id)
                reader = Reader(remote, self._next_id, self._quarantined_reads, self._counters)
                self._handles[key] = PeerHandle(remote, sender, reader)
            return self._handles[key]

    def drop(self, epoch: Epoch) -> None:
        """Disconnect from that process; running exchanges end as they would."""
        with self._lock:
            dropped = [self._handles.pop(key) for key in list(self._handles) if key[0].epoch == epoch]
        for handle in dropped:
            handle.remote.close()

    def close(self) -> None:
        """Disconnect from all peers for good. Idempotent."""
        with self._lock:
            self._is_closed = True
            handles, self._handles = self._handles, {}
        for handle in handles.values():
            handle.remote.close()

    def _next_id(self) -> int:
        return next(self._ids)
