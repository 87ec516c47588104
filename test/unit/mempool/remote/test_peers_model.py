"""Three pools that exchange blocks while messages and bytes go astray, against what they ought to hold."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memserve.core.errors import (
    InstanceLost,
    MemServeError,
    OutOfBlocks,
    PeerDeclined,
    StaleEpoch,
    TransferFailed,
    TransferTimeout,
)
from memserve.core.kv_layout import TransferMode
from memserve.mempool.remote.config import PeersConfig
from memserve.peering.remote_process import PeerAddress
from memserve.testing.faulty_link import Fault
from memserve.wire.messages import Message
from memserve.wire.peer_messages import AcquireLease, Cancel, Commit, Hello, ReleaseLease, Reserve

from ..harness import content, keys_of, store
from .harness import LEASE_S, RESERVATION_S, Node, World
from .network import Mishap

NAMES = ("a", "b", "c")
NUM_SLOTS = 8
EXPECTED = (InstanceLost, OutOfBlocks, PeerDeclined, StaleEpoch, TransferFailed, TransferTimeout)
"""What a push or a fetch may raise, whatever happens."""

PAIRS = [(one, other) for one in NAMES for other in NAMES if one != other]
pairs = st.sampled_from(PAIRS)
prompts = st.lists(st.integers(0, 2), min_size=1, max_size=5)
kinds = st.sampled_from([None, Hello, Reserve, Commit, Cancel, AcquireLease, ReleaseLease])
faults = st.just([]) | st.lists(st.tuples(kinds, st.sampled_from(Fault)), max_size=4)
mishaps = st.sampled_from([[], [], [Mishap.FAIL], [Mishap.LATE], [Mishap.LATE], [Mishap.TWIST]])
picks = st.integers(0, 99)
Misfortunes = list[tuple[type[Message] | None, Fault]]


class PeersMachine(RuleBasedStateMachine):
    """The model: which prefixes may be where, and that bytes are what their key says."""

    @initialize()
    def open(self) -> None:
        self.world = World()
        self.known: dict[tuple[str, str], PeerAddress] = {}
        for name in NAMES:
            self.world.start(name, NUM_SLOTS)
        for pair in PAIRS:
            self.learn(pair)

    def teardown(self) -> None:
        """When nothing is under way any more, every pool is as if nothing had gone wrong."""
        if not hasattr(self, "world"):
            return
        self.world.faults.clear()
        self.world.network.can_settle = self.world.network.can_fence = True
        self.world.faults.land()
        for node in self.nodes():
            node.sweep()
        self.world.clock.advance(max(LEASE_S, RESERVATION_S) + PeersConfig().retry_s)
        for node in self.nodes():
            node.sweep()
            node.sweep()
            stats = node.pool.stats()
            assert (stats.private, stats.reserved, stats.quarantined, stats.leases) == (0, 0, 0, 0)
            assert stats.reservations == 0
            for token in range(100, 100 + NUM_SLOTS):  # Every slot has a new owner,
                store(node.pool, [token])
        while self.world.network.late:  # who must not see what comes now.
            self.world.network.land(0)
        self.bytes_are_what_the_key_says()
        self.everybody_comes_together_again()

    def everybody_comes_together_again(self) -> None:
        """Whoever was fenced, lost or restarted: after one more try, a push just works."""
        self.world.network.mishaps.clear()
        for pair in PAIRS:
            self.learn(pair)
            sender, receiver = (self.world.nodes[name] for name in pair)
            sender.pool.clear()
            receiver.pool.clear()
            store(sender.pool, [7, 8])

            def attempt(sender: Node = sender, receiver: Node = receiver) -> None:
                sender.to(receiver.address).sender.transfer_with_insert(
                    keys_of([7, 8]), None, TransferMode.AGGREGATED
                )

            if self.raised(attempt) is not None:
                assert self.raised(attempt) is None
            assert receiver.pool.num_cached(keys_of([7, 8])) == 2

    def nodes(self) -> list[Node]:
        return list(self.world.nodes.values())

    def raised(self, attempt: Callable[[], object]) -> MemServeError | None:
        try:
            attempt()
        except EXPECTED as error:
            return error
        finally:
            self.world.faults.clear()
            self.world.network.mishaps.clear()
        return None

    # ---- what happens

    def compute(self, name: str, prompt: list[int]) -> None:
        """Have it cached there, if there is room."""
        try:
            store(self.world.nodes[name].pool, prompt)
        except OutOfBlocks:
            stats = self.world.nodes[name].pool.stats()
            assert stats.free + stats.evictable < len(prompt)

    @rule(
        pair=pairs,
        prompt=prompts,
        start=st.sampled_from([0, 0, 0, 1, 2]),
        faults=faults,
        mishaps=mishaps,
        can_settle=st.booleans(),
    )
    def push(
        self,
        pair: tuple[str, str],
        prompt: list[int],
        start: int,
        faults: Misfortunes,
        mishaps: list[Mishap],
        can_settle: bool,
    ) -> None:
        one, other = pair
        sender, peer = self.world.nodes[one], self.known[pair]
        self.compute(one, prompt)
        keys = keys_of(prompt)
        start = min(start, len(keys) - 1)
        parent = keys[start - 1] if start else None
        keys = keys[start:]
        num_here = sender.pool.num_cached(keys)
        for kind, fault in faults:
            self.world.faults.expect(kind, fault)
        self.world.network.mishaps.extend(mishaps)
        self.world.network.can_settle = can_settle

        def attempt() -> None:
            pushed = sender.to(peer).sender.transfer_with_insert(keys, parent, TransferMode.AGGREGATED)
            receiver = self.world.nodes[other]
            assert receiver.address == peer or num_here == 0
            assert pushed.num_known + pushed.num_sent <= num_here
            assert receiver.pool.num_cached(keys) >= pushed.num_known + pushed.num_sent or num_here == 0
            if not mishaps and receiver.stats().corrupt_in_flight == 0:
                assert pushed.num_known + pushed.num_sent == num_here

        error = self.raised(attempt)
        if not faults and not mishaps and self.is_undisturbed and error is not None:
            assert isinstance(error, PeerDeclined | StaleEpoch), error

    @rule(
        pair=pairs,
        prompt=prompts,
        start=st.sampled_from([0, 0, 0, 1, 2]),
        faults=faults,
        mishaps=mishaps,
        can_settle=st.booleans(),
    )
    def fetch(
        self,
        pair: tuple[str, str],
        prompt: list[int],
        start: int,
        faults: Misfortunes,
        mishaps: list[Mishap],
        can_settle: bool,
    ) -> None:
        one, other = pair
        reader, peer = self.world.nodes[one], self.known[pair]
        self.compute(other, prompt)
        keys = keys_of(prompt)
        start = min(start, len(keys) - 1)
        parent = keys[start - 1] if start else None
        keys = keys[start:]
        for kind, fault in faults:
            self.world.faults.expect(kind, fault)
        self.world.network.mishaps.extend(mishaps)
        self.world.network.can_settle = can_settle

        def attempt() -> None:
            num_there = self.world.nodes[other].pool.num_cached(keys)
            has_parent = parent is None or reader.pool.num_cached([parent]) == 1
            num_fetched = reader.to(peer).reader.fetch(keys, parent, 60.0)
            assert num_fetched == reader.pool.num_cached(keys)
            if has_parent and not mishaps:
                assert num_fetched >= num_there

        error = self.raised(attempt)
        if not faults and not mishaps and self.is_undisturbed and error is not None:
            assert isinstance(error, OutOfBlocks | StaleEpoch), error

    @rule(pair=pairs, num_blocks=st.integers(1, 3), is_kept=st.booleans(), faults=faults)
    def reserve(self, pair: tuple[str, str], num_blocks: int, is_kept: bool, faults: Misfortunes) -> None:
        peer = self.world.nodes[pair[0]].to(self.known[pair])
        keys = keys_of([9] * num_blocks)  # which no prompt contains
        for kind, fault in faults:
            self.world.faults.expect(kind, fault)

        def attempt() -> None:
            granted = peer.remote.exchange(lambda connection: peer.sender.reserve(connection, keys, None))
            if not is_kept:
                peer.sender.cancel(granted)

        self.raised(attempt)

    # ---- what else happens

    @precondition(lambda self: self.world.network.late)
    @rule(pick=picks)
    def late_bytes_land(self, pick: int) -> None:
        self.world.network.land(pick)

    @precondition(lambda self: self.world.faults.num_late)
    @rule(count=st.integers(1, 3))
    def late_messages_arrive(self, count: int) -> None:
        self.world.faults.land(count)

    @rule(seconds=st.sampled_from([PeersConfig().retry_s, LEASE_S, RESERVATION_S]), can_fence=st.booleans())
    def time_passes(self, seconds: float, can_fence: bool) -> None:
        self.world.network.can_fence = can_fence
        self.world.clock.advance(seconds)
        for node in self.nodes():
            node.sweep()

    @rule(pair=pairs)
    def learn(self, pair: tuple[str, str]) -> None:
        one, other = pair
        self.known[one, other] = self.world.nodes[other].address

    @rule(pair=pairs, disaster=st.sampled_from(["gone", "restart", "resize", "", "", ""]))
    def something_happens(self, pair: tuple[str, str], disaster: str) -> None:
        node = self.world.nodes[pair[0]]
        if disaster == "gone":  # Membership says so; it need not be true.
            node.server.gone(self.known[pair].epoch)
            node.table.drop(self.known[pair].epoch)
            node.sweep()
        elif disaster == "restart":
            node.end()
            self.world.start(pair[0], NUM_SLOTS)
        elif disaster == "resize":
            node.pools.resized(node.pool)

    @property
    def is_undisturbed(self) -> bool:
        """Whether nothing has ever gone wrong: no message or byte is late, nobody is gone."""
        return not any(node.stats().fenced or node.num_quarantined() for node in self.nodes())

    # ---- after every step

    @invariant()
    def the_states_add_up(self) -> None:
        for node in self.nodes() if hasattr(self, "world") else []:
            stats = node.pool.stats()
            assert stats.private == 0, "whoever took a block has published or freed it"
            states = (stats.free, stats.cached, stats.reserved, stats.quarantined)
            assert sum(states) == stats.total == NUM_SLOTS
            assert stats.quarantined == node.num_quarantined()

    @invariant()
    def bytes_are_what_the_key_says(self) -> None:
        for node in self.nodes() if hasattr(self, "world") else []:
            for key in [key for chain in node.pool.snapshot().chains for key in chain.keys]:
                (addr,) = node.pool.match([key]).addrs
                assert node.pool.block(addr) == content(key)


TestPeers = PeersMachine.TestCase
TestPeers.settings = settings(max_examples=60, stateful_step_count=50, deadline=None, derandomize=True)
