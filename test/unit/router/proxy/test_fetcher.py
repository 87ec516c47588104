"""Fetches before dispatch: one on every rank, bounded in time, and never an error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future

import pytest
import uvloop

from memserve.core.block_keys import page_keys
from memserve.core.caching import CachingMode
from memserve.core.ids import Epoch, InstanceId
from memserve.router.proxy.fetcher import Fetcher, Links
from memserve.scheduling.fetch_planner import FetchOutcome, FetchPlan
from memserve.wire.link import ControlServer
from memserve.wire.messages import Done, Message, PoolInfo, Role
from memserve.wire.peer_messages import Fetch, Fetched

KEYS = page_keys(list(range(160)), 16)
A, B = InstanceId("a"), InstanceId("b")
HOLDER = PoolInfo(B, Epoch(9), Role.DECODE, CachingMode.FULL, "holder:1", "aa")

Answer = Message | Future[Message]


def pool(address: str) -> PoolInfo:
    return PoolInfo(A, Epoch(1), Role.PREFILL, CachingMode.FULL, address, "aa")


def plan_of(timeout_s: float) -> FetchPlan:
    return FetchPlan(A, B, KEYS, num_there=0, transfer_s=0.1, timeout_s=timeout_s)


def links_of(*servers: ControlServer) -> Links:
    """From the pool of every rank, which these servers are."""
    return tuple((pool(server.address), HOLDER) for server in servers)


def outcome_of(*handlers: Callable[[Message], Answer], timeout_s: float = 5.0) -> FetchOutcome:
    """The outcome of a plan whose ranks answer so."""

    async def body() -> FetchOutcome:
        servers = [ControlServer("127.0.0.1", 0, handler) for handler in handlers]
        fetcher = Fetcher(None)
        try:
            return await fetcher.run(plan_of(timeout_s), links_of(*servers))
        finally:
            fetcher.close()
            for server in servers:
                server.close()

    return uvloop.run(body())


def test_fetch_message_names_keys_holder_and_time_limit() -> None:
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
def test_outcome_is_of_the_rank_with_the_fewest_blocks(answers: tuple[Message, ...], num_blocks: int) -> None:
    outcome = outcome_of(*(lambda _, answer=answer: answer for answer in answers))  # type: ignore[misc]
    assert outcome.num_blocks == num_blocks
    assert outcome.reason


def test_late_fetch_is_not_waited_for() -> None:
    outcome = outcome_of(lambda _: Future(), timeout_s=0.05)
    assert outcome.num_blocks == 0
    assert "no answer" in outcome.reason


def test_fetch_to_a_closed_pool_ends_with_its_time_limit() -> None:
    async def body() -> None:
        server = ControlServer("127.0.0.1", 0, lambda _: Fetched(10))
        server.close()
        fetcher = Fetcher(None)
        async with asyncio.timeout(5):
            assert (await fetcher.run(plan_of(0.05), links_of(server))).num_blocks == 0
        fetcher.close()

    uvloop.run(body())


def test_waiting_requests_get_a_fetch_whose_request_is_cancelled() -> None:
    async def body() -> None:
        came: Future[Message] = Future()
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()

        def fetch(_: Message) -> Future[Message]:
            loop.call_soon_threadsafe(asked.set)
            return came

        server, fetcher = ControlServer("127.0.0.1", 0, fetch), Fetcher(None)
        plan = plan_of(5)
        first = asyncio.create_task(fetcher.run(plan, links_of(server)))
        async with asyncio.timeout(5):
            await asked.wait()
            assert await fetcher.wait(lambda _: False) is None
            second = asyncio.create_task(fetcher.wait(lambda one: one is plan))
            first.cancel()
            await asyncio.wait([first])
            assert not second.done()
            came.set_result(Fetched(10))
            assert await second is not None
            assert await fetcher.wait(lambda _: True) is None, "none is under way any more"
        fetcher.close()
        server.close()

    uvloop.run(body())


@pytest.mark.parametrize("num_shared", [0, 1, 7, 10])
def test_plan_counts_the_leading_keys_it_shares_with_a_prompt(num_shared: int) -> None:
    plan = plan_of(1)
    other = page_keys([1, *range(1, 160)], 16)
    assert plan.num_shared([*KEYS[:num_shared], *other[num_shared:]]) == num_shared
    assert plan.num_shared(KEYS[:num_shared]) == num_shared
