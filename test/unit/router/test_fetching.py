"""Fetches before dispatch: asked of every rank, bounded in time, and never an error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future

import pytest
import uvloop

from memserve.core.block_keys import page_keys
from memserve.core.caching import CachingMode
from memserve.core.ids import Epoch, InstanceId
from memserve.router.placing.fetching import Fetcher, FetchOutcome, FetchPlan
from memserve.wire.link import ControlServer
from memserve.wire.messages import Done, Message, PoolInfo, Role
from memserve.wire.peer_messages import Fetch, Fetched

KEYS = page_keys(list(range(160)), 16)
A, B = InstanceId("a"), InstanceId("b")
HOLDER = PoolInfo(B, Epoch(9), Role.DECODE, CachingMode.FULL, "holder:1", "aa")

Answer = Message | Future[Message]


def pool(address: str) -> PoolInfo:
    return PoolInfo(A, Epoch(1), Role.PREFILL, CachingMode.FULL, address, "aa")


def outcome_of(*handlers: Callable[[Message], Answer], timeout_s: float = 5.0) -> FetchOutcome:
    """Of a plan whose ranks answer so."""

    async def body() -> FetchOutcome:
        servers = [ControlServer("127.0.0.1", 0, handler) for handler in handlers]
        fetcher = Fetcher(None)
        try:
            links = tuple((pool(server.address), HOLDER) for server in servers)
            return await fetcher.run(FetchPlan(A, B, KEYS, links, timeout_s))
        finally:
            fetcher.close()
            for server in servers:
                server.close()

    return uvloop.run(body())


def test_the_pool_is_told_what_to_fetch_from_whom() -> None:
    asked: list[Message] = []

    def fetch(message: Message) -> Message:
        asked.append(message)
        return Fetched(10)

    outcome = outcome_of(fetch)
    assert (outcome.num_blocks, outcome.reason) == (10, "")
    assert asked == [Fetch(b"\xaa", tuple(KEYS), None, "holder:1", Epoch(9), 5.0)]


@pytest.mark.parametrize(
    ("answers", "num_blocks"),
    [((Fetched(10), Fetched(7, "corrupt")), 7), ((Fetched(10), Done()), 0), ((Fetched(0, "full"),), 0)],
)
def test_the_rank_that_has_least_counts(answers: tuple[Message, ...], num_blocks: int) -> None:
    outcome = outcome_of(*(lambda _, answer=answer: answer for answer in answers))  # type: ignore[misc]
    assert outcome.num_blocks == num_blocks
    assert outcome.reason


def test_a_late_fetch_is_not_waited_for() -> None:
    outcome = outcome_of(lambda _: Future(), timeout_s=0.05)
    assert outcome.num_blocks == 0
    assert "no answer" in outcome.reason


def test_a_pool_that_is_gone_is_not_waited_for_longer() -> None:
    async def body() -> None:
        server = ControlServer("127.0.0.1", 0, lambda _: Fetched(10))
        server.close()
        fetcher = Fetcher(None)
        plan = FetchPlan(A, B, KEYS, ((pool(server.address), HOLDER),), 0.05)
        async with asyncio.timeout(5):
            assert (await fetcher.run(plan)).num_blocks == 0
        fetcher.close()

    uvloop.run(body())
