"""Aborts: those that a client asks for by its name, and those that no client asked for."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from memserve.testing.fake_answers import Answers, Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import Stage, pair, staged
from .retry_harness import Ask, metric, texts

CHAT = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}
NATIVE = {"text": "hello", "sampling_params": {"temperature": 0}}
BODIES = [("/generate", NATIVE), ("/v1/chat/completions", CHAT), ("/v1/completions", {**CHAT, "prompt": "a"})]
ANSWER = ["Hello, world"]


class Aborting(FakeWorker):
    """Aborts every request: `num_tokens` after its beginning, or when it is told to."""

    num_tokens = 1
    waits = False
    status_code: int | None = None
    chunk_bytes = 1 << 20

    async def _answer(self, request: Any, received: Any) -> Any:
        script = Script() if self.num_tokens < 3 else self.script
        answers = Answers(received.path, received.body, script, self.role)
        if self.waits and not received.body.get("stream"):
            await self.until(lambda it: set(received.rids) & set(it.aborts))
        if not received.body.get("stream"):
            return aiohttp.web.json_response(self._aborted(answers.whole()))
        response = aiohttp.web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(self.num_tokens):
            for event in answers.events(number):
                await response.write(event)
        if self.waits:
            await self.until(lambda it: set(received.rids) & set(it.aborts))
        last = b"".join(answers.events(self.num_tokens))
        events = [event for event in last.split(b"\n\n") if event]
        ends = [self._aborted(json.loads(event[6:])) for event in events]
        data = b"".join(b"data: " + json.dumps(one, separators=(",", ":")).encode() + b"\n\n" for one in ends)
        data += b"data: [DONE]\n\n"
        for start in range(0, len(data), self.chunk_bytes):
            await response.write(data[start : start + self.chunk_bytes])
            await asyncio.sleep(0)
        return response

    def _aborted(self, answer: Any) -> Any:
        reason = {"type": "abort", "message": "Aborted by AbortReq.", "status_code": self.status_code}
        for item in answer if isinstance(answer, list) else [answer]:
            if "meta_info" in item:
                item["meta_info"]["finish_reason"] = reason
            for choice in item.get("choices", ()):
                choice["finish_reason"] = "abort"
        return answer


async def asked(stage: Stage, body: Any, **kwargs: Any) -> None:
    async with stage.client.post(stage.url("/abort_request"), json=body, **kwargs) as response:
        assert response.status == 200, await response.text()


async def until_reached(stage: Stage, worker: FakeWorker, path: str, body: Any) -> tuple[int, str]:
    """The answer to the first of equal requests that `worker` received."""
    while not worker.requests:
        answer = await Ask(stage, path, body).task
    return answer


# ---- aborts that no client asked for


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("role", [Role.COLOCATED, Role.DECODE])
@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("rid", [{}, {"rid": "mine"}])
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_abort_that_no_client_asked_for_is_retried_or_resumed(
    path: str, body: Any, rid: Any, num_tokens: int, role: Role, stream: bool
) -> None:
    bad = Aborting(role)
    bad.num_tokens = num_tokens
    others = [FakeWorker(Role.PREFILL)] if role is Role.DECODE else []
    async with staged(bad, FakeWorker(role), *others, policy="round_robin") as stage:
        status, answer = await until_reached(stage, bad, path, {**body, **rid, "stream": stream})
        assert (status, texts(answer, stream)) == (200, ANSWER)
        assert "abort" not in answer
        assert (f'"{rid.get("rid")}"' in answer) == bool(rid)
        assert await metric(stage, 'memserve_router_retries_total{reason="failed"} 1.0')


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 7])
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_sampled_stream_that_is_aborted_ends_with_an_error(
    path: str, body: Any, chunk_bytes: int
) -> None:
    bad = Aborting()
    bad.chunk_bytes = chunk_bytes
    async with staged(bad) as stage:
        sampled = {**body, "temperature": 1, "sampling_params": {}, "stream": True}
        status, answer = await Ask(stage, path, sampled).task
        error = json.loads(answer.strip().rpartition("data: ")[2])["error"]
        assert (status, error["retryable"]) == (200, True)
        assert "no client asked" in error["message"]
        assert 'finish_reason":"abort' not in answer


async def test_abort_everywhere_is_told_as_a_failure() -> None:
    async with staged(Aborting(), retry_max_retries=1, retry_initial_backoff_ms=1) as stage:
        status, answer = await Ask(stage).task
        assert (status, json.loads(answer)["error"]["retryable"]) == (502, True)


@pytest.mark.parametrize("stream", [False, True])
async def test_abort_for_a_clients_error_is_the_clients_4xx(stream: bool) -> None:
    bad = Aborting()
    bad.num_tokens, bad.status_code = 0, 400
    async with staged(bad) as stage:
        ask = Ask(stage, body={**NATIVE, "stream": stream})
        status, answer = await ask.task
        assert (status, json.loads(answer)["error"]["message"]) == (400, "Aborted by AbortReq.")
        assert len(bad.requests) == 1
        assert "x-memserve-attempts" not in ask.headers


# ---- aborts by name


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [{"rid": "mine"}, {"rid": ["mine"]}, {"rid": None, "abort_all": True}])
async def test_aborted_request_is_answered_as_by_sglang(body: Any, stream: bool) -> None:
    worker = Aborting()
    worker.waits = True
    async with staged(worker, FakeWorker(), policy="round_robin") as stage:
        while not worker.requests:
            ask = Ask(stage, body={**NATIVE, "rid": "mine", "stream": stream})
            await stage.until(lambda: any(one.requests for one in stage.workers[Role.COLOCATED]))
            await stage.until(lambda ask=ask: ask.task.done() or worker.requests)
        if body.get("abort_all"):
            await asked(stage, body)
            await worker.until(lambda it: it.aborts)
            assert worker.aborts[-1] in (None, *worker.requests[0].rids)
        else:
            await asked(stage, body)
        status, answer = await ask.task
        assert (status, '"mine"' in answer, "abort" in answer) == (200, True, True)
        assert len(worker.requests) == 1


async def test_abort_of_a_pair_goes_to_decode() -> None:
    decode = Aborting(Role.DECODE)
    decode.waits = True
    async with staged(FakeWorker(Role.PREFILL), decode) as stage:
        ask = Ask(stage, body={**NATIVE, "rid": "mine"})
        await decode.until(lambda it: it.requests)
        await asked(stage, {"rid": "mine"})
        status, answer = await ask.task
        assert (status, json.loads(answer)["meta_info"]["finish_reason"]["type"]) == (200, "abort")
        assert not stage.prefill.aborts


async def test_abort_ends_the_request_of_that_name_only() -> None:
    gate = asyncio.Event()
    worker = FakeWorker(script=Script(gates={0: gate}))
    async with staged(worker) as stage:
        names = ("job-1", "job-10", "job-1x")
        asks = [Ask(stage, body={**NATIVE, "rid": name}) for name in names]
        await worker.until(lambda it: len(it.requests) == 3)
        await asked(stage, {"rid": "job-1"})
        await worker.until(lambda it: it.aborts)
        gate.set()
        answers = [json.loads((await ask.task)[1])["meta_info"]["id"] for ask in asks]
        assert answers == list(names)
        all_names = [one.rids[0] for one in worker.requests]
        assert len({name for name in all_names if name.startswith(worker.aborts[0])}) == 1


async def test_abort_of_a_part_names_only_that_part() -> None:
    gate = asyncio.Event()
    worker = FakeWorker(script=Script(gates={0: gate}))
    async with staged(worker) as stage:
        ask = Ask(stage, body={"text": ["a"] * 12, "rid": [f"x{n}" for n in range(12)]})
        await worker.until(lambda it: it.requests)
        await asked(stage, {"rid": "x1"})
        await worker.until(lambda it: it.aborts)
        gate.set()
        assert [one["meta_info"]["id"] for one in json.loads((await ask.task)[1])] == [
            f"x{n}" for n in range(12)
        ]
        assert worker.aborts == [worker.requests[0].rids[1]]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/generate", {"text": "a", "sampling_params": {"n": 2}}), (BODIES[1][0], {**CHAT, "n": 2})],
)
async def test_abort_reaches_every_sample_of_a_pair(path: str, body: Any) -> None:
    gate = asyncio.Event()
    async with staged(*pair()) as stage:
        stage.decode.script = Script(gates={0: gate})
        ask = Ask(stage, path, {**body, "rid": "mine"})
        await stage.decode.until(lambda it: sum(len(one.rids) for one in it.requests) == 2)
        await asked(stage, {"rid": "mine"})
        names = {name for one in stage.decode.requests for name in one.rids}
        await stage.decode.until(lambda it: set(it.aborts) == names)
        gate.set()
        await ask.task


async def test_aborted_request_is_not_tried_again() -> None:
    worker = FakeWorker(script=Script(gates={0: asyncio.Event()}))
    async with staged(worker, FakeWorker(script=worker.script)) as stage:
        ask = Ask(stage, body={**NATIVE, "rid": "mine"})
        workers = stage.workers[Role.COLOCATED]
        await stage.until(lambda: any(one.requests for one in workers))
        victim = next(one for one in workers if one.requests)
        await asked(stage, {"rid": "mine"})
        await victim.kill()
        status, answer = await ask.task
        assert (status, "abort" in answer) == (499, True)
        assert sum(len(one.requests) for one in workers) == 1


async def test_tenants_abort_their_own_requests_only(tmp_path: Path) -> None:
    keys, admins = tmp_path / "keys", tmp_path / "admins"
    keys.write_text("key-a alice\nkey-b bob\n")
    admins.write_text("root-key\n")
    for file in (keys, admins):
        file.chmod(0o600)
    worker = FakeWorker(script=Script(gates={0: asyncio.Event()}))
    async with staged(worker, api_keys_file=keys, admin_api_key_file=admins) as stage:
        alice, bob, root = ({"Authorization": f"Bearer {key}"} for key in ("key-a", "key-b", "root-key"))
        body = {**NATIVE, "rid": "mine"}
        asks = [asyncio.create_task(stage.post("/generate", body, headers=who)) for who in (alice, bob)]
        await worker.until(lambda it: len(it.requests) == 2)
        by_salt = {one.body["cache_salt"]: one.rids[0] for one in worker.requests}
        assert len(by_salt) == 2
        await asked(stage, {"abort_all": True}, headers=bob)
        await worker.until(lambda it: it.aborts)
        (bobs,) = set(worker.aborts)
        await asked(stage, {"rid": "mine"}, headers=root)
        await worker.until(lambda it: len(set(it.aborts)) == 2)
        assert bobs in by_salt.values()
        for one in asks:
            one.cancel()


async def test_two_requests_of_one_name_are_both_served() -> None:
    gate = asyncio.Event()
    worker = FakeWorker(script=Script(gates={0: gate}))
    async with staged(worker) as stage:
        asks = [Ask(stage, body={**NATIVE, "rid": "mine"}) for _ in range(2)]
        await worker.until(lambda it: len(it.requests) == 2)
        one, other = (request.rids[0] for request in worker.requests)
        assert not one.startswith(other)
        gate.set()
        assert [(await ask.task)[0] for ask in asks] == [200, 200]
