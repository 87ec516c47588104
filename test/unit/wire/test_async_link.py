"""Request and answer over ZMQ from an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import pytest
import uvloop

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import InstanceLost
from memserve.core.ids import Epoch, InstanceId
from memserve.wire.async_link import AsyncControlClient
from memserve.wire.link import ControlServer
from memserve.wire.messages import Heartbeat, Message, Refused

KEY = ClusterKey(b"0123456789abcdef")
OTHER_KEY = ClusterKey(b"fedcba9876543210")
SOON_S = 0.2
LATE_S = 10.0


def beat(name: str) -> Heartbeat:
    return Heartbeat(InstanceId(name), Epoch(1))


def echo(message: Message) -> Message:
    assert isinstance(message, Heartbeat)
    return Refused(message.instance_id)


def run(
    test: Callable[[AsyncControlClient, ControlServer], Coroutine[Any, Any, None]],
    handler: Callable[[Message], Message | Future[Message]] = echo,
    keys: tuple[ClusterKey | None, ClusterKey | None] = (None, None),
) -> None:
    async def body() -> None:
        server, client = ControlServer("127.0.0.1", 0, handler, key=keys[0]), AsyncControlClient(key=keys[1])
        try:
            await test(client, server)
        finally:
            client.close()
            server.close()

    uvloop.run(body())


@pytest.mark.parametrize("keys", [(None, None), (KEY, KEY)])
def test_a_request_gets_its_answer(keys: tuple[ClusterKey | None, ClusterKey | None]) -> None:
    async def test(client: AsyncControlClient, server: ControlServer) -> None:
        answers = (client.request(server.address, beat(f"{i}"), timeout_s=LATE_S) for i in range(50))
        assert await asyncio.gather(*answers) == [Refused(f"{i}") for i in range(50)]

    run(test, keys=keys)


def test_a_slow_answer_delays_no_other() -> None:
    slow: Future[Message] = Future()

    async def test(client: AsyncControlClient, server: ControlServer) -> None:
        waiting = asyncio.create_task(client.request(server.address, beat("slow"), timeout_s=LATE_S))
        assert await client.request(server.address, beat("quick"), timeout_s=LATE_S) == Refused("quick")
        slow.set_result(Refused("at last"))
        assert await waiting == Refused("at last")

    run(test, lambda message: slow if message == beat("slow") else echo(message))


def test_async_client_times_out_and_drops_the_late_answer() -> None:
    late: Future[Message] = Future()

    async def test(client: AsyncControlClient, server: ControlServer) -> None:
        with pytest.raises(InstanceLost):
            await client.request(server.address, beat("late"), timeout_s=SOON_S)
        late.set_result(Refused("late"))
        assert await client.request(server.address, beat("next"), timeout_s=LATE_S) == Refused("next")

    run(test, lambda message: late if message == beat("late") else echo(message))


@pytest.mark.parametrize("keys", [(KEY, OTHER_KEY), (KEY, None)])
def test_another_key_gets_no_answer(keys: tuple[ClusterKey | None, ClusterKey | None]) -> None:
    async def test(client: AsyncControlClient, server: ControlServer) -> None:
        with pytest.raises(InstanceLost):
            await client.request(server.address, beat("a"), timeout_s=SOON_S)

    run(test, keys=keys)


def test_a_server_that_comes_back_is_reached_again() -> None:
    async def test(client: AsyncControlClient, server: ControlServer) -> None:
        server.close()
        with pytest.raises(InstanceLost):
            await client.request(server.address, beat("a"), timeout_s=SOON_S)
        again = ControlServer("127.0.0.1", server.port, echo)
        try:
            client.forget(server.address)
            assert await client.request(again.address, beat("b"), timeout_s=LATE_S) == Refused("b")
        finally:
            again.close()

    run(test)
