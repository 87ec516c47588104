"""Two processes' worth of `Peers` over real sockets in one process, and hooks where things go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from memserve.core.errors import LayoutMismatch
from memserve.core.ids import Epoch
from memserve.core.kv_layout import KVLayout
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.config import PeersConfig
from memserve.mempool.remote.peers import Peers
from memserve.peering.endpoint import TransferEndpoint
from memserve.peering.remote_process import PeerAddress
from memserve.testing.faulty_link import Faults, FaultyLink
from memserve.transport.base import Peer, Transport
from memserve.transport.copies import Copies
from memserve.transport.registry import TransportConfig, open_transports
from memserve.wire.link import ControlClient

from ..harness import content, keys_of, make_pool

NUM_SLOTS = 12
TIMEOUT_S = 5.0


def nothing() -> None:
    """What a hook does unless it is told otherwise."""


@dataclass
class Hooks:
    """Called around the next copies that a process makes."""

    before_copy: Callable[[], None] = nothing
    after_copy: Callable[[], None] = nothing


def hooked(transport: Transport, hooks: Hooks) -> Transport:
    """The same transport, with something happening before and after its copies."""
    for verb in ("write", "read"):
        inner = getattr(transport, verb)

        def copy(peer: Peer, copies: Copies, *, timeout_s: float, inner: Callable[..., None] = inner) -> None:
            hooks.before_copy()
            inner(peer, copies, timeout_s=timeout_s)
            hooks.after_copy()

        setattr(transport, verb, copy)
    return transport


@dataclass
class End:
    """One of the two."""

    pool: MemPool
    peers: Peers
    faults: Faults
    hooks: Hooks
    peer: PeerAddress = field(init=False)
    """How the other reaches it."""

    def __post_init__(self) -> None:
        self.peer = self.peers.address

    def has(self, prompt: Sequence[int]) -> int:
        """How many blocks of a prompt are cached here, each of them checked."""
        keys = keys_of(prompt)
        match = self.pool.match(keys)
        for key, addr in zip(match.keys, match.addrs, strict=True):
            assert self.pool.block(addr) == content(key)
        return len(match)

    def assert_clean(self) -> None:
        """No block is anywhere but free or cached, nothing is held."""
        stats = self.pool.stats()
        assert (stats.private, stats.reserved, stats.quarantined, stats.leases) == (0, 0, 0, 0)
        assert self.peers.stats().quarantined == 0


def start(
    transport: TransportConfig | None = None,
    config: PeersConfig | None = None,
    *,
    pool: MemPool | None = None,
    before_pool_of: Callable[[], object] = nothing,
) -> End:
    """A process's end: `tcp` unless the config says otherwise."""
    transport = transport or TransportConfig("tcp")
    held = pool or make_pool(NUM_SLOTS)
    faults, hooks = Faults(), Hooks()
    key = transport.cluster_key()
    endpoint = TransferEndpoint(
        transport, lambda address: FaultyLink(ControlClient(address, key=key), faults)
    )

    def opened(epoch: Epoch) -> list[Transport]:
        return [hooked(one, hooks) for one in open_transports(transport, key, epoch)]

    def pool_of(layout: KVLayout) -> MemPool:
        before_pool_of()
        differences = held.layout.differences(layout)
        if differences:
            raise LayoutMismatch("; ".join(differences))
        return held

    peers = Peers(endpoint, opened, pool_of, config or PeersConfig(timeout_s=TIMEOUT_S))
    return End(held, peers, faults, hooks)


def end(transport: str = "tcp", **settings: float) -> End:
    """As `start`, with other settings and less patience."""
    config = PeersConfig(**{"timeout_s": 1.0, **settings})
    return start(TransportConfig(transport), config)  # type: ignore[arg-type]


def once(hooks: Hooks, name: str, action: Callable[[], None]) -> None:
    """Have a hook do something the next time it is called, and nothing after that."""

    def run() -> None:
        setattr(hooks, name, nothing)
        action()

    setattr(hooks, name, run)


@contextmanager
def running(*ends: End) -> Iterator[None]:
    """Close them in the end, and see that nothing is left in their pools."""
    try:
        yield
    finally:
        for end in ends:
            end.peers.close()
    for end in ends:
        end.assert_clean()
