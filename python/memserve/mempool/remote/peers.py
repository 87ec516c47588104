"""Peers: the exchange of blocks between the pools of this process and those of other processes.

    transfer_with_insert   cached chain of this pool → the blocks of it that a peer lacks
    fetch                  cached chain of a peer → the blocks of it that this pool lacks

    threads: control server (answers), sweeper (deadlines, fencing), a few for the fetches that a
    router directs, one for evacuations, one to make pools; the rest runs on the caller's thread

A fault of a peer costs a miss or an error here: never a block, never a byte in the wrong place.
Knows no SGLang, no HBM and no membership. Source of the verbs: MemServe.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from memserve.core.block_keys import BlockKey
from memserve.core.errors import MemServeError, PeerDeclined, WireMismatch
from memserve.core.executor import BoundedExecutor
from memserve.core.ids import Epoch
from memserve.core.kv_layout import TransferMode
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.config import PeersConfig
from memserve.mempool.remote.evacuation import Evacuations
from memserve.mempool.remote.fetches import Fetches
from memserve.mempool.remote.peer_table import PeerHandle, PeerTable
from memserve.mempool.remote.pools import PoolOf, ServedPools
from memserve.mempool.remote.reader import QuarantinedReads
from memserve.mempool.remote.records import Counters, PeersStats, Pushed
from memserve.mempool.remote.server import PeerServer
from memserve.mempool.remote.sweeper import Sweeper
from memserve.peering.endpoint import TransferEndpoint
from memserve.peering.local_regions import LocalRegions, OpenTransports
from memserve.peering.remote_process import OwnSide, PeerAddress, Result
from memserve.wire.messages import Message
from memserve.wire.peer_messages import (
    AcquireLease,
    Declined,
    Evacuate,
    Fetch,
    Hello,
    Locate,
    Located,
    Reserve,
)

logger = logging.getLogger(__name__)

_WITH_DEADLINE = (Reserve, AcquireLease)
"""Messages that begin a reservation or a lease, which has a deadline."""


class Peers:
    """One per process. Any thread may call any method; calls block for at most a few `timeout_s`."""

    def __init__(
        self,
        endpoint: TransferEndpoint,
        open_transports: OpenTransports,
        pool_of: PoolOf,
        config: PeersConfig | None = None,
    ) -> None:
        """Open the transports and answer peers at `endpoint`, which `close` closes.

        `pool_of` is called for each peer that introduces itself, by one thread at a time; it may make a
        pool, which may take a while, and raises LayoutMismatch, naming what differs, if there is none.
        Raises ConfigError if a transport cannot be opened.
        """
        self._config = config = config or PeersConfig()
        self._endpoint = endpoint
        self.address = endpoint.address
        self._counters = counters = Counters()
        self._regions = LocalRegions(open_transports, endpoint.epoch, config.timeout_s)
        self._pools = ServedPools(self._regions, pool_of)
        self._server = PeerServer(
            config, endpoint.epoch, self._regions, self._pools, counters, time.monotonic
        )
        self._quarantined = QuarantinedReads(self._regions, config.timeout_s, retry_s=config.retry_s)
        own = OwnSide(endpoint.epoch, self._regions, endpoint.connect, config.timeout_s)
        self._table = PeerTable(own, self._pools, self._quarantined, counters)
        self._fetches = Fetches(self.fetch, max_fetches=config.max_fetches, num_threads=config.fetch_threads)
        self._evacuations = Evacuations(
            self, time.monotonic, max_evacuations=config.max_evacuations, niceness=config.evacuation_niceness
        )
        self._pool_maker = BoundedExecutor("peer-pools", capacity=config.max_hellos)
        self._sweeper = Sweeper(self._sweep)
        self._is_closed = False
        endpoint.serve_pools(self._answer)

    def add(self, pool: MemPool) -> None:
        """Serve the pool from now on, not only from its first use: for Fetch and Locate. Idempotent."""
        self._pools.add(pool)

    # ---- cached chains

    def transfer_with_insert(
        self,
        instance: PeerAddress,
        pool: MemPool,
        keys: Sequence[BlockKey],
        *,
        parent: BlockKey | None = None,
        mode: TransferMode = TransferMode.AGGREGATED,
    ) -> Pushed:
        """Copy the blocks of a cached chain that the instance lacks, and have it index them there.

        keys[0] follows `parent`, or begins a prompt. A block that is not cached here, or fails its
        checksum, ends the chain, and so does a block that the instance does not take: see the counts.
        Raises PeerDeclined if the instance takes no block (`parent_unknown`: send the chain from its
        root), StaleEpoch, LayoutMismatch, InstanceLost, TransferTimeout, TransferFailed; then the
        instance holds what it has confirmed, and no block is lost or leaked here.
        Source: MemServe, distributed API (transfer_with_insert).
        """
        sender = self._use(instance, pool).sender
        pushed = self._counted(lambda: sender.transfer_with_insert(keys, parent, mode))
        blocks, num_bytes = pushed.num_sent, pushed.num_bytes
        self._counters.add(PeersStats(pushes=1, blocks_pushed=blocks, bytes_pushed=num_bytes))
        return pushed

    def fetch(
        self,
        peer: PeerAddress,
        pool: MemPool,
        keys: Sequence[BlockKey],
        *,
        parent: BlockKey | None = None,
        timeout_s: float,
    ) -> int:
        """Copy the blocks of a chain that `pool` lacks from the peer, and index them here.

        The mirror of `transfer_with_insert`. Returns how many of `keys`, from the front, are cached here
        at the end. keys[0] follows `parent`, or begins a prompt. A block with another checksum than the
        peer sent is a miss and ends the chain. Raises as `transfer_with_insert`, and OutOfBlocks if
        there is no room here.
        """
        found = self._counted(lambda: self._use(peer, pool).reader.fetch(keys, parent, timeout_s))
        self._counters.add(PeersStats(fetches=1))
        return found

    def room(self, peer: PeerAddress, pool: MemPool, keys: Sequence[BlockKey]) -> Located:
        """How many of `keys`, from the front, the peer holds, and how much room its pool has.

        The peer makes the pool if it has none. Raises as `transfer_with_insert`.
        """
        remote = self._use(peer, pool).remote
        remote.connection()
        return _as_located(peer, remote.ask(Locate(pool.layout.digest, tuple(keys))))

    # ---- events

    def gone(self, epoch: Epoch) -> None:
        """That process is known to be gone: fence it, then free what it held. Returns at once."""
        self._server.gone(epoch)
        self._table.drop(epoch)
        self._sweeper.wake()

    def resized(self, pool: MemPool) -> None:
        """The arena of `pool` has another size: register it anew.

        Raises TransferTimeout if a peer is still copying: the memory that was taken back is not free yet.
        """
        self._pools.resized(pool)

    def stats(self) -> PeersStats:
        """All counts of one moment."""
        quarantined = self._server.num_quarantined() + self._quarantined.num_blocks()
        return self._counters.stats(quarantined, self._regions.num_reopened)

    def close(self) -> None:
        """Stop answering, end the running exchanges, close the transports and the endpoint. Idempotent.

        The pools stay the caller's, without any reservation or lease of a peer.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._endpoint.close()
        self._fetches.close()
        self._evacuations.close()
        self._pool_maker.close()
        self._sweeper.close()
        self._table.close()
        self._regions.close()
        self._server.close()
        self._quarantined.close()

    def _use(self, peer: PeerAddress, pool: MemPool) -> PeerHandle:
        self._pools.add(pool)
        return self._table.use(peer, pool)

    def _counted(self, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except MemServeError as error:
            if not isinstance(error, PeerDeclined):
                self._counters.add(PeersStats(failures=1))
            raise
        finally:
            if self._quarantined.num_blocks():
                self._sweeper.wake()

    def _answer(self, message: Message) -> Message | Future[Message]:
        """Control thread."""
        layout = message.layout if isinstance(message, Hello) else None
        if layout is not None and self._pools.get(layout.digest) is None:
            future = self._pool_maker.submit(lambda: self._server.answer(message))
            refusal = f"{self._config.max_hellos} pools are being made"
            return Declined(refusal) if future is None else future
        if isinstance(message, Fetch):
            return self._fetches.answer(message, self._pools.get(message.layout))
        if isinstance(message, Evacuate):
            return self._evacuations.answer(message, self._pools.get(message.layout))
        answer = self._server.answer(message)
        if isinstance(message, _WITH_DEADLINE):
            self._sweeper.expect(min(self._config.reservation_s, self._config.lease_s))
        return answer

    def _sweep(self) -> float:
        return min(self._server.sweep(), self._quarantined.sweep())


def _as_located(peer: PeerAddress, answer: Message) -> Located:
    if not isinstance(answer, Located):
        raise WireMismatch(f"{peer} did not say what it holds: {type(answer).__name__}")
    return answer
