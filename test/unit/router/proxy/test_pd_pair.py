"""One request on a pair: events are relayed at once, and both legs complete or none."""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from memserve.core.ids import Epoch, InstanceId
from memserve.router.errors import UpstreamDisconnected, UpstreamError
from memserve.router.proxy.merge import cache_report
from memserve.router.proxy.pd_pair import unless_fails
from memserve.router.request import Api
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import pair, staged

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
PATHS = [
    ("/generate", {"text": "hello"}),
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"prompt": "hello"}),
]


def payloads(events: list[bytes]) -> list[Any]:
    return [json.loads(event[6:]) for event in events if event.startswith(b"data: {")]


@pytest.mark.parametrize(("path", "body"), PATHS)
async def test_both_legs_get_the_same_bootstrap_room(path: str, body: dict[str, Any]) -> None:
    async with staged(*pair()) as stage:
        status, _ = await stage.post(path, {**body, "user": "kept"})
        assert status == 200
        (one,), (other,) = stage.prefill.requests, stage.decode.requests
        assert one.body == other.body
        assert one.body["user"] == "kept"
        assert one.body["bootstrap_host"] == "127.0.0.1"
        assert one.body["bootstrap_port"] == stage.prefill.bootstrap_port
        assert 0 <= one.body["bootstrap_room"] < 2**63
        assert one.rids != ["None"]


@pytest.mark.parametrize(("path", "body"), PATHS)
async def test_stream_relays_the_first_token_before_the_second_exists(
    path: str, body: dict[str, Any]
) -> None:
    async with staged(*pair()) as stage:
        second = asyncio.Event()
        stage.decode.script = Script(gates={1: second})
        async with stage.client.post(stage.url(path), json={**body, "stream": True}) as response:
            assert response.content_type == "text/event-stream"
            assert b"Hello" in await response.content.readany()
            assert stage.decode.requests[0].num_sent == 1
            second.set()
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        assert stage.prefill.requests[0].body["stream"] is False


async def test_stream_has_the_bytes_of_decodes_stream() -> None:
    async with staged(*pair()) as stage:
        body = {"text": "hello", "stream": True, "rid": "same"}
        relayed = await stage.events("/generate", body)
        body |= {"bootstrap_room": 1}
        async with stage.client.post(stage.decode.url + "/generate", json=body) as response:
            direct = await response.read()
        assert b"\n\n".join(relayed) + b"\n\n" == direct


async def test_report_tells_the_cached_tokens_of_prefill() -> None:
    async with staged(*pair()) as stage:
        stage.prefill.script = Script(cached_tokens=16)
        stage.decode.script = Script(cached_tokens=32)
        _, answer = await stage.post("/generate", {"text": "hello"})
        assert answer["meta_info"]["cached_tokens"] == 32
        assert answer["meta_info"]["prefill_cached_tokens"] == 16
        _, answer = await stage.post("/v1/chat/completions", CHAT)
        details = answer["usage"]["prompt_tokens_details"]
        assert details == {"cached_tokens": 32, "prefill_cached_tokens": 16}
        for path, body in PATHS:
            events = await stage.events(path, {**body, "stream": True}, headers={"x-memserve-report": "1"})
            assert events[-2:] == [b': memserve {"prefill_cached_tokens":16}', b"data: [DONE]"]


def test_report_tells_cached_tokens_by_tier_if_prefill_does() -> None:
    call: Any = SimpleNamespace(api=Api.GENERATE)
    tiers = {"device": 16, "host": 32}
    answer = {"meta_info": {"cached_tokens": 48, "cached_tokens_details": tiers}}
    told = {"prefill_cached_tokens": 48, "prefill_cached_tokens_details": tiers}
    assert cache_report(call, answer) == told
    assert cache_report(call, [answer]) == {"prefill_cached_tokens": [48]}


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_has_the_input_logprobs_of_prefill(stream: bool) -> None:
    async with staged(*pair()) as stage:
        body = {"text": ["a", "b"], "return_logprob": True, "stream": stream}
        if stream:
            items = payloads(await stage.events("/generate", body))
            items = [item | {"part": item["index"]} for item in items]
        else:
            _, answer = await stage.post("/generate", body)
            items = [item | {"part": part} for part, item in enumerate(answer)]
        assert {item["part"] for item in items} == {0, 1}
        for item in items:
            meta = item["meta_info"]
            assert meta["input_token_logprobs"] == [[-0.5, 7, f"in{item['part']}"]]
            assert meta["output_token_logprobs"]


@pytest.mark.parametrize("stream", [False, True])
async def test_echoed_logprobs_begin_with_those_of_prefill(stream: bool) -> None:
    async with staged(*pair()) as stage:
        body = {"prompt": ["a", "b"], "echo": True, "logprobs": 1, "stream": stream}
        tokens: dict[int, list[str]] = {0: [], 1: []}
        if stream:
            answers = payloads(await stage.events("/v1/completions", body))
        else:
            answers = [(await stage.post("/v1/completions", body))[1]]
        for answer in answers:
            for choice in answer["choices"]:
                assert len(choice["logprobs"]["token_logprobs"]) == len(choice["logprobs"]["tokens"])
                tokens[choice["index"]] += choice["logprobs"]["tokens"]
        assert tokens == {part: [f"in{part}", "Hello", ",", " world"] for part in (0, 1)}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), PATHS)
async def test_leaving_client_aborts_both_legs(path: str, body: dict[str, Any], stream: bool) -> None:
    async with staged(*pair()) as stage:
        stage.prefill.script = Script(gates={0: asyncio.Event()})
        stage.decode.script = Script(gates={1: asyncio.Event()})
        leaving = asyncio.create_task(stage.post(path, {**body, "stream": stream}))
        await stage.decode.until(lambda w: w.requests)
        await stage.prefill.until(lambda w: w.requests)
        leaving.cancel()
        for worker in (stage.prefill, stage.decode):
            await worker.until(lambda w: w.requests[0].dropped)
            await worker.until(lambda w: w.aborts)
            assert worker.aborts[0] == worker.requests[0].rids[0]
        assert stage.is_ready()


async def test_leaving_client_aborts_every_prompt_of_a_batch() -> None:
    async with staged(*pair()) as stage:
        stage.decode.script = Script(gates={0: asyncio.Event()})
        leaving = asyncio.create_task(stage.post("/generate", {"text": ["a", "b"], "rid": ["x", "y"]}))
        await stage.decode.until(lambda w: w.requests)
        leaving.cancel()
        await stage.decode.until(lambda w: len(w.aborts) == 2)
        assert stage.decode.aborts == stage.decode.requests[0].rids


FAILURES = [
    (Script(status=500, message="out of luck"), 502, True),
    (Script(status=503, message="too busy"), 503, True),
    (Script(status=400, message="too long"), 400, False),
    (Script(drop_before=0), 503, True),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failing", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize(("script", "status", "retryable"), FAILURES)
async def test_failed_leg_aborts_the_other_leg(
    script: Script, status: int, retryable: bool, failing: Role, stream: bool
) -> None:
    async with staged(*pair()) as stage:
        bad, good = (
            (stage.prefill, stage.decode) if failing is Role.PREFILL else (stage.decode, stage.prefill)
        )
        good.script = Script(gates={0: asyncio.Event()})
        arrived = asyncio.Event()
        bad.script = script
        # The failure comes when the other leg is known to be at work.
        if script.drop_before == 0:
            bad.script = Script(drop_before=0, gates={0: arrived})
        request = asyncio.create_task(stage.post("/generate", {"text": "hello", "stream": stream}))
        if script.drop_before == 0:
            await good.until(lambda w: w.requests)
            arrived.set()
        got, answer = await request
        assert got == status
        assert answer["error"]["retryable"] is retryable
        assert script.drop_before == 0 or script.message in answer["error"]["message"]
        if good.requests:
            await good.until(lambda w: w.requests[0].dropped)
            await good.until(lambda w: w.aborts)


@pytest.mark.parametrize(("path", "body"), PATHS)
async def test_broken_stream_ends_with_an_error_event(path: str, body: dict[str, Any]) -> None:
    async with staged(*pair()) as stage:
        stage.prefill.script = Script(gates={0: asyncio.Event()})
        stage.decode.script = Script(drop_before=2)
        events = payloads(await stage.events(path, {**body, "stream": True}))
        assert len(events) == 3
        assert events[-1]["error"]["retryable"] is True
        await stage.prefill.until(lambda w: w.requests[0].dropped)


@pytest.mark.parametrize("lost", [Role.PREFILL, Role.DECODE])
async def test_lost_leg_is_raised_instead_of_the_error_of_the_other_leg(lost: Role) -> None:
    """SGLang answers 500 when its peer in a transfer has died."""

    async def leg(role: Role) -> bytes:
        if role is lost:
            raise UpstreamDisconnected(InstanceId(role), Epoch(1), role, "gone")
        raise UpstreamError(InstanceId(role), role, 500, "KVTransferError")

    prefill = asyncio.create_task(leg(Role.PREFILL))
    with pytest.raises(UpstreamDisconnected) as caught:
        await unless_fails(prefill, leg(Role.DECODE))
    assert caught.value.instance_id == lost


async def test_prefill_killed_while_decode_waits_fails_the_request_at_once() -> None:
    async with staged(*pair()) as stage:
        stage.prefill.script = Script(gates={0: asyncio.Event()})
        stage.decode.script = Script(gates={0: asyncio.Event()})
        request = asyncio.create_task(stage.post("/generate", {"text": "hello"}))
        await stage.prefill.until(lambda w: w.requests)
        await stage.prefill.kill()
        status, answer = await asyncio.wait_for(request, 1.0)
        assert status == 503
        assert "prefill" in answer["error"]["message"]
        await stage.decode.until(lambda w: w.aborts)
        status, answer = await stage.post("/generate", {"text": "next"})
        assert status == 503
        assert answer["error"]["message"] == "no prefill server is ready"


class _RefusingInStream(FakeWorker):
    """SGLang's /generate answers a wrong stream request with 200 and an error event."""

    async def _answer(self, request: Any, received: Any) -> Any:
        response = aiohttp.web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        error = {"error": {"message": "too long", "type": "invalid_request_error", "code": 400}}
        await response.write(b"data: " + json.dumps(error).encode() + b"\n\ndata: [DONE]\n\n")
        return response


async def test_stream_refused_inside_a_200_is_answered_400() -> None:
    async with staged(FakeWorker(Role.PREFILL), _RefusingInStream(Role.DECODE)) as stage:
        status, answer = await stage.post("/generate", {"text": "hello", "stream": True})
        assert (status, answer["error"]["message"]) == (400, "too long")


async def test_request_that_exceeds_the_time_limit_is_answered_504() -> None:
    async with staged(*pair(), request_timeout_secs=0.1) as stage:
        stage.decode.script = Script(gates={0: asyncio.Event()})
        status, answer = await stage.post("/generate", {"text": "hello"})
        assert (status, answer["error"]["type"]) == (504, "timeout")
        assert stage.is_ready()


async def test_requests_spread_over_pairs_and_colocated_servers() -> None:
    workers = [*pair(), FakeWorker(Role.PREFILL), FakeWorker(Role.COLOCATED)]
    async with staged(*workers) as stage:
        for _ in range(9):
            assert (await stage.post("/generate", {"text": "hello"}))[0] == 200
        counts = {role: [len(w.requests) for w in them] for role, them in stage.workers.items()}
        assert counts == {Role.PREFILL: [3, 3], Role.DECODE: [6], Role.COLOCATED: [3]}
        for prefill in stage.workers[Role.PREFILL]:
            ports = {one.body["bootstrap_port"] for one in prefill.requests}
            assert ports == {prefill.bootstrap_port}


async def test_small_writes_on_a_kept_alive_connection_are_not_delayed() -> None:
    """Nagle's algorithm would hold the second event back for the 40 ms of a delayed ACK."""

    waits_s = []
    async with staged(*pair()) as stage, aiohttp.ClientSession() as session:
        for _ in range(10):
            second = asyncio.Event()
            stage.decode.script = Script(gates={1: second})
            body = {"text": "x", "stream": True}
            async with session.post(stage.url("/generate"), json=body) as response:
                assert b"Hello" in await response.content.readany()
                second.set()
                start_s = time.perf_counter()
                await response.content.readany()
                waits_s.append(time.perf_counter() - start_s)
                await response.read()
    assert min(waits_s) < 0.02
