"""Recovery of streams whose instance was lost, over HTTP."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from memserve.router.tokenization.tokenizers import Tokenizers
from memserve.testing.fake_answers import FIRST_ID, Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import Stage, staged
from .retry_harness import Ask, metric, texts

TOKENS = ("One", " two", " three", " four", " five")
SAID = "".join(TOKENS)
SCRIPT = Script(tokens=TOKENS, continues=True)
GREEDY = {"temperature": 0}
NATIVE = {"text": "hello", "sampling_params": GREEDY}
CHAT = {"messages": [{"role": "user", "content": "hello"}], **GREEDY}
BODIES = [
    ("/generate", NATIVE, 1),
    ("/generate", {"text": ["a", "b"], "sampling_params": GREEDY}, 2),
    ("/generate", {"text": "hello", "sampling_params": {**GREEDY, "n": 2}}, 2),
    ("/v1/chat/completions", CHAT, 1),
    ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, 1),
    ("/v1/chat/completions", {**CHAT, "n": 2}, 2),
    ("/v1/completions", {"prompt": ["a", "b"], **GREEDY}, 2),
]


def team(role: Role, kind: type[FakeWorker] = FakeWorker) -> list[FakeWorker]:
    """Two workers of `role`, and a prefill if the role needs one."""
    others = [FakeWorker(Role.PREFILL, script=SCRIPT)] if role is Role.DECODE else []
    return [*others, kind(role, script=SCRIPT), kind(role, script=SCRIPT)]


async def broken(stage: Stage, ask: Ask, role: Role, hold: asyncio.Event) -> FakeWorker:
    """Kill the instance of `role` that feeds the stream after two tokens; returns the other instance."""
    workers = stage.workers[role]
    await stage.until(lambda: any(one.requests and one.requests[-1].num_sent == 2 for one in workers))
    victim = next(one for one in workers if one.requests and one.requests[-1].num_sent == 2)
    await stage.until(ask.begun.is_set)
    await victim.kill()
    hold.set()
    return next(one for one in workers if one is not victim)


def held(stage: Stage, role: Role, token: int = 2) -> asyncio.Event:
    """Have the instances of `role` hold back a token until the event is set."""
    hold = asyncio.Event()
    for worker in stage.workers[role]:
        worker.script = replace(SCRIPT, gates={token: hold})
    return hold


@pytest.mark.parametrize("role", [Role.COLOCATED, Role.DECODE])
@pytest.mark.parametrize(("path", "body", "num_answers"), BODIES)
async def test_broken_stream_is_continued_by_another_instance(
    path: str, body: dict[str, Any], num_answers: int, role: Role
) -> None:
    async with staged(*team(role)) as stage:
        undisturbed = await Ask(stage, path, {**body, "stream": True}).task
        hold = held(stage, role)
        ask = Ask(stage, path, {**body, "stream": True})
        await broken(stage, ask, role, hold)
        status, answer = await ask.task
        assert status == 200
        assert texts(answer, True) == texts(undisturbed[1], True)
        if role is Role.DECODE:  # the fake has no n
            assert texts(answer, True) == [SAID] * num_answers
        assert '"error"' not in answer
        assert len(set(_names(answer))) == len(set(_names(undisturbed[1]))), "it keeps its name"
        assert ("usage" in answer) == ("usage" in undisturbed[1])
        assert await metric(stage, 'memserve_router_resumed_total{outcome="repeated"} 1.0')
        assert await metric(stage, 'memserve_router_retries_total{reason="lost"} 1.0')


def _names(answer: str) -> list[str]:
    items = [json.loads(event[6:]) for event in answer.split("\n\n") if event.startswith("data: {")]
    return [item["id"] if "id" in item else item["meta_info"]["id"] for item in items]


async def test_resumed_native_stream_puts_streamed_tokens_into_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def text_after(self: Any, model: Any, prompt: Any, ids: Any, *, skips_special: bool) -> str:
        return "".join(TOKENS[one - FIRST_ID] for one in ids)

    monkeypatch.setattr(Tokenizers, "text_after", text_after)

    async with staged(*team(Role.DECODE)) as stage:
        hold = held(stage, Role.DECODE)
        params = {**GREEDY, "max_new_tokens": 5}
        ask = Ask(stage, body={"input_ids": [1, 2, 3], "sampling_params": params, "stream": True})
        other = await broken(stage, ask, Role.DECODE, hold)
        _, answer = await ask.task
        items = [json.loads(event[6:]) for event in answer.split("\n\n") if event.startswith("data: {")]
        assert [item["text"] for item in items] == ["".join(TOKENS[: n + 1]) for n in range(5)]
        assert [item["output_ids"] for item in items] == [
            list(range(FIRST_ID, FIRST_ID + n + 1)) for n in range(5)
        ]
        metas = [item["meta_info"] for item in items]
        assert [meta["completion_tokens"] for meta in metas] == [1, 2, 3, 4, 5]
        assert {meta["prompt_tokens"] for meta in metas} == {SCRIPT.prompt_tokens}
        (request,) = other.requests
        assert request.body["input_ids"] == [1, 2, 3, FIRST_ID, FIRST_ID + 1]
        assert request.body["sampling_params"]["max_new_tokens"] == 3
        assert stage.prefill.requests[-1].body["input_ids"] == request.body["input_ids"]
        assert await metric(stage, 'memserve_router_resumed_total{outcome="continued"} 1.0')


@pytest.mark.parametrize(
    ("settings", "params", "reason"),
    [({}, {"temperature": 0.7}, "it is sampled"), ({"resume": "never"}, GREEDY, "--resume never")],
)
async def test_stream_that_is_not_resumable_ends_with_the_reason(
    settings: Any, params: Any, reason: str
) -> None:
    async with staged(*team(Role.DECODE), **settings) as stage:
        hold = held(stage, Role.DECODE)
        ask = Ask(stage, body={"text": "hello", "sampling_params": params, "stream": True})
        other = await broken(stage, ask, Role.DECODE, hold)
        _, answer = await ask.task
        error = json.loads(answer.strip().rpartition("data: ")[2])["error"]
        assert error["retryable"] is True
        assert reason in error["message"]
        assert "was lost" in error["message"]
        assert not other.requests
        assert await metric(stage, 'memserve_router_resumed_total{outcome="refused"} 1.0')


async def test_stream_is_resumed_more_than_once() -> None:
    workers = [_Failing(script=SCRIPT), _Failing(script=SCRIPT), FakeWorker(script=SCRIPT)]
    async with staged(*workers, policy="round_robin", retry_initial_backoff_ms=1) as stage:
        for number, worker in enumerate(workers[:2], start=2):
            worker.fails_before = number
        while not all(one.requests for one in workers):
            status, answer = await Ask(stage, body={**NATIVE, "stream": True}).task
            assert (status, texts(answer, True)) == (200, [SAID])


class _Failing(FakeWorker):
    """Sends an error event in the middle of a stream, then ends it."""

    fails_before = 2

    async def _stream(self, request: Any, received: Any, answers: Any, script: Script) -> Any:
        response = aiohttp.web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(self.fails_before):
            for event in answers.events(number):
                await response.write(event)
        received.num_sent = self.fails_before
        if received.path == "/generate":
            reason = {"type": "abort", "message": "out of luck", "status_code": 500, "err_type": "X"}
            item = {"text": "", "output_ids": [], "meta_info": {"id": "x", "finish_reason": reason}}
        else:
            item = {"error": {"object": "error", "message": "out of luck", "code": 500}}
        data = json.dumps(item, separators=(",", ":") if "text" in item else None).encode()
        await response.write(b"data: " + data + b"\n\ndata: [DONE]\n\n")
        return response


@pytest.mark.parametrize("is_greedy", [True, False])
@pytest.mark.parametrize(("path", "body"), [("/generate", NATIVE), ("/v1/chat/completions", CHAT)])
async def test_error_event_inside_a_stream_is_a_fault_of_the_instance(
    path: str, body: Any, is_greedy: bool
) -> None:
    workers = [_Failing(script=SCRIPT), FakeWorker(script=SCRIPT)]
    if not is_greedy:
        sampled = {**body, "temperature": 1, "sampling_params": {}, "stream": True}
    async with staged(*workers, policy="round_robin") as stage:
        while not workers[0].requests:
            asked = {**body, "stream": True} if is_greedy else sampled
            _, answer = await Ask(stage, path, asked).task
        if is_greedy:
            assert texts(answer, True) == [SAID]
            assert await metric(stage, 'memserve_router_retries_total{reason="failed"} 1.0')
        else:
            error = json.loads(answer.strip().rpartition("data: ")[2])["error"]
            assert (error["retryable"], "out of luck" in error["message"]) == (True, True)


class _Cutting(FakeWorker):
    """Dies in the middle of an event."""

    async def _stream(self, request: Any, received: Any, answers: Any, script: Script) -> Any:
        response = aiohttp.web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        (event,), (part,) = answers.events(0), answers.events(1)
        await response.write(event + part[:30])
        received.num_sent = 1
        request.transport.abort()
        raise asyncio.CancelledError


@pytest.mark.parametrize("is_greedy", [True, False])
async def test_client_of_a_cut_stream_gets_whole_events_only(is_greedy: bool) -> None:
    workers = [_Cutting(script=SCRIPT), FakeWorker(script=SCRIPT)]
    params = GREEDY if is_greedy else {}
    async with staged(*workers, policy="round_robin") as stage:
        while not workers[0].requests:
            _, answer = await Ask(
                stage, body={"text": "hello", "stream": True, "sampling_params": params}
            ).task
        events = [event for event in answer.split("\n\n") if event]
        assert all(event == "data: [DONE]" or json.loads(event[6:]) for event in events)
        assert ('"error"' in answer) is not is_greedy


async def test_complete_answer_without_done_is_closed_by_the_router() -> None:
    async with staged(*team(Role.COLOCATED)) as stage:
        workers = stage.workers[Role.COLOCATED]
        for worker in workers:
            worker.script = replace(SCRIPT, drop_before=len(TOKENS))
        status, answer = await Ask(stage, body={**NATIVE, "stream": True}).task
        assert (status, texts(answer, True)) == (200, [SAID])
        assert sum(len(one.requests) for one in workers) == 1


async def test_broken_stream_without_another_instance_ends_with_the_error() -> None:
    workers = [FakeWorker(Role.PREFILL, script=SCRIPT), FakeWorker(Role.DECODE, script=SCRIPT)]
    async with staged(*workers) as stage:
        held(stage, Role.DECODE)
        ask = Ask(stage, body={**NATIVE, "stream": True})
        await stage.decode.until(lambda w: w.requests and w.requests[0].num_sent == 2)
        await stage.until(ask.begun.is_set)
        await stage.decode.kill()
        _, answer = await asyncio.wait_for(ask.task, 2.0)
        error = json.loads(answer.strip().rpartition("data: ")[2])["error"]
        assert (error["retryable"], "decode" in error["message"]) == (True, True)
        assert not stage.router.state.cluster.snapshot.decodes
        await stage.prefill.until(lambda w: all(one.finished or one.dropped for one in w.requests))
