"""Kept connections that break, as an instance closes them: RFC 9112, 9.3.1 and 9.5."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from memserve.router.proxy.config import ProxyConfig
from memserve.router.proxy.connection_pool import (
    Connection,
    ConnectionPool,
    UpstreamExchange,
    UpstreamUnresponsive,
    read_whole,
)
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker, ReceivedRequest
from memserve.wire.messages import Role

from ..harness import Stage, pair, staged
from .retry_harness import Ask, metric

REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nwell"
CLOSES = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nwell"
OLD = b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nwell"


def kept_for(seconds: int) -> bytes:
    return ANSWER.replace(b"\r\n\r\n", b"\r\nKeep-Alive: max=9, timeout=%d\r\n\r\n" % seconds)


class Instance:
    """Answers each request on each connection as told; `None` closes without an answer, `()` waits."""

    def __init__(self, *connections: list[Any]) -> None:
        self.num_connections = 0
        self.has_request = asyncio.Event()
        self._told = list(connections)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told = self._told[self.num_connections]
        self.num_connections += 1
        try:
            for answer in told:
                await reader.readexactly(len(REQUEST))
                self.has_request.set()
                if answer == ():
                    await reader.read()
                writer.write(answer or b"")
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def pool_to(instance: Instance) -> AsyncIterator[tuple[ConnectionPool, str]]:
    server = await asyncio.start_server(instance.serve, "127.0.0.1", 0)
    pool = ConnectionPool(ssl.create_default_context(), ProxyConfig())
    async with server:
        yield pool, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        pool.close()


async def ask(pool: ConnectionPool, url: str) -> tuple[int, bytes]:
    exchange, is_answered = UpstreamExchange(pool, url), False
    try:
        answer = await exchange.begin(REQUEST, read_whole)
        is_answered = True
        return answer
    finally:
        assert exchange.was_sent
        exchange.leave(is_answered=is_answered)


@pytest.mark.parametrize("has_ended", [True, False])
async def test_request_on_a_kept_connection_that_breaks_unanswered_is_sent_on_a_new_one(
    has_ended: bool,
) -> None:
    """Whether the instance closes the connection before the next request, or as it comes."""
    instance = Instance([ANSWER] if has_ended else [ANSWER, None], [ANSWER])
    async with pool_to(instance) as (pool, url):
        for _ in range(2):
            assert await ask(pool, url) == (200, b"well")
        assert instance.num_connections == 2


async def test_request_is_not_sent_on_a_second_kept_connection() -> None:
    instance = Instance([ANSWER, None], [ANSWER, None], [ANSWER])
    async with pool_to(instance) as (pool, url):
        await asyncio.gather(ask(pool, url), ask(pool, url))
        assert await ask(pool, url) == (200, b"well")
        assert instance.num_connections == 3


async def test_request_on_a_new_connection_that_breaks_is_not_sent_again() -> None:
    instance = Instance([None], [ANSWER])
    async with pool_to(instance) as (pool, url):
        with pytest.raises(ConnectionError):
            await ask(pool, url)
        assert instance.num_connections == 1


@pytest.mark.parametrize("end", range(1, len(ANSWER)))
async def test_request_whose_answer_has_begun_is_not_sent_again(end: int) -> None:
    instance = Instance([ANSWER, ANSWER[:end]], [ANSWER])
    async with pool_to(instance) as (pool, url):
        await ask(pool, url)
        with pytest.raises(ConnectionError):
            await ask(pool, url)
        assert instance.num_connections == 1


async def test_request_of_an_unresponsive_instance_is_not_sent_again() -> None:
    instance = Instance([ANSWER, ()], [ANSWER])
    async with pool_to(instance) as (pool, url):
        await ask(pool, url)
        instance.has_request.clear()
        asked = asyncio.create_task(ask(pool, url))
        await instance.has_request.wait()
        pool.abandon(url, "no heartbeat")
        with pytest.raises(UpstreamUnresponsive):
            await asked
        assert instance.num_connections == 1


@pytest.mark.parametrize(
    ("answer", "num_connections"),
    [(CLOSES, 2), (OLD, 2), (kept_for(1), 2), (kept_for(0), 2), (kept_for(60), 1), (ANSWER, 1)],
)
async def test_connection_is_kept_as_the_instance_says(answer: bytes, num_connections: int) -> None:
    instance = Instance([answer, answer], [answer, answer])
    async with pool_to(instance) as (pool, url):
        for _ in range(2):
            assert await ask(pool, url) == (200, b"well")
        assert instance.num_connections == num_connections


async def test_answer_of_a_stream_is_read_from_the_new_connection() -> None:
    instance = Instance([ANSWER, None], [ANSWER])

    async def begun(connection: Connection) -> bytes:
        await connection.answered()
        return await connection.next()

    async with pool_to(instance) as (pool, url):
        await ask(pool, url)
        assert await UpstreamExchange(pool, url).begin(REQUEST, begun) == b"well"


class Closing(FakeWorker):
    """Closes each connection after the answer, without a word of it."""

    async def _answer(self, request: web.Request, received: ReceivedRequest) -> web.StreamResponse:
        response = await FakeWorker._answer(self, request, received)
        if not response.prepared:
            await response.prepare(request)
        await response.write_eof()
        assert isinstance(request.transport, asyncio.Transport)
        request.transport.close()
        return response


async def posted(stage: Stage, path: str, body: Any) -> int:
    async with stage.client.post(stage.url(path), json=body) as response:
        await response.read()
        return response.status


@pytest.mark.parametrize("is_pair", [False, True])
async def test_worker_that_closes_each_connection_after_its_answer_loses_no_request(is_pair: bool) -> None:
    workers = [Closing(Role.PREFILL), Closing(Role.DECODE)] if is_pair else [Closing()]
    bodies: list[tuple[str, Any]] = [("/generate", {"text": "a", "stream": one}) for one in (True, False)]
    if not is_pair:
        bodies.append(("/v1/embeddings", {"input": "a"}))
    async with staged(*workers, cb_failure_threshold=1, retry_max_retries=0) as stage:
        for _ in range(8):
            asked = [posted(stage, path, body) for path, body in bodies for _ in range(4)]
            assert set(await asyncio.gather(*asked)) == {200}
        assert all(len(one.requests) == 8 * 4 * len(bodies) for one in workers)
        assert stage.is_ready()


@pytest.mark.parametrize("is_kept", [False, True])
async def test_worker_that_drops_every_request_is_lost_on_a_new_connection(is_kept: bool) -> None:
    worker = FakeWorker()
    async with staged(worker, retry_max_retries=0) as stage:
        if is_kept:
            assert (await Ask(stage, body={"text": "a"}).task)[0] == 200
        worker.script, before = Script(drop_before=0), len(worker.requests)
        assert (await Ask(stage, body={"text": "a"}).task)[0] == 503
        assert len(worker.requests) - before == 1 + is_kept


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE, Role.COLOCATED])
async def test_request_that_ends_servers_over_kept_connections_is_rejected(role: Role, stream: bool) -> None:
    workers = [FakeWorker(role, is_mortal=True) for _ in range(4)]
    others = [one for one in pair() if Role.COLOCATED not in (role, one.role) and one.role is not role]
    async with staged(*others, *workers, policy="round_robin", retry_initial_backoff_ms=1) as stage:
        while not all(one.requests for one in workers):
            assert (await Ask(stage, body={"text": "hello"}).task)[0] == 200
        for one in workers:
            one.requests.clear()
            one.script = Script(drop_before=0)
        for one in others:
            one.script = Script(gates={0: asyncio.Event()})
        status, answer = await Ask(stage, body={"text": "poison", "stream": stream}).task
        assert (status, json.loads(answer)["error"].get("code")) == (502, "request_ended_servers")
        assert sum(bool(one.requests) for one in workers) == 2
        assert await metric(stage, "memserve_router_harmful_total 1.0")
