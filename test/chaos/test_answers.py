"""Classification of answers: right, clear error, lost."""

from __future__ import annotations

import json

import pytest

from .answers import Lost, Outcome, judge
from .requests import Ask, Json

ASK = Ask("/generate", {}, ("abc",))
CHAT = Ask("/v1/chat/completions", {}, ("abc",))
FAILED = {"error": {"message": "it is gone", "retryable": True}}


def stream(*events: Json | str) -> bytes:
    return b"".join(b"data: %s\n\n" % (e if isinstance(e, str) else json.dumps(e)).encode() for e in events)


def delta(text: str) -> Json:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def body(text: str) -> bytes:
    return json.dumps({"text": text}).encode()


@pytest.mark.parametrize(
    ("ask", "is_stream", "status", "said", "outcome"),
    [
        (ASK, False, 200, body("abc"), Outcome.RIGHT),
        (ASK, True, 200, stream({"text": "a"}, {"text": "abc"}, "[DONE]"), Outcome.RIGHT),
        (CHAT, True, 200, stream(delta("a"), delta("bc"), "[DONE]"), Outcome.RIGHT),
        (ASK, False, 503, json.dumps(FAILED).encode(), Outcome.ERROR),
        (ASK, True, 200, stream({"text": "a"}, FAILED), Outcome.ERROR),
        (ASK, True, 200, stream({"text": "a"}, FAILED, "[DONE]"), Outcome.ERROR),
    ],
)
def test_chaos_answer_is_right_or_a_clear_error(
    ask: Ask, is_stream: bool, status: int, said: bytes, outcome: Outcome
) -> None:
    assert judge(ask, is_stream, status, said)[0] is outcome


@pytest.mark.parametrize(
    ("ask", "is_stream", "status", "said"),
    [
        (ASK, False, 200, body("abd")),
        (ASK, False, 500, json.dumps(FAILED).encode()),
        (ASK, False, 503, b"gone"),
        (ASK, False, 503, b'{"error": {"message": "no", "retryable": false}}'),
        (ASK, True, 200, stream({"text": "a"})),
        (ASK, True, 200, stream({"text": "abc"})),
        (ASK, True, 200, stream({"text": "ab"}, "[DONE]")),
        (ASK, True, 200, stream({"text": "x"}, FAILED)),
        (ASK, True, 200, stream({"text": "abc"}, "[DONE]", FAILED)),
        (ASK, True, 200, stream(FAILED, {"text": "abc"})),
        (ASK, True, 200, stream({"text": "a"}) + b'data: {"te' + stream(FAILED)),
        (CHAT, True, 200, stream(delta("a"), delta("a"), delta("bc"), "[DONE]")),
    ],
)
def test_chaos_answer_of_any_other_kind_is_lost(ask: Ask, is_stream: bool, status: int, said: bytes) -> None:
    with pytest.raises((Lost, ValueError)):
        judge(ask, is_stream, status, said)
