"""However the network cuts a stream, the client gets the same events, the same status and the same fault."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from memserve.core.errors import MemServeError
from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.instance import Instance
from memserve.router.errors import UpstreamError, UpstreamRejected
from memserve.router.proxy.n_sampling import SampleJoiner
from memserve.router.proxy.pd_pair import _Rewriter
from memserve.router.proxy.recovery import ResumableStream
from memserve.router.proxy.relay import Write, relay
from memserve.router.proxy.stream_splicer import AcceptedPrefix, NativeSplicer, Received
from memserve.router.request import Api, GenerationRequest
from memserve.router.server_info import ServerInfo
from memserve.testing.fake_worker import FakeWorker, ReceivedRequest
from memserve.wire.messages import Role

from ..event_streams import cut, data_in, written
from ..harness import staged

DONE = b"[DONE]"


def error(code: int | None) -> bytes:
    return json.dumps({"error": {"message": "the scheduler died", "code": code}}).encode()


def native(count: int, reason: Any = None) -> bytes:
    meta = {"id": "x", "completion_tokens": count, "finish_reason": reason}
    return json.dumps({"text": "ab" * count, "output_ids": [7] * count, "meta_info": meta}).encode()


def chosen(text: str) -> bytes:
    return json.dumps({"id": "x", "choices": [{"index": 0, "delta": {"content": text}}]}).encode()


LAST = native(4, {"type": "length"})
ABORT = native(4, {"type": "abort", "message": "out of memory", "status_code": 503})
FAULTS = [error(400), error(500), error(None), error(503), b'{"error": "no"}', ABORT]
NATIVE = [native(1), native(2), native(3), LAST]
OPENAI = [chosen("error"), chosen("abort"), chosen("\u2028"), chosen('data: {"error": {"code": 500}}')]


@st.composite
def streams(draw: st.DrawFn, payloads: list[bytes]) -> bytes:
    """Some of the payloads in their order, perhaps with a fault among them, and perhaps the end."""
    said = list(payloads[: draw(st.integers(0, len(payloads)))])
    if draw(st.booleans()):
        said.insert(draw(st.integers(0, len(said))), draw(st.sampled_from(FAULTS)))
    if draw(st.integers(0, 3)):
        said.append(DONE)
    return b"".join(draw(written(one)) for one in said)


class _Leg:
    def __init__(self, chunks: list[bytes]) -> None:
        info = ServerInfo("m", "/m")
        self.instance = Instance(InstanceId("a"), Epoch(1), Role.COLOCATED, "http://a:1", None, info)
        self._chunks = iter(chunks)

    async def next(self) -> bytes:
        return next(self._chunks, b"")


class _Client:
    has_begun = True

    def __init__(self) -> None:
        self.received = b""

    async def write(self, chunk: bytes) -> None:
        assert chunk.endswith(b"\n\n")
        self.received += chunk


def call_of(api: Api, **body: Any) -> GenerationRequest:
    return GenerationRequest(api, {"stream": True, **body}, "x", False, ("x",), None, 2, None)


async def plain(write: Write) -> Write:
    return write


async def rewriting(write: Write) -> Write:
    async def prefill() -> Any:
        return {"text": "ab", "meta_info": {"input_token_logprobs": [[-1.0, 5, None]]}}

    call = call_of(Api.GENERATE, return_logprob=True)
    return _Rewriter(call, asyncio.create_task(prefill()), write).write


async def splicing(write: Write) -> Write:
    client = _Client()
    client.write = write  # type: ignore[method-assign, assignment]
    splicer = NativeSplicer(Received(), AcceptedPrefix())
    call = structs.replace(call_of(Api.GENERATE), mark="mark")
    return ResumableStream(client, None).writer(call, _Leg([]).instance, splicer)


async def joining(write: Write) -> Write:
    joiner = SampleJoiner(call_of(Api.CHAT))

    async def write_sample(chunk: bytes) -> None:
        if joined := joiner.feed(1, chunk):
            await write(joined)

    return write_sample


def outcome(chunks: list[bytes], through: Callable[[Write], Any]) -> Any:
    """What the client reads, the first event, and the fault."""
    client, first = _Client(), list[bytes]()

    async def run() -> object:
        leg: Any = _Leg(chunks)
        try:
            await relay(leg, await through(client.write), first.append)
        except (UpstreamError, UpstreamRejected) as fault:
            return type(fault), fault.status, str(fault)
        except MemServeError as fault:
            return type(fault)
        return None

    fault = asyncio.run(run())
    return data_in(client.received), first, fault


@pytest.mark.parametrize(
    ("through", "payloads"),
    [(plain, NATIVE), (plain, OPENAI), (rewriting, NATIVE), (splicing, NATIVE), (joining, OPENAI)],
)
@given(st.data())
def test_stream_in_pieces_ends_as_the_stream_in_one_piece(
    through: Callable[[Write], Any], payloads: list[bytes], data: st.DataObject
) -> None:
    stream = data.draw(streams(payloads))
    assert outcome(cut(stream, data), through) == outcome([stream] if stream else [], through)


@given(st.sampled_from([NATIVE, OPENAI]), st.data())
def test_relayed_stream_reads_as_its_source(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(data.draw(written(one)) for one in [*payloads, DONE])
    read, first, fault = outcome(cut(stream, data), plain)
    assert (read, len(first), fault) == (data_in(stream), 1, None)


@pytest.mark.parametrize(("fault", "status"), [(error(404), 404), (error(None), 400), (error(500), 500)])
@given(st.data())
def test_first_event_that_reports_an_error_is_the_status(
    fault: bytes, status: int, data: st.DataObject
) -> None:
    stream = data.draw(written(fault)) + data.draw(written(DONE))
    read, first, raised = outcome(cut(stream, data), plain)
    assert (read, first, raised[1]) == ([], [], status)


class Cutting(FakeWorker):
    """Answers a stream with bytes of its own, some at a time."""

    said, size = b"", 1

    async def _answer(self, request: web.Request, received: ReceivedRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for start in range(0, len(self.said), self.size):
            await response.write(self.said[start : start + self.size])
            await asyncio.sleep(0)
        return response


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize(("num_good", "code", "status"), [(0, 404, 404), (0, 503, 503), (2, 503, 200)])
async def test_client_is_told_of_an_error_event_however_it_is_cut(
    size: int, num_good: int, code: int, status: int
) -> None:
    worker = Cutting()
    said = [*(chosen("a") for _ in range(num_good)), error(code), DONE]
    worker.said, worker.size = b"".join(b"data: %b\r\n\r\n" % one for one in said), size
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True}
    async with staged(worker, retry_max_retries=0) as stage:
        async with stage.client.post(stage.url("/v1/chat/completions"), json=body) as response:
            answer = await response.read()
        assert response.status == status
        told = json.loads(answer) if status != 200 else json.loads(data_in(answer)[num_good])
        assert "the scheduler died" in told["error"]["message"]
        assert DONE not in answer or status == 200
