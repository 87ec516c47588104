"""A client's error that SGLang answers with 500 is told as 400, once, and is no fault of a server."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from memserve.core.ids import InstanceId
from memserve.router.cluster.breaker import BreakerState
from memserve.router.errors import UpstreamError
from memserve.router.proxy.client_errors import client_error
from memserve.router.request import Api, GenerationRequest
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import staged
from .retry_harness import Ask, metric, state

NOT_ACCEPTED = (
    'Grammar accept_token failed for req 1-0 with token 0: Tokens not accepted: 0\nKey string: {"$ref": "#"}'
)
CASES: list[tuple[str, dict[str, Any], str]] = [
    (NOT_ACCEPTED, {"text": "a", "sampling_params": {"json_schema": '{"$ref": "#"}'}}, "json_schema"),
    ("Grammar accept_token failed: no", {"text": "a", "sampling_params": {"ebnf": "x"}}, "ebnf"),
    (
        "Internal server error: bad escape (end of pattern) at position 1",
        {"text": "a", "stop_regex": "\\"},
        "",
    ),
    ("Internal Server Error", {"text": "a", "sampling_params": {"stop_regex": "(["}}, "stop_regex"),
]


def said(message: str, body: dict[str, Any]) -> Any:
    request = GenerationRequest(Api.GENERATE, body, "r", False, ("r",), None, 1, None)
    return client_error(request, UpstreamError(InstanceId("a"), "decode", 500, message))


@pytest.mark.parametrize(("message", "body", "field"), CASES)
def test_client_error_needs_the_message_and_the_field(message: str, body: dict[str, Any], field: str) -> None:
    error = said(message, body)
    assert (error.status, error.error["retryable"]) == (400, False)
    assert message in error.error["message"]
    assert field in str(error.error["param"])
    assert said(message, {"text": "a"}) is None
    assert said("out of memory", body) is None


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("managers/scheduler_components/batch_result_processor.py", "Grammar accept_token failed"),
        ("disaggregation/prefill.py", "Grammar accept_token failed"),
        ("entrypoints/openai/serving_base.py", 'f"Internal server error: {str(e)}"'),
        ("sampling/sampling_params.py", "sre_parse.parse(regex_str)"),
    ],
)
def test_sglang_has_the_texts_of_the_table(file: str, text: str) -> None:
    found = importlib.util.find_spec("sglang")
    if found is None or found.origin is None:
        pytest.skip("SGLang is not installed")
    assert text in (Path(found.origin).parent / "srt" / file).read_text()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("role", [Role.COLOCATED, Role.PREFILL, Role.DECODE])
async def test_client_error_is_told_once_and_opens_no_breaker(role: Role, stream: bool) -> None:
    workers = [FakeWorker(role, script=Script(status=500, message=NOT_ACCEPTED)) for _ in range(2)]
    others = [FakeWorker(one) for one in (Role.PREFILL, Role.DECODE) if Role.COLOCATED not in (role, one)]
    others = [one for one in others if one.role is not role]
    for other in others:  # as the other leg of a pair, which waits
        other.script = Script(gates={0: asyncio.Event()})
    async with staged(*workers, *others, cb_failure_threshold=1) as stage:
        for _ in range(4):
            ask = Ask(stage, body={**CASES[0][1], "stream": stream})
            status, answer = await ask.task
            error = json.loads(answer)["error"]
            assert (status, error["param"], error["retryable"]) == (400, "json_schema", False)
            assert "x-memserve-attempts" not in ask.headers
        assert sum(len(one.requests) for one in workers) == 4
        assert {state(stage, one) for one in workers} == {BreakerState.CLOSED}
        assert not await metric(stage, 'memserve_router_retries_total{reason="failed"}')
