"""The client's deadline covers all attempts and ends every leg at once."""

from __future__ import annotations

import asyncio

import pytest

from memserve.core.errors import BadRequest
from memserve.router.http.request_chain import TIMEOUT, timeout_of
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker

from ..harness import pair, staged


def test_timeout_of_reads_a_positive_number_of_seconds() -> None:
    assert timeout_of({}) is None
    assert timeout_of({TIMEOUT: "2.5"}) == 2.5
    for wrong in ("", "soon", "0", "-1", "nan", "inf"):
        with pytest.raises(BadRequest):
            timeout_of({TIMEOUT: wrong})


@pytest.mark.parametrize("stream", [False, True])
async def test_the_clients_deadline_ends_both_legs(stream: bool) -> None:
    async with staged(*pair()) as stage:
        for worker in (stage.prefill, stage.decode):
            worker.script = Script(gates={0: asyncio.Event()})
        begun_s = asyncio.get_running_loop().time()
        body = {"text": "hello", "stream": stream}
        status, answer = await stage.post("/generate", body, headers={TIMEOUT: "0.2"})
        took_s = asyncio.get_running_loop().time() - begun_s
        assert (status, answer["error"]["retryable"]) == (504, True)
        assert "0.2 s" in answer["error"]["message"]
        assert 0.2 <= took_s < 2
        for worker in (stage.prefill, stage.decode):
            await worker.until(lambda w: w.requests[0].dropped and w.aborts)


async def test_the_clients_deadline_ends_a_stream_with_an_error_event() -> None:
    async with staged(*pair()) as stage:
        stage.decode.script = Script(gates={1: asyncio.Event()})
        events = await stage.events("/generate", {"text": "hello", "stream": True}, headers={TIMEOUT: "0.2"})
        assert b"Hello" in events[0]
        assert b"0.2 s" in events[-1]


async def test_the_routers_request_timeout_holds_beside_a_longer_deadline() -> None:
    async with staged(FakeWorker(), request_timeout_secs=0.2) as stage:
        stage.colocated.script = Script(gates={0: asyncio.Event()})
        status, answer = await stage.post("/generate", {"text": "x"}, headers={TIMEOUT: "60"})
        assert (status, "0.2 s" in answer["error"]["message"]) == (504, True)


async def test_the_clients_deadline_covers_all_attempts() -> None:
    """If the backoff would exceed the deadline, the fault is answered at once."""

    settings = {"retry_initial_backoff_ms": 60_000, "retry_max_backoff_ms": 60_000}
    async with staged(FakeWorker(), **settings) as stage:
        stage.colocated.script = Script(status=500, message="out of luck")
        asked = stage.post("/generate", {"text": "x"}, headers={TIMEOUT: "5"})
        status, answer = await asyncio.wait_for(asked, 2.0)
        assert (status, "out of luck" in answer["error"]["message"]) == (502, True)


async def test_an_invalid_deadline_is_refused_before_dispatch() -> None:
    async with staged(FakeWorker()) as stage:
        status, answer = await stage.post("/generate", {"text": "x"}, headers={TIMEOUT: "soon"})
        assert (status, answer["error"]["param"]) == (400, TIMEOUT)
        assert not stage.colocated.requests
