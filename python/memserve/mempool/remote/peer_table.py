"""The pools of peers that this process has spoken to, and how two processes are wired together.

Knows no messages.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from memserve.core.errors import PeerDeclined
from memserve.core.ids import Epoch
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.config import PeerAddress, PeersConfig
from memserve.mempool.remote.connection import Connect, RemotePool
from memserve.mempool.remote.local_regions import LocalRegions, OpenTransports
from memserve.mempool.remote.reader import QuarantinedReads, Reader
from memserve.mempool.remote.records import Counters
from memserve.mempool.remote.sender import Sender
from memserve.transport.base import Transport
from memserve.transport.registry import TransportConfig, open_transports
from memserve.wire.link import ControlClient


@dataclass(frozen=True, slots=True)
class PeerFactory:
    """How bytes and messages reach peers; a test may put something in between."""

    open_transports: OpenTransports
    connect: Connect

    @classmethod
    def of(cls, config: PeersConfig) -> PeerFactory:
        """The real one."""

        def opened(epoch: Epoch) -> Sequence[Transport]:
            protocol, devices = config.mooncake_protocol, config.ib_device
            place = TransportConfig(epoch, config.host, config.cluster_key, 0, protocol, devices)
            return open_transports(config.transport, place)

        return cls(opened, lambda address: ControlClient(address, key=config.cluster_key))


@dataclass(frozen=True, slots=True)
class PeerHandle:
    """A peer's pool of one layout, and what is done with it."""

    remote: RemotePool
    sender: Sender
    reader: Reader


class PeerTable:
    """Peers' pools by address and layout. Any thread."""

    def __init__(
        self,
        own: tuple[Epoch, LocalRegions],
        connect: Connect,
        doubtful: QuarantinedReads,
        tally: Counters,
        timeout_s: float,
    ) -> None:
        self._own = own
        self._connect = connect
        self._doubtful = doubtful
        self._tally = tally
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._known: dict[tuple[PeerAddress, bytes], PeerHandle] = {}
        self._is_closed = False

    def use(self, peer: PeerAddress, pool: MemPool) -> PeerHandle:
        """That peer's pool of such blocks. Raises PeerDeclined after `close`."""
        key = (peer, pool.layout.digest)
        with self._lock:
            if self._is_closed:
                raise PeerDeclined(str(peer), "this end is closed")
            if key not in self._known:
                remote = RemotePool(peer, pool, self._own, self._connect, self._timeout_s)
                sender = Sender(remote, self._next_id)
                reader = Reader(remote, self._next_id, self._doubtful, self._tally)
                self._known[key] = PeerHandle(remote, sender, reader)
            return self._known[key]

    def drop(self, epoch: Epoch) -> None:
        """Let go of that process; what runs ends as it would."""
        with self._lock:
            remotes = [self._known.pop(key).remote for key in list(self._known) if key[0].epoch == epoch]
        for remote in remotes:
            remote.close()

    def close(self) -> None:
        """Let go of all, and know nobody any more. Idempotent."""
        with self._lock:
            self._is_closed = True
            known, self._known = self._known, {}
        for one in known.values():
            one.remote.close()

    def _next_id(self) -> int:
        return next(self._ids)
