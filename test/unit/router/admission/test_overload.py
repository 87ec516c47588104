"""Requests above the limits are refused in time; slow clients delay no other client."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker

from ..harness import Stage, staged
from ..http.test_server import Wire, request
from ..test_launch import launched

ANY = {"text": "a", "sampling_params": {"max_new_tokens": 2}}
MIB = 1 << 20
NUM_IDLE = 10_000


@asynccontextmanager
async def wired(stage: Stage) -> AsyncIterator[Wire]:
    port = int(stage.router.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


def ask(stage: Stage, body: object = ANY, **headers: str) -> asyncio.Task[tuple[int, Any, Any]]:
    """A task that gives status, answer and headers."""

    async def asked() -> tuple[int, Any, Any]:
        async with stage.client.post(stage.url("/generate"), json=body, headers=headers) as response:
            return response.status, await response.json(), response.headers

    return asyncio.create_task(asked())


def held() -> tuple[FakeWorker, asyncio.Event]:
    """A worker that does not answer until the event is set."""
    gate = asyncio.Event()
    return FakeWorker(script=Script(gates={0: gate})), gate


def num_waiting(stage: Stage) -> int:
    return stage.router.ingress.admission.queue.num_waiting


def secret(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


# ---- too many


async def test_requests_above_running_and_queue_limits_are_refused_with_retry_after() -> None:
    worker, gate = held()
    async with staged(worker, max_concurrent_requests=2, queue_size=1) as stage:
        asked = [ask(stage) for _ in range(2)]
        await worker.until(lambda it: len(it.requests) == 2)
        asked.append(ask(stage))
        await stage.until(lambda: num_waiting(stage) == 1)
        status, told, headers = await ask(stage)
        assert status == 429
        assert told["error"]["retryable"]
        assert told["error"]["type"] == "rate_limit_error"
        assert int(headers["Retry-After"]) >= 1
        assert len(worker.requests) == 2
        gate.set()
        assert [(await one)[0] for one in asked] == [200] * 3


async def test_a_request_that_waits_too_long_is_answered_503() -> None:
    worker, gate = held()
    async with staged(worker, max_concurrent_requests=1, queue_timeout_secs=0.05) as stage:
        first = ask(stage)
        await worker.until(lambda it: it.requests)
        status, told, headers = await ask(stage)
        assert (status, told["error"]["retryable"]) == (503, True)
        assert int(headers["Retry-After"]) >= 1
        gate.set()
        assert (await first)[0] == 200


async def test_a_client_that_leaves_the_queue_takes_no_slot() -> None:
    worker, gate = held()
    async with staged(worker, max_concurrent_requests=1) as stage:
        first = ask(stage)
        await worker.until(lambda it: it.requests)
        second = ask(stage)
        await stage.until(lambda: num_waiting(stage) == 1)
        third = ask(stage)
        await stage.until(lambda: num_waiting(stage) == 2)
        second.cancel()
        await stage.until(lambda: num_waiting(stage) == 1)
        gate.set()
        assert [(await one)[0] for one in (first, third)] == [200, 200]
        assert len(worker.requests) == 2


async def test_waiting_requests_run_in_order_of_priority() -> None:
    worker, gate = held()
    async with staged(worker, max_concurrent_requests=1) as stage:
        asked = [ask(stage)]
        await worker.until(lambda it: it.requests)
        for number, (text, body, headers) in enumerate(
            (
                ("none", {}, {}),
                ("low", {"priority": -1}, {}),
                ("field", {"priority": 5}, {}),
                ("header", {"priority": 5}, {"x-priority": "7"}),
                ("odd", {"priority": 5}, {"x-priority": "high"}),
            ),
            start=1,
        ):
            asked.append(ask(stage, {**ANY, **body, "text": text}, **headers))
            await stage.until(lambda number=number: num_waiting(stage) == number)
        gate.set()
        assert {(await one)[0] for one in asked} == {200}
        order = [one.body["text"] for one in worker.requests[1:]]
        assert order == ["header", "field", "none", "odd", "low"]


async def test_many_requests_of_one_tenant_do_not_delay_another_tenant(tmp_path: Path) -> None:
    worker, gate = held()
    keys = secret(tmp_path / "keys", "key-a crowd\nkey-b guest\n")
    async with staged(worker, max_concurrent_requests=1, api_keys_file=keys) as stage:
        crowd = [ask(stage, Authorization="Bearer key-a") for _ in range(6)]
        await stage.until(lambda: num_waiting(stage) == 5)
        guest = ask(stage, {**ANY, "text": "guest"}, Authorization="Bearer key-b")
        await stage.until(lambda: num_waiting(stage) == 6)
        gate.set()
        assert {(await one)[0] for one in [guest, *crowd]} == {200}
        assert [one.body["text"] for one in worker.requests].index("guest") == 1


async def test_tenant_rates_are_enforced_and_change_with_the_key_file(tmp_path: Path) -> None:
    keys = secret(tmp_path / "keys", "key-a alice rps=0.01\nkey-b bob tps=0.1\nkey-c carol\n")
    async with staged(FakeWorker(), api_keys_file=keys) as stage:
        for name in ("key-a", "key-b"):
            assert (await ask(stage, Authorization=f"Bearer {name}"))[0] == 200
            status, told, headers = await ask(stage, Authorization=f"Bearer {name}")
            assert (status, told["error"]["retryable"]) == (429, True)
            wait_s = int(headers["Retry-After"])
            # Of tokens: what was asked for, two, and the prompt's, at one in ten seconds.
            assert 90 < wait_s <= 100 if name == "key-a" else wait_s > 10
        for _ in range(5):
            assert (await ask(stage, Authorization="Bearer key-c"))[0] == 200
        secret(keys, "key-a alice rps=1000\n")
        stage.router.ingress.reload(is_forced=True)
        assert (await ask(stage, Authorization="Bearer key-a"))[0] == 200
        assert (await ask(stage, Authorization="Bearer key-c"))[0] == 401


async def test_the_rate_limit_for_all_tenants_is_enforced() -> None:
    settings = {"max_concurrent_requests": 3, "rate_limit_tokens_per_second": 0.01}
    async with staged(FakeWorker(), **settings) as stage:
        assert [(await ask(stage))[0] for _ in range(5)] == [200, 200, 200, 429, 429]


# ---- too large


def chunked(body: bytes, size: int) -> bytes:
    parts = (body[start : start + size] for start in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


async def send_until_told(wire: Wire, head: bytes, chunk: bytes, num_chunks: int) -> tuple[int, int]:
    """The status, and the number of chunks sent before it arrived."""
    wire.send(head)
    answer = asyncio.create_task(wire.answer())
    sent = 0
    try:
        while sent < num_chunks and not answer.done():
            wire.send(chunk)
            await wire.writer.drain()
            sent += 1
            await asyncio.sleep(0)
    except ConnectionError:
        pass
    return (await answer)[0], sent


CHUNK = b"%x\r\n%b\r\n" % (MIB, b" " * MIB)
HEAD = b"POST /generate HTTP/1.1\r\nHost: h\r\n"


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(HEAD + b"Content-Length: %d\r\n\r\n" % (100 * MIB), id="declared"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", id="chunked"),
        pytest.param(
            HEAD.replace(b"/generate", b"/abort_request") + b"Transfer-Encoding: chunked\r\n\r\n", id="page"
        ),
    ],
)
async def test_a_body_of_100_mib_is_refused_before_it_arrives(head: bytes) -> None:
    worker = FakeWorker()
    async with staged(worker, max_body_bytes=4 * MIB) as stage, wired(stage) as wire:
        status, sent = await send_until_told(wire, head, CHUNK, 100)
        assert status == 413
        assert sent < 50
        assert stage.router.ingress.budget.held == 0
        assert not worker.requests


@pytest.mark.parametrize("length", ["1", "18446744073709551616", "-1", "1e3", "0x10", ""])
async def test_a_wrong_content_length_affects_no_other_client(length: str) -> None:
    worker = FakeWorker()
    async with staged(worker) as stage:
        async with wired(stage) as wire:
            wire.send(HEAD + f"Content-Length: {length}\r\n\r\n".encode() + json.dumps(ANY).encode())
            assert 400 <= (await wire.answer())[0] < 500
        assert (await ask(stage))[0] == 200
        assert len(worker.requests) == 1
        await stage.until(lambda: stage.router.ingress.budget.held == 0)


async def test_the_byte_budget_bounds_all_bodies_together() -> None:
    worker, gate = held()
    async with staged(worker, max_body_bytes=MIB, max_buffered_mib=20) as stage:
        large = {**ANY, "text": "x" * (MIB - 1000)}
        asked = [ask(stage, large), ask(stage, large)]
        await worker.until(lambda it: len(it.requests) == 2)
        status, told, headers = await ask(stage, large)
        assert (status, told["error"]["retryable"]) == (503, True)
        assert int(headers["Retry-After"]) >= 1
        async with wired(stage) as wire:
            wire.send(
                HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(json.dumps(large).encode(), 65536)
            )
            assert (await wire.answer())[0] == 503
        gate.set()
        assert [(await one)[0] for one in asked] == [200, 200]
        await stage.until(lambda: stage.router.ingress.budget.held == 0)
        assert (await ask(stage, large))[0] == 200


async def test_the_byte_budget_bounds_unfinished_bodies() -> None:
    async with staged(FakeWorker(), max_body_bytes=8 * MIB, max_buffered_mib=4) as stage:
        for head in (
            HEAD + b"Content-Length: %d\r\n\r\n" % (8 * MIB),
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
        ):
            async with wired(stage) as wire:
                assert (await send_until_told(wire, head, CHUNK, 7))[0] == 503
            await stage.until(lambda: stage.router.ingress.budget.held == 0)


async def test_the_byte_budget_gets_back_the_bytes_of_disconnected_clients() -> None:
    worker, gate = held()
    async with staged(worker) as stage:
        for data in (
            b"POST /gen",
            HEAD + b"Content-Length: 1000\r\n\r\nabc",
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n100\r\nabc",
            request(json.dumps(ANY).encode()),
            request(json.dumps(ANY).encode()) * 3,
            request(json.dumps(ANY).encode(), extra="Connection: close\r\n"),
        ):
            async with wired(stage) as wire:
                wire.send(data)
                await wire.writer.drain()
                wire.writer.transport.abort()
        async with wired(stage) as wire:
            wire.send(request(json.dumps(ANY).encode()))
            num_before = len(worker.requests)
            await worker.until(lambda it: len(it.requests) > num_before)
            wire.writer.transport.abort()
        await stage.until(lambda: stage.router.ingress.budget.held == 0)
        gate.set()


# ---- too slow


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"POST /gen", id="head"),
        pytest.param(b"POST /generate HTTP/1.1\r\nHost: h\r\n", id="more of a head"),
        pytest.param(b"GET /health HTTP/1.1\r\n", id="head of a page"),
        pytest.param(HEAD + b"Content-Length: 1000\r\n\r\n{", id="body"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", id="chunk"),
        pytest.param(b"POST /abort_request HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n{", id="page"),
    ],
)
async def test_an_incomplete_request_is_answered_408_in_time(data: bytes) -> None:
    limits = {"client_header_timeout_secs": 0.05, "client_stall_timeout_secs": 0.05}
    async with staged(FakeWorker(), **limits) as stage, wired(stage) as wire:
        wire.send(data)
        status, told = await wire.answer()
        assert status == 408
        assert json.loads(told)["error"]["type"] == "timeout"


async def test_a_request_head_that_trickles_in_is_answered_408() -> None:
    async with staged(FakeWorker(), client_header_timeout_secs=0.05) as stage, wired(stage) as wire:
        answer = asyncio.create_task(wire.answer())
        wire.send(b"POST /generate HTTP/1.1\r\n")
        while not answer.done():
            wire.send(b"x: y\r\n")
            await asyncio.sleep(0.01)
        assert (await answer)[0] == 408


@pytest.mark.parametrize("extra", ["", "Connection: close\r\n"], ids=["lean", "aiohttp"])
async def test_a_client_that_reads_nothing_is_disconnected_and_delays_no_other(extra: str) -> None:
    worker = FakeWorker(script=Script(tokens=("x" * 65536,) * 400))
    async with staged(worker, client_stall_timeout_secs=0.2) as stage, wired(stage) as wire:
        body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 400}).encode()
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wire.send(request(body, path="/v1/completions", extra=extra))
        await worker.until(lambda it: it.requests and it.requests[0].num_sent > 0)
        worker.script = Script()
        assert (await ask(stage))[0] == 200
        await worker.until(lambda it: it.requests[0].dropped)
        assert worker.requests[0].num_sent < 400


# ---- too many of nothing


async def test_max_connections_counts_connections_of_both_servers() -> None:
    async with staged(FakeWorker(), max_connections=3) as stage, AsyncExitStack() as open_ones:
        wires = [await open_ones.enter_async_context(wired(stage)) for _ in range(3)]
        wires[0].send(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")  # this is aiohttp's now
        assert (await wires[0].answer())[0] == 200
        async with wired(stage) as refused:
            assert (await refused.answer())[0] == 503
            assert await refused.is_closed()
        wires[1].send(request(json.dumps(ANY).encode()))
        assert (await wires[1].answer())[0] == 200
        wires[2].writer.close()
        for _ in range(100):
            async with wired(stage) as again:
                again.send(request(json.dumps(ANY).encode()))
                status, _ = await again.answer()
            if status == 200:
                return
        pytest.fail("there was no room again")


async def test_ten_thousand_idle_connections_do_not_stop_requests() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < NUM_IDLE + 1000:
        pytest.skip(f"a process may have only {hard} open files here")

    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with launched() as (process, lines):
            port = int(lines.partition("http=http://127.0.0.1:")[2].split()[0])
            idle: list[asyncio.StreamWriter] = []
            while len(idle) < NUM_IDLE:
                opening = (asyncio.open_connection("127.0.0.1", port, limit=1024) for _ in range(250))
                idle += [writer for _, writer in await asyncio.gather(*opening)]
            for writer in idle[::2]:
                writer.write(b"POST /generate HTTP/1.1\r\n")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            wire = Wire(reader, writer)
            wire.send(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
            assert (await wire.answer())[0] == 200
            wire.send(request(json.dumps(ANY).encode()))
            assert (await wire.answer())[0] == 503  # there is no server
            assert process.poll() is None
            for one in [*idle, writer]:
                one.transport.abort()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
