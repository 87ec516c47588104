"""Any bytes at the router's port get answers below 500 or a clean close in time; other clients are served.

Every head that two readers could take for different requests has to be refused, or read as RFC 9112 says.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..fuzz_harness import TIMEOUT_S, Beside, beside

BODY = b'{"text": "hello", "sampling_params": {"max_new_tokens": 2}}'
PAGE = b"GET /liveness HTTP/1.1\r\nHost: h\r\n\r\n"
SEPARATORS = [b"\r\n", b"\n", b"\r", b"\x00", b" ", b":", b"\r\n\r\n"]
QUIET_S = 0.1
"""Time after its last byte until a client reads the answers and leaves."""


def post(body: bytes = BODY, *fields: bytes, path: bytes = b"/generate") -> bytes:
    length = b"Content-Length: %d" % len(body)
    lines = (b"POST %b HTTP/1.1" % path, b"Host: h", *(fields or (length,)))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(body: bytes = BODY, size: bytes | None = None) -> bytes:
    return b"%b\r\n%b\r\n0\r\n\r\n" % (b"%x" % len(body) if size is None else size, body)


SMUGGLED = b"POST /flush_cache HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
AMBIGUOUS = [
    post(b"0\r\n\r\n" + SMUGGLED, b"Content-Length: 5", CHUNKED),
    post(b"0\r\n\r\n" + SMUGGLED, CHUNKED, b"Content-Length: %d" % (5 + len(SMUGGLED))),
    post(BODY + SMUGGLED, b"Content-Length: %d" % len(BODY), b"Content-Length: %d" % len(BODY + SMUGGLED)),
    post(BODY + SMUGGLED, b"Content-Length: %d, %d" % (len(BODY), len(BODY + SMUGGLED))),
    post(b"0\r\n\r\n" + SMUGGLED, b"Transfer-Encoding: xchunked", b"Content-Length: 5"),
    post(b"0\r\n\r\n" + SMUGGLED, b"Transfer-Encoding: chunked, identity"),
    post(b"0\r\n\r\n" + SMUGGLED, b"Transfer-Encoding : chunked", b"Content-Length: 5"),
    post(b"0\r\n\r\n" + SMUGGLED, b"Transfer-Encoding:\x0bchunked", b"Content-Length: 5"),
    post(b"0\r\n\r\n" + SMUGGLED, b"X: a\nTransfer-Encoding: chunked", b"Content-Length: 5"),
    post(b"0\r\n\r\n" + SMUGGLED, b"X: a\rTransfer-Encoding: chunked", b"Content-Length: 5"),
    post(b"0\r\n\r\n" + SMUGGLED, CHUNKED, CHUNKED, b"Content-Length: 5"),
    post(BODY, b"Content-Length: +%d" % len(BODY)),
    post(BODY, b"Content-Length: -1"),
    post(BODY, b"Content-Length: 0x10"),
    post(BODY, b"Content-Length: 1_0"),
    post(BODY, b"Content-Length: %d" % 10**30),
    post(BODY, b"Content-Length:"),
    post(BODY, b" Content-Length: %d" % len(BODY)),
    post(chunked(size=b"-1"), CHUNKED),
    post(chunked(size=b"0x3"), CHUNKED),
    post(chunked(size=b"+3"), CHUNKED),
    post(chunked(size=b"1_0"), CHUNKED),
    post(chunked(size=b"f" * 40), CHUNKED),
    post(chunked(size=b""), CHUNKED),
    post(chunked(size=b"3b;" + b"x" * 9000), CHUNKED),
    post(b"%x\r\n%bXX0\r\n\r\n" % (len(BODY), BODY), CHUNKED),
]
ODD = [
    b"",
    b"\r\n\r\n",
    b"\n\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /liveness HTTP/0.9\r\n\r\n",
    b"GET /liveness HTTP/9.9\r\nHost: h\r\n\r\n",
    b"GET /liveness\r\n\r\n",
    b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /liveness HTTP/1.1\r\nHost: h\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    b"GET /liveness HTTP/1.1\r\nHost: h\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    b"GET /liveness HTTP/1.1\nHost: h\n\n",
    b"GET /%00%0d%0a HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /workers/%ff%fe HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET http://[::1/ HTTP/1.1\r\nHost: h\r\n\r\n",
    b"CONNECT h:1 HTTP/1.1\r\nHost: h\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: h\r\nExpect: 1\r\nContent-Length: 1\r\n\r\n{",
    b"POST /generate HTTP/1.1\r\nHost: h\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x08",
    b"POST /generate HTTP/1.1\r\nHost: h\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 0\r\n\r\n",
    b"GET /liveness HTTP/1.1\r\nHost: h\r\nAuthorization Bearer secret\r\n\r\n",
    post(b"{"),
    post(BODY, b"x-request-id: a\x80b", b"Content-Length: %d" % len(BODY)),
    post(BODY, b"Authorization: \xff\xfe", b"Content-Length: %d" % len(BODY)),
    post(BODY, b"x-memserve-timeout-s: nan", b"Content-Length: %d" % len(BODY)),
]
GOOD = [
    post(),
    post(chunked(), CHUNKED),
    PAGE,
    post(b'{"text": "a", "stream": true}'),
    post(BODY, path=b"/explain"),
]


@pytest.fixture(scope="module")
def router(tiny_model: Path) -> Iterator[Beside]:
    with beside(tiny_model) as router:
        yield router


def sent(router: Beside, *pieces: bytes, ends: bool = False, wanted: int = 0) -> bytes:
    """The bytes received for these pieces, until the end of the connection or until it is quiet.

    It is not before as many answers as are `wanted` have begun.
    """

    async def talk() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        got = b""
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if ends:
                writer.write_eof()
            while True:
                async with asyncio.timeout(QUIET_S if len(statuses(got)) >= wanted else TIMEOUT_S / 2):
                    chunk = await reader.read(1 << 16)
                if not chunk:
                    return got
                got += chunk
        except TimeoutError:
            return got
        except OSError:
            return got  # it was closed while we wrote
        finally:
            writer.transport.abort()

    return router.run(talk())


def statuses(answers: bytes) -> list[int]:
    """The statuses of one or more answers."""
    return [int(status) for status in re.findall(rb"HTTP/\d\.\d (\d{3})", answers)]


def check(router: Beside, answers: bytes) -> None:
    """The bytes are answers below 500, and the router serves other clients."""
    assert not answers or answers.startswith(b"HTTP/")
    assert all(status < 500 for status in statuses(answers)), answers[:300]
    router.assert_well()


@pytest.mark.parametrize("data", AMBIGUOUS)
def test_ambiguous_requests_are_read_as_one_request_or_refused(router: Beside, data: bytes) -> None:
    flushes = [worker.num_flushes for workers in router.stage.workers.values() for worker in workers]
    answers = sent(router, data)
    check(router, answers)
    assert [worker.num_flushes for workers in router.stage.workers.values() for worker in workers] == flushes
    assert len(statuses(answers)) <= 1 or statuses(answers)[-1] == 400


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("data", ODD, ids=range(len(ODD)))
def test_odd_requests_are_refused_or_answered(router: Beside, data: bytes, ends: bool) -> None:
    check(router, sent(router, data, ends=ends))
    assert statuses(sent(router, PAGE, wanted=1)) == [200]


@settings(max_examples=40)
@given(st.lists(st.sampled_from(GOOD), min_size=1, max_size=4), st.data())
def test_pipelined_requests_are_answered_in_order_however_they_are_split(
    router: Beside, requests: list[bytes], data: st.DataObject
) -> None:
    joined = b"".join(requests)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(joined)), max_size=6)))
    pieces = [joined[a:b] for a, b in zip([0, *cuts], [*cuts, len(joined)], strict=True)]
    answers = sent(router, *pieces, wanted=len(requests))
    check(router, answers)
    assert statuses(answers) == [200] * len(requests)


@settings(max_examples=120)
@given(st.sampled_from([*GOOD, *AMBIGUOUS]), st.data())
def test_damaged_requests_are_refused_or_answered(
    router: Beside, request: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(request)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, min(len(damaged), 200)))
        new = data.draw(st.binary(max_size=3) | st.sampled_from(SEPARATORS))
        damaged[place : place + data.draw(st.integers(0, 3))] = new
    check(router, sent(router, bytes(damaged), ends=data.draw(st.booleans())))


@settings(max_examples=25)
@given(st.lists(st.sampled_from(GOOD), max_size=2), st.sampled_from(GOOD), st.data())
def test_clients_may_disconnect_at_any_byte(
    router: Beside, before: list[bytes], last: bytes, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(last)))

    async def leave() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(b"".join(before) + last[:cut])
        await writer.drain()
        writer.transport.abort()

    router.run(leave())
    assert statuses(sent(router, PAGE, wanted=1)) == [200]
    router.assert_well()


def test_no_request_is_left_running_after_the_fuzzing(router: Beside) -> None:
    async def running() -> int:
        async with router.stage.client.get(router.stage.url("/workers")) as response:
            page = json.loads(await response.read())
        return sum(int(one["running"]) for one in page["workers"])

    async def settled() -> None:
        async with asyncio.timeout(5):
            while await running():  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    router.run(settled())
    router.assert_well()
