"""A pool knows the others, through routers that stay, go away and forget."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import pytest

from memserve.core.caching import CachingMode
from memserve.core.ids import Epoch, InstanceId
from memserve.instance import registration as presence
from memserve.instance.membership import Membership
from memserve.router.cluster.config import ClusterConfig
from memserve.router.cluster.control import answer
from memserve.router.cluster.pools import Pools
from memserve.router.cluster.registry import InstanceRegistry
from memserve.testing.fake_clock import FakeClock
from memserve.wire.link import ControlClient, ControlServer
from memserve.wire.messages import (
    DeregisterPool,
    Message,
    PoolHeartbeat,
    PoolInfo,
    Refused,
    RegisterPool,
    Role,
)

WAIT_S = 10.0
FOREVER_S = 1000.0
"""Longer than any grace."""


def pool(
    name: str, epoch: int, role: Role = Role.DECODE, layout: str = "aa", bootstrap: str = ""
) -> PoolInfo:
    address = f"127.0.0.1:{1000 + epoch}"
    return PoolInfo(InstanceId(name), Epoch(epoch), role, CachingMode.FULL, address, layout, bootstrap)


ME, A, B = pool("me", 1), pool("a", 2), pool("b", 3)


class StubRouter:
    """The router's own book-keeping and answers behind a real socket; its clock stands still."""

    def __init__(self, *pools: PoolInfo, port: int = 0) -> None:
        self.heard: queue.Queue[Message] = queue.Queue()
        self.refusal: str | None = None
        self._lock = threading.Lock()
        self._cluster = InstanceRegistry(ClusterConfig(heartbeat_secs=0.01), FakeClock())
        self._pools = Pools(ClusterConfig(heartbeat_secs=0.01), FakeClock())
        for info in pools:
            self._pools.register(info)
        self._server = ControlServer("127.0.0.1", port, self._handle)
        self.address, self.port = self._server.address, self._server.port

    def change(self, *, come: tuple[PoolInfo, ...] = (), go: tuple[PoolInfo, ...] = ()) -> None:
        """Pools register and deregister, at once as others see it. What was heard before is forgotten."""
        with self._lock:
            while not self.heard.empty():
                self.heard.get()
            for info in go:
                self._pools.deregister(info.epoch)
            for info in come:
                self._pools.register(info)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for what a message from a pool brings about."""
        while not condition():
            self.heard.get(timeout=WAIT_S)

    def hear(self, kind: type[Message], times: int = 1) -> None:
        """Wait for so many messages of that kind."""
        while times:
            times -= isinstance(self.heard.get(timeout=WAIT_S), kind)

    def close(self) -> None:
        self._server.close()

    def _handle(self, message: Message) -> Message:
        with self._lock:
            self.heard.put(message)
            if self.refusal is not None:
                return Refused(self.refusal)
            return answer(self._cluster, self._pools, message)


class Stage:
    """A membership, the router it knows, and what it was told to be gone."""

    def __init__(self, *pools: PoolInfo) -> None:
        self.router = StubRouter(*pools)
        self.clock = FakeClock()
        self.gone: queue.Queue[Epoch] = queue.Queue()
        client = ControlClient(self.router.address)
        self.members = Membership(client, ME, on_gone=self.gone.put, clock=self.clock)

    def restart_router(self, *pools: PoolInfo) -> None:
        self.router.close()
        self.router = StubRouter(*pools, port=self.router.port)

    def sees(self, *pools: PoolInfo) -> None:
        """Wait until the view is these, in any order."""
        self.router.until(lambda: set(self.members.pools()) == set(pools))

    def loses(self, *pools: PoolInfo) -> None:
        """Wait until these have been declared gone, and see that nobody else has."""
        assert {self.gone.get(timeout=WAIT_S) for _ in pools} == {info.epoch for info in pools}
        self.loses_nobody()

    def loses_nobody(self) -> None:
        self.router.hear(PoolHeartbeat, times=3)
        assert self.gone.empty()

    def close(self) -> None:
        self.members.close()
        self.router.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(presence, "RETRY_S", 0.01)


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage(A)
    yield stage
    stage.close()


def test_membership_registers_lists_the_other_pools_and_deregisters(stage: Stage) -> None:
    assert stage.router.heard.get(timeout=WAIT_S) == RegisterPool(ME)
    stage.sees(A)
    assert stage.members.registered
    stage.router.change(come=(B,))
    stage.sees(A, B)
    stage.router.hear(PoolHeartbeat)
    stage.close()
    stage.close()
    last = [stage.router.heard.get_nowait() for _ in range(stage.router.heard.qsize())][-1]
    assert last == DeregisterPool(ME.epoch)
    assert stage.gone.empty()


def test_a_pool_that_leaves_is_declared_gone_once(stage: Stage) -> None:
    stage.router.change(come=(B,))
    stage.sees(A, B)
    stage.router.change(go=(A,))
    stage.sees(B)
    stage.loses(A)


def test_restarted_pool_is_gone_and_listed_again(stage: Stage) -> None:
    stage.sees(A)
    again = pool("a", 4)
    stage.router.change(come=(again,))
    stage.sees(again)
    stage.loses(A)


def test_no_pool_is_declared_gone_while_the_router_is_away(stage: Stage) -> None:
    stage.sees(A)
    stage.router.close()
    stage.clock.advance(FOREVER_S)
    # A second router at the same place, which refuses, shows that the member has noticed.
    stage.router = StubRouter(port=stage.router.port)
    stage.router.refusal = "not yet"
    stage.router.hear(RegisterPool, times=2)
    assert stage.members.pools() == (A,)
    assert stage.members.registered
    assert stage.gone.empty()


def test_membership_waits_for_other_pools_after_a_router_restart(stage: Stage) -> None:
    stage.router.change(come=(B,))
    stage.sees(A, B)
    stage.restart_router()
    stage.router.hear(RegisterPool)
    stage.loses_nobody()
    stage.sees(A, B)
    stage.router.change(come=(A,))
    stage.loses_nobody()
    stage.clock.advance(FOREVER_S)
    stage.sees(A)
    stage.loses(B)


def test_pool_that_registered_after_a_router_restart_is_gone_as_soon_as_it_leaves(stage: Stage) -> None:
    stage.sees(A)
    stage.restart_router(A)
    stage.router.hear(RegisterPool)
    stage.loses_nobody()
    stage.router.change(go=(A,))
    stage.sees()
    stage.loses(A)


def test_pool_that_restarted_with_the_router_is_gone_at_once(stage: Stage) -> None:
    stage.sees(A)
    again = pool("a", 4)
    stage.restart_router(again)
    stage.sees(again)
    stage.loses(A)


def test_membership_registers_again_at_a_router_that_forgot_the_pool(stage: Stage) -> None:
    stage.sees(A)
    stage.router.change(go=(ME,))
    stage.router.hear(RegisterPool)
    stage.loses_nobody()
    stage.sees(A)


def test_a_refused_pool_asks_again_and_is_not_registered_before() -> None:
    stage = Stage()
    stage.router.refusal = "another caching mode"
    stage.router.hear(RegisterPool, times=2)
    stage.router.refusal = None
    stage.router.until(lambda: stage.members.registered)
    stage.close()


PREFILL = pool("p", 5, Role.PREFILL, bootstrap="h:1")
PREFILL_RANK_1 = pool("p", 6, Role.PREFILL, layout="bb", bootstrap="h:1")
PREFILL_2 = pool("q", 7, Role.PREFILL, bootstrap="h:2")
MEMORY = pool("m", 8, Role.MEMORY, layout="")
EVERYBODY = (A, PREFILL, PREFILL_RANK_1, PREFILL_2, MEMORY)


@pytest.mark.parametrize(
    ("layout", "roles", "expected"),
    [
        ("aa", [], {A, PREFILL, PREFILL_2, MEMORY}),
        ("bb", [], {PREFILL_RANK_1, MEMORY}),
        ("cc", [], {MEMORY}),
        ("aa", [Role.MEMORY], {MEMORY}),
        ("aa", [Role.MEMORY, Role.DECODE], {MEMORY, A}),
        ("bb", [Role.DECODE], set()),
    ],
)
def test_others_lists_pools_of_the_layout_and_pools_of_any_layout(
    layout: str, roles: list[Role], expected: set[PoolInfo]
) -> None:
    stage = Stage(*EVERYBODY)
    stage.sees(*EVERYBODY)
    assert set(stage.members.others(layout, *roles)) == expected
    stage.close()


def test_a_prefill_is_found_by_its_bootstrap_address_and_blocks() -> None:
    stage = Stage(*EVERYBODY)
    stage.sees(*EVERYBODY)
    assert stage.members.prefill_at("h:1", "aa") == PREFILL
    assert stage.members.prefill_at("h:1", "bb") == PREFILL_RANK_1
    assert stage.members.prefill_at("h:2", "aa") == PREFILL_2
    assert stage.members.prefill_at("h:2", "bb") is None
    assert stage.members.prefill_at("", "aa") is None
    stage.close()
