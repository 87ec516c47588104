"""A pool's report keeps the router's tree true, whatever is lost on the way, and within a second.

Real messages over a real control link; what is lost, and the time, are the test's.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from functools import reduce
from operator import xor

import pytest

from memserve.core.block_addr import Tier
from memserve.core.block_keys import page_keys
from memserve.core.cache_events import Snapshot, Stored
from memserve.core.caching import CachingMode
from memserve.core.ids import InstanceId, new_epoch
from memserve.core.kv_layout import KVLayout, Part
from memserve.instance.publisher import ReportSource, SyncSession
from memserve.mempool.arena import Arena
from memserve.mempool.pool import MemPool
from memserve.router.cluster.config import ClusterConfig
from memserve.router.cluster.pools import Pools
from memserve.router.kv_events.synchronizer import TreeSynchronizer
from memserve.scheduling.prompt_tree.tree import AuditResult, GlobalPromptTree
from memserve.testing.fake_clock import FakeClock
from memserve.testing.faulty_link import Fault, Faults, FaultyLink
from memserve.wire.link import ControlClient, ControlServer
from memserve.wire.messages import Message, PoolEvents, PoolInfo, Role, SnapshotPart

LAYOUT = KVLayout("model", 1, 1, (Part(1, 4),) * 2, "float32", 4)
PREFILL = InstanceId("prefill")
STEP_S = 0.02
HEARTBEAT_S = 1.0
PROMISED_S = 1.0
"""So long, a router may believe in a block that is gone."""


class Stage:
    """A pool that reports to a router. Time passes where somebody waits, and the pool changes meanwhile."""

    def __init__(self, arenas: tuple[Arena, Arena], *, audit_s: float = 60.0) -> None:
        self.clock = FakeClock()
        self.faults = Faults()
        self.audit_s = audit_s
        self.epoch = new_epoch()
        self.pool = MemPool(LAYOUT, arenas[0], self.epoch, others={Tier.HBM: arenas[1]})
        self.busy = True
        self.is_watched = True
        self.worst_s = 0.0
        """How long the tree has been behind, at most."""
        self.num_events = 0
        self._random = random.Random(5)
        self._plan: list[tuple[float, Callable[[], object]]] = []
        self._unseen: deque[tuple[int, float]] = deque()
        self._prompts: list[list[int]] = []
        self.restart_router()
        self.register()
        self._server = ControlServer("127.0.0.1", 0, self._answer)
        self._client = ControlClient(self._server.address)
        self._link = FaultyLink(self._client, self.faults, on_lost=self._live)

    def close(self) -> None:
        self._client.close()
        self._server.close()

    def restart_router(self) -> None:
        """It knows nobody."""
        self.pools = Pools(ClusterConfig(heartbeat_secs=HEARTBEAT_S), self.clock)
        self.feed = TreeSynchronizer(
            GlobalPromptTree(clock=self.clock), self.pools, audit_s=self.audit_s, clock=self.clock
        )

    def register(self) -> None:
        info = PoolInfo(PREFILL, self.epoch, Role.PREFILL, CachingMode.FULL, "127.0.0.1:1", "layout", "boot")
        self.pools.register(info)

    def run(self, seconds: float) -> None:
        """SyncSession for so long, from the beginning."""
        until_s = self.clock() + seconds

        def wait(wait_s: float) -> bool:
            self._live(wait_s)
            return self.clock() >= until_s

        source = ReportSource(self.epoch, self.pool.take_events, self.pool.snapshot)
        SyncSession(self._link, source, wait).run()

    def at(self, seconds: float, what: Callable[[], object]) -> None:
        """Do that so long from now."""
        self._plan.append((self.clock() + seconds, what))

    def compare(self) -> AuditResult:
        return self.feed.synced_tree().compare(PREFILL, self.pool.snapshot())

    def assert_true(self) -> None:
        truth = self.compare()
        assert (truth.lag, truth.phantoms, truth.reported - truth.both) == (0, 0, 0)
        chains = self.pool.snapshot().chains
        for tier, digest in self.feed.synced_tree().digest(PREFILL).items():
            names = [int.from_bytes(key[:8], "big") for one in chains if one.tier == tier for key in one.keys]
            assert digest == (len(names), reduce(xor, names, 0))

    def _answer(self, message: Message) -> Message:
        if isinstance(message, PoolEvents):
            self.num_events += len(message.events)
            return self.feed.events(message)
        assert isinstance(message, SnapshotPart)
        return self.feed.part(message)

    def _live(self, seconds: float) -> None:
        end_s = self.clock() + seconds
        while (left_s := end_s - self.clock()) > 1e-9:
            self.clock.advance(min(STEP_S, left_s))
            if self.busy:
                self._churn()
            for when_s, what in [each for each in self._plan if each[0] <= self.clock()]:
                self._plan.remove((when_s, what))
                what()
            if self.is_watched:
                self._watch()

    def _churn(self) -> None:
        """Prompts come, the eldest go, the ends of a few are corrupt, and now and then all of them."""
        chosen = self._random.random()
        if chosen < 0.005:
            self.pool.clear()
        elif chosen < 0.1 and self._prompts:
            self._corrupt(self._random.choice(self._prompts))
        else:
            shared = self._random.choice(self._prompts) if self._prompts else []
            prompt = shared[: self._random.randrange(6)] + self._random.choices(range(50), k=6)
            self._prompts = [*self._prompts[-30:], prompt]
            self._store(prompt, self._random.choice([Tier.HBM, Tier.DRAM]))

    def _store(self, prompt: list[int], tier: Tier) -> None:
        keys, addrs = page_keys(prompt, 1), self.pool.alloc_mem(len(prompt), tier)
        self.pool.seal(addrs)
        inserted = self.pool.insert(keys, addrs)
        self.pool.free_mem([*inserted.duplicates, *inserted.orphans])

    def _corrupt(self, prompt: list[int]) -> None:
        with self.pool.acquire(self.pool.match(page_keys(prompt, 1))) as lease:
            if len(lease):
                self.pool.block(lease.addrs[-1])[0] ^= 1
                assert self.pool.verify(lease) == len(lease) - 1

    def _watch(self) -> None:
        """What happens now has a number; how long ago is the first that the tree has not heard of?"""
        sequence = self.pool.snapshot().sequence
        if sequence > (self._unseen[-1][0] if self._unseen else 0):
            self._unseen.append((sequence, self.clock()))
        heard = -self.feed.synced_tree().compare(PREFILL, Snapshot(0, ())).lag
        while self._unseen and self._unseen[0][0] <= heard:
            self._unseen.popleft()
        if self._unseen:
            self.worst_s = max(self.worst_s, self.clock() - self._unseen[0][1])
        truth = self.compare()
        assert truth.lag or (truth.precision, truth.recall) == (1.0, 1.0)


@pytest.fixture
def arenas() -> Iterator[tuple[Arena, Arena]]:
    arenas = Arena(LAYOUT.block_bytes, 60), Arena(LAYOUT.block_bytes, 40)
    yield arenas
    for arena in arenas:
        arena.close()


@pytest.fixture
def stage(arenas: tuple[Arena, Arena]) -> Iterator[Stage]:
    stage = Stage(arenas, audit_s=3.0)
    yield stage
    stage.close()


def quieten(stage: Stage) -> None:
    stage.faults.clear()
    stage.busy = False


def test_one_message_in_a_hundred_may_be_lost_and_no_phantom_lives_a_second(stage: Stage) -> None:
    stage.faults.lose(0.01, PoolEvents, SnapshotPart)
    stage.at(60, lambda: quieten(stage))
    stage.run(61)
    stage.assert_true()
    assert stage.num_events > 4000
    assert stage.faults.num_lost > 20
    assert 0.2 < stage.worst_s < PROMISED_S
    counters = stage.feed.synced_tree().stats().counters
    assert counters.resets == 1, "what was lost cost no snapshot"
    assert (counters.orphans, counters.refused) == (0, 0)
    assert stage.feed.counters().audits > 15
    assert stage.feed.counters().untrue_audits == 0


def test_tree_converges_over_a_faulty_link_and_never_holds_wrong_blocks(stage: Stage) -> None:
    stage.faults.lose(0.2, PoolEvents, SnapshotPart)
    stage.faults.expect(None, *[Fault.DOUBLE, Fault.DELAY] * 10)
    stage.at(60, lambda: quieten(stage))
    stage.at(62, stage.faults.land)
    stage.run(63)
    stage.assert_true()
    assert stage.feed.counters().untrue_audits == 0


@pytest.mark.parametrize("away_s", [0, 3], ids=["registered again at once", "later"])
def test_idle_publisher_detects_a_router_that_lost_its_state(stage: Stage, away_s: float) -> None:
    stage.at(2, lambda: quieten(stage))
    stage.at(4, stage.restart_router)
    stage.at(4 + away_s, stage.register)
    stage.run(4 + away_s + 1.2)
    stage.assert_true()


def test_publisher_sends_no_snapshot_after_a_minute_without_router(stage: Stage) -> None:
    seen: list[int] = []
    stage.at(2, lambda: stage.faults.lose(1.0, PoolEvents, SnapshotPart))
    for seconds in (2, 62):
        stage.at(seconds, lambda: seen.append(stage.faults.num_seen))
    stage.at(62, stage.faults.clear)
    stage.at(66, lambda: quieten(stage))
    stage.run(67)
    stage.assert_true()
    assert seen[1] - seen[0] < 40, "a router that is away is not called more and more"
    assert stage.feed.synced_tree().stats().counters.resets == 1


def test_audit_detects_and_repairs_a_wrong_tree(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    def invent() -> None:
        quieten(stage)
        held = stage.pool.snapshot()
        chains = (*held.chains[1:], Stored(0, Tier.DRAM, None, tuple(page_keys([99] * 7, 1))))
        stage.feed.synced_tree().reset(PREFILL, stage.epoch, Snapshot(held.sequence, chains))
        assert stage.compare().phantoms >= 7
        stage.is_watched = False

    found: list[AuditResult] = []
    stage.at(stage.audit_s + 1, invent)
    stage.at(2 * stage.audit_s + 2, lambda: found.append(stage.feed.audit_results()[PREFILL]))
    stage.run(2 * stage.audit_s + 3)
    stage.assert_true()
    assert found[0].phantoms >= 7
    assert found[0].precision < 1
    assert stage.feed.counters().untrue_audits == 1
    assert "prompt tree was wrong" in caplog.text
