"""Instances that answer 200 with something else than an answer have failed, and another one is asked."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web

from memserve.testing.fake_worker import FakeWorker, Received
from memserve.wire.messages import Role

from ..harness import staged
from .retry_harness import Ask, texts

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
BODIES = [("/generate", {"text": "hello"}), ("/v1/chat/completions", CHAT)]
NO_JSON = [b"", b"\xcf\xff", b"hello", b'{"text": "Hel', b"[1, 2"]
OTHERS = [b"{}", b"[]", b"7", b'{"meta_info": 1}']
"""JSON of another shape: noticed where something is read from it."""
STREAM = [b"", b"\xcf\xff", b"hello", b'data: {"te', b'{"text": "Hello, world"}']


class _Nonsense(FakeWorker):
    """Ends its answers properly, whatever is in them."""

    said = b""

    async def _answer(self, request: web.Request, received: Received) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(self.said)
        return response


def team(role: Role, said: bytes) -> list[FakeWorker]:
    bad = _Nonsense(role)
    bad.said = said
    if role is Role.COLOCATED:
        return [bad, FakeWorker()]
    other = Role.DECODE if role is Role.PREFILL else Role.PREFILL
    return [bad, FakeWorker(role), FakeWorker(other)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE, Role.COLOCATED])
async def test_another_instance_answers(role: Role, path: str, body: dict[str, Any], stream: bool) -> None:
    streams = stream and role is not Role.PREFILL  # which answers whole
    is_merged = role is Role.DECODE and path == "/generate"
    nonsense = STREAM if streams else [*NO_JSON, *(OTHERS if is_merged else [])]
    workers = team(role, b"")
    async with staged(*workers, policy="round_robin", cb_failure_threshold=1000) as stage:
        bad = workers[0]
        assert isinstance(bad, _Nonsense)
        for said in nonsense:
            bad.said, before = said, len(bad.requests)
            while len(bad.requests) == before:
                ask = Ask(stage, path, {**body, "stream": stream})
                status, answer = await ask.task
                assert (status, texts(answer, stream)) == (200, ["Hello, world"]), said


@pytest.mark.parametrize("role", [Role.DECODE, Role.COLOCATED])
async def test_a_stream_that_ends_early_goes_on_or_says_so(role: Role) -> None:
    workers = team(role, b'data: {"text": "Hel", "meta_info": {}}\n\n')
    async with staged(*workers, policy="round_robin") as stage:
        while not workers[0].requests:
            _, answer = await Ask(stage, body={"text": "hello", "stream": True}).task
        assert "ended before its end" in answer
        assert '"retryable":true' in answer


async def test_with_nobody_else_it_is_a_bad_gateway() -> None:
    bad = _Nonsense()
    bad.said = b'{"text": '
    async with staged(bad) as stage:
        status, answer = await stage.post("/generate", {"text": "hello"})
        assert status == 502
        assert "unexpected shape" in answer["error"]["message"]
        assert answer["error"]["retryable"] is True
