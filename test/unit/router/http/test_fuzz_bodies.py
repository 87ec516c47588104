"""Any body gets an answer or a 4xx with the reason, also where the router tokenizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.core.errors import BadRequest
from memserve.router.field_kinds import ModelLimits
from memserve.router.proxy.validation import read_body, read_request
from memserve.router.request import Api

from ..fuzz_harness import Beside, beside
from ..json_strategies import ANY, VALID, damaged

LIMITS = ModelLimits(vocab_size=260, context_tokens=64, takes_empty_text=False)
PATHS = [*map(str, Api), "/explain"]


@pytest.fixture(scope="module")
def router(tiny_model: Path) -> Iterator[Beside]:
    with beside(tiny_model, cb_failure_threshold=10**9) as router:
        yield router


@given(st.binary(max_size=200) | ANY.map(lambda body: json.dumps(body).encode()))
def test_read_body_returns_an_object_or_raises_bad_request(raw: bytes) -> None:
    try:
        body = read_body(raw)
    except BadRequest:
        return
    assert isinstance(body, dict)


@settings(max_examples=400)
@given(damaged())
def test_read_call_returns_a_request_or_raises_bad_request_with_a_field(asked: tuple[str, Any]) -> None:
    path, body = asked
    try:
        call = read_request(Api(path), read_body(json.dumps(body).encode()), LIMITS, "rid")
    except BadRequest as error:
        refused = (error.status, bool(error.message))
    else:
        assert call.num_samples >= 1
        assert len(call.rids) == (call.num_prompts or 1)
        return
    assert refused == (400, True)


@pytest.mark.parametrize(("path", "body"), VALID)
def test_the_undamaged_bodies_of_this_module_are_valid(
    router: Beside, path: str, body: dict[str, Any]
) -> None:
    assert ask(router, path, json.dumps(body).encode())[0] == 200


@settings(max_examples=250)
@given(damaged())
def test_router_answers_or_refuses_damaged_bodies(router: Beside, asked: tuple[str, Any]) -> None:
    check(router, asked[0], json.dumps(asked[1]).encode())


@settings(max_examples=100)
@given(st.sampled_from(PATHS), st.binary(max_size=100) | ANY.map(lambda body: json.dumps(body).encode()))
def test_router_answers_or_refuses_any_bytes_as_a_body(router: Beside, path: str, raw: bytes) -> None:
    check(router, path, raw)


def ask(router: Beside, path: str, raw: bytes) -> tuple[int, bytes]:
    async def asked() -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json", "x-memserve-report": "1"}
        async with router.stage.client.post(router.stage.url(path), data=raw, headers=headers) as response:
            return response.status, await response.read()

    return router.run(asked())


def check(router: Beside, path: str, raw: bytes) -> None:
    """The body is answered, or refused in the error envelope, and no error is logged."""
    status, answer = ask(router, path, raw)
    assert status < 500, answer
    if status != 200:
        error = json.loads(answer)["error"]
        assert error["message"]
        assert error["retryable"] is False
    elif answer.startswith(b"data:"):
        assert answer.endswith(b"data: [DONE]\n\n")
    else:
        json.loads(answer)
    router.assert_well()
