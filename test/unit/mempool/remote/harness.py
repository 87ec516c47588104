"""Pools with everything that `Peers` is made of, but no thread and no socket: a test moves the time."""

from __future__ import annotations

from memserve.core.errors import InstanceLost, MemServeError
from memserve.core.ids import Epoch
from memserve.mempool.remote.config import PeersConfig
from memserve.mempool.remote.peer_table import PeerHandle, PeerTable
from memserve.mempool.remote.pools import ServedPools
from memserve.mempool.remote.reader import QuarantinedReads
from memserve.mempool.remote.records import Counters, PeersStats
from memserve.mempool.remote.server import PeerServer
from memserve.peering.local_regions import LocalRegions
from memserve.peering.remote_process import OwnSide, PeerAddress
from memserve.testing.fake_clock import FakeClock
from memserve.testing.faulty_link import Faults, FaultyLink
from memserve.wire.messages import Message, Refused, decode, encode

from ..harness import make_pool
from .network import Network

TIMEOUT_S = 60.0
"""Never waited for: nothing here takes time."""
RESERVATION_S = 30.0
LEASE_S = 20.0


class World:
    """Processes by address, and all that lies between them."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.network = Network()
        self.faults = Faults()
        self.nodes: dict[str, Node] = {}
        self._num_epochs = 0

    def start(self, name: str, num_slots: int) -> Node:
        """A process at that address, in the place of any before it."""
        self._num_epochs += 1
        node = Node(self, name, Epoch(self._num_epochs << 33 | 1), num_slots)
        self.nodes[name] = node
        return node

    def link(self, address: str) -> FaultyLink:
        return FaultyLink(_Direct(self, address), self.faults)


class Node:
    """One process."""

    def __init__(self, world: World, name: str, epoch: Epoch, num_slots: int) -> None:
        config = PeersConfig(timeout_s=TIMEOUT_S, reservation_s=RESERVATION_S, lease_s=LEASE_S)
        self.address = PeerAddress(name, epoch)
        self.pool = make_pool(num_slots)
        self.counters = Counters()
        self.regions = LocalRegions(world.network.opener(name), epoch, TIMEOUT_S)
        self.pools = ServedPools(self.regions, lambda _: self.pool)
        self.server = PeerServer(config, epoch, self.regions, self.pools, self.counters, now=world.clock)
        self.quarantined_reads = QuarantinedReads(self.regions, TIMEOUT_S)
        own = OwnSide(epoch, self.regions, world.link, TIMEOUT_S)
        self.table = PeerTable(own, self.pools, self.quarantined_reads, self.counters)

    def to(self, peer: PeerAddress) -> PeerHandle:
        self.pools.add(self.pool)
        return self.table.use(peer, self.pool)

    def sweep(self) -> None:
        self.server.sweep()
        self.quarantined_reads.sweep()

    def num_quarantined(self) -> int:
        return self.server.num_quarantined() + self.quarantined_reads.num_blocks()

    def stats(self) -> PeersStats:
        return self.counters.stats(self.num_quarantined(), self.regions.num_reopened)

    def answer(self, message: Message) -> Message:
        """As a control server does, through bytes and back."""
        try:
            answer = self.server.answer(decode(encode(message)))
        except MemServeError as error:
            answer = Refused(str(error))
        return decode(encode(answer))

    def end(self) -> None:
        """The process is gone, its memory with it."""
        for transport in self.regions.transports:
            transport.close()


class _Direct:
    """A link to whoever is at an address then."""

    def __init__(self, world: World, address: str) -> None:
        self._world = world
        self._address = address

    def request(self, message: Message, *, timeout_s: float) -> Message:
        node = self._world.nodes.get(self._address)
        if node is None:
            raise InstanceLost(self._address, "nobody is there")
        return node.answer(message)

    def close(self) -> None:
        pass
