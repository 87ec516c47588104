"""The router's port: plain requests, all others, and both on one connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.router.http.plain_head import plain_head
from memserve.router.http.server import MAX_PIPELINED_BYTES
from memserve.router.request import Api
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import Stage, staged

BODY = json.dumps({"text": "hello", "sampling_params": {"max_new_tokens": 2}}).encode()
STREAM = json.dumps({"text": "hello", "sampling_params": {"max_new_tokens": 2}, "stream": True}).encode()


def request(body: bytes = BODY, *, path: str = "/generate", extra: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


class Wire:
    """A client that sends exactly the given bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, bytes]:
        async with asyncio.timeout(10):
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            status = int(head.split()[1])
            if status == 100:
                return await self.answer()
            if b"transfer-encoding: chunked" in head:
                body = b""
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readexactly(2)
                return status, body
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            return status, await self.reader.readexactly(length)

    async def is_closed(self) -> bool:
        async with asyncio.timeout(10):
            return await self.reader.read() == b""


@asynccontextmanager
async def wired(*workers: FakeWorker) -> AsyncIterator[tuple[Stage, Wire]]:
    async with staged(*(workers or (FakeWorker(Role.COLOCATED),))) as stage:
        port = int(stage.router.url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        yield stage, Wire(reader, writer)
        writer.close()


def run(scene: object) -> None:
    asyncio.run(scene)  # type: ignore[arg-type]


async def test_server_answers_plain_requests_and_keeps_the_connection() -> None:
    async with wired() as (_, wire):
        for _ in range(3):
            wire.send(request(extra="x-request-id: mine\r\n"))
            status, body = await wire.answer()
            assert status == 200
            assert "text" in json.loads(body)


@pytest.mark.parametrize("size", [1, 7, 64])
async def test_server_accepts_a_request_in_any_pieces(size: int) -> None:
    async with wired() as (_, wire):
        data = request() + request(STREAM)
        for start in range(0, len(data), size):
            wire.send(data[start : start + size])
            await wire.writer.drain()
            await asyncio.sleep(0)
        assert (await wire.answer())[0] == 200
        status, events = await wire.answer()
        assert status == 200
        assert events.endswith(b"data: [DONE]\n\n")


async def test_server_answers_pipelined_requests_in_order() -> None:
    async with wired() as (_, wire):
        bodies = [json.dumps({"text": "x", "rid": f"r{i}"}).encode() for i in range(5)]
        wire.send(b"".join(map(request, bodies)))
        for i in range(5):
            status, body = await wire.answer()
            assert (status, json.loads(body)["meta_info"]["id"]) == (200, f"r{i}")


async def test_server_answers_more_pipelined_bytes_than_it_buffers() -> None:
    async with wired() as (_, wire):
        body = json.dumps({"text": "x" * MAX_PIPELINED_BYTES}).encode()
        count = 6
        wire.send(request(body) * count)
        for _ in range(count):
            assert (await wire.answer())[0] == 200


async def test_one_connection_serves_generation_and_other_endpoints() -> None:
    async with wired() as (_, wire):
        page = b"GET /v1/models HTTP/1.1\r\nHost: h\r\n\r\n"
        for data in (request(), page, request(), request(STREAM), page):
            wire.send(data)
            assert (await wire.answer())[0] == 200
        wire.send(request() + page + request())
        for _ in range(3):
            assert (await wire.answer())[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(
            b"POST /generate HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
            % (len(BODY), BODY),
            id="chunked",
        ),
        pytest.param(request(extra="Expect: 100-continue\r\n"), id="expect"),
        pytest.param(request(path="/generate?x=1"), id="query"),
        pytest.param(request().replace(b"POST", b"PUT"), id="put"),
        pytest.param(request(b'{"prompt": "x"}', path="/v1/completions"), id="completions"),
        pytest.param(request(extra="Connection: keep-alive\r\n"), id="keep-alive"),
    ],
)
async def test_aiohttp_answers_generation_requests_that_are_not_plain(data: bytes) -> None:
    async with wired() as (_, wire):
        wire.send(data)
        assert (await wire.answer())[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        "POST /generate HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nContent-Length: 3\r\n",
        "POST /generate HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n",
        "POST /generate HTTP/1.1\r\nHost: h\r\nContent-Length: +2\r\n",
        "POST /generate HTTP/1.1\r\nHost: h\r\nContent-Length: ²\r\n",
        "POST /generate HTTP/1.1\r\nHost: h\r\nContent-Length : 2\r\n",
        "POST /generate HTTP/1.1\r\nHost: h\r\n Content-Length: 2\r\n",
        "POST /generate HTTP/1.1\r\nHost: h\r\nX: a\rb\r\nContent-Length: 2\r\n",
        "POST /generate HTTP/1.1\r\nHost: h\r\nX: a\r\n\tb\r\nContent-Length: 2\r\n",
        "POST /generate HTTP/1.1\r\nHost: h\r\nX: a\nb: c\r\nContent-Length: 2\r\n",
        "POST /generate HTTP/1.1\r\nHost: h\r\nX: \x01\r\nContent-Length: 2\r\n",
        "POST  /generate HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n",
        "POST /generate HTTP/1.1\nHost: h\r\nContent-Length: 2\r\n",
        "POST /generate HTTP/1.0\r\nHost: h\r\nContent-Length: 2\r\n",
        "POST /generate HTTP/1.1\r\nContent-Length: 2\r\n",
        "POST /generate HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nConnection: close\r\n",
        "PUT /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n",
        "GET /generate HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n",
    ],
)
def test_plain_head_returns_none_for_heads_that_are_not_plain(head: str) -> None:
    assert plain_head(head.encode(), 1 << 14) is None


@given(st.binary())
def test_plain_head_accepts_any_bytes_without_an_error(data: bytes) -> None:
    read = plain_head(b"POST /generate HTTP/1.1\r\nHost: h\r\nContent-Length: 12\r\n" + data, 1 << 14)
    if read is not None:
        assert (read[0], read[2]) == (Api.GENERATE, 12)
        assert not any("\r" in value or "\n" in value for value in read[1].values())


async def test_server_refuses_a_too_large_body_before_it_arrives() -> None:
    async with staged(FakeWorker(Role.COLOCATED), max_body_bytes=1000) as stage:
        port = int(stage.router.url.rsplit(":", 1)[1])
        wire = Wire(*await asyncio.open_connection("127.0.0.1", port))
        wire.send(b"POST /generate HTTP/1.1\r\nHost: h\r\nContent-Length: 1001\r\n\r\n")
        assert (await wire.answer())[0] == 413
        wire.writer.close()


async def test_a_disconnecting_client_aborts_its_request() -> None:
    worker = FakeWorker(Role.COLOCATED, Script(gates={0: asyncio.Event()}))
    async with wired(worker) as (_, wire):
        wire.send(request())
        await worker.until(lambda it: it.requests)
        wire.writer.transport.abort()
        await worker.until(lambda it: it.requests[0].dropped and it.aborts)


async def test_a_slow_reader_makes_the_server_wait_and_loses_nothing() -> None:
    worker = FakeWorker(Role.COLOCATED, Script(tokens=("x" * 65536,) * 400))
    async with wired(worker) as (stage, wire):
        body = {"prompt": "a", "stream": True, "max_tokens": 400}
        wire.send(request(json.dumps(body).encode(), path="/v1/completions"))
        await worker.until(lambda it: it.requests and it.requests[0].num_sent > 0)
        # Other clients are served meanwhile, and unread events are not buffered.
        assert (await stage.get("/v1/models"))[0] == 200
        assert worker.requests[0].num_sent < 400
        status, events = await wire.answer()
        assert status == 200
        assert events.endswith(b"data: [DONE]\n\n")


async def test_a_stopping_router_closes_idle_connections() -> None:
    async with wired() as (_, wire):
        wire.send(request())
        await wire.answer()
    assert await wire.is_closed()
