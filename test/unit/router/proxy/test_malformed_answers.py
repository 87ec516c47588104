"""An instance that answers 200 without an answer has failed; another instance gets the request."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web

from memserve.testing.fake_worker import FakeWorker, ReceivedRequest
from memserve.wire.messages import Role

from ..harness import staged
from .retry_harness import Ask, texts

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
BODIES = [("/generate", {"text": "hello"}), ("/v1/chat/completions", CHAT)]
NO_JSON = [b"", b"\xcf\xff", b"hello", b'{"text": "Hel', b"[1, 2"]
OTHERS = [b"{}", b"[]", b"7", b'{"meta_info": 1}']
"""JSON of another shape, which is detected where the router reads it."""
STREAM = [b"", b"\xcf\xff", b"hello", b'data: {"te', b'{"text": "Hello, world"}']


class _Nonsense(FakeWorker):
    """Answers 200 with any body, and ends it properly."""

    said = b""

    async def _answer(self, request: web.Request, received: ReceivedRequest) -> web.StreamResponse:
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
async def test_request_with_a_malformed_answer_is_retried_on_another_instance(
    role: Role, path: str, body: dict[str, Any], stream: bool
) -> None:
    streams = stream and role is not Role.PREFILL  # which answers whole
    is_merged = role is Role.DECODE and path == "/generate"
    malformed = STREAM if streams else [*NO_JSON, *(OTHERS if is_merged else [])]
    workers = team(role, b"")
    async with staged(*workers, policy="round_robin", cb_failure_threshold=1000) as stage:
        bad = workers[0]
        assert isinstance(bad, _Nonsense)
        for said in malformed:
            bad.said, before = said, len(bad.requests)
            while len(bad.requests) == before:
                ask = Ask(stage, path, {**body, "stream": stream})
                status, answer = await ask.task
                assert (status, texts(answer, stream)) == (200, ["Hello, world"]), said


@pytest.mark.parametrize("role", [Role.DECODE, Role.COLOCATED])
async def test_stream_without_its_end_is_resumed_or_ends_with_an_error(role: Role) -> None:
    workers = team(role, b'data: {"text": "Hel", "meta_info": {}}\n\n')
    async with staged(*workers, policy="round_robin") as stage:
        while not workers[0].requests:
            _, answer = await Ask(stage, body={"text": "hello", "stream": True}).task
        assert "ended before its end" in answer
        assert '"retryable":true' in answer


async def test_malformed_answer_of_the_only_instance_is_a_502() -> None:
    bad = _Nonsense()
    bad.said = b'{"text": '
    async with staged(bad) as stage:
        status, answer = await stage.post("/generate", {"text": "hello"})
        assert status == 502
        assert "unexpected shape" in answer["error"]["message"]
        assert answer["error"]["retryable"] is True
