"""StreamState: reads a stream's chunks only when needed, in bounded memory."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from memserve.router.proxy.recovery import FOLD_BYTES, MAX_BYTES, StreamState
from memserve.router.proxy.stream_splicer import Unreadable
from memserve.router.request import Api

from .recovery_harness import PROMPT, SERVER, native, openai, seen_of


@pytest.mark.parametrize("incremental", [False, True])
def test_stream_state_of_a_long_stream_takes_little_memory(incremental: bool) -> None:
    server = replace(SERVER, is_incremental=incremental)
    call = native(max_new_tokens=900)
    events = server.stream(call, PROMPT, [1])
    assert sum(map(len, events)) > FOLD_BYTES
    state = StreamState(call)
    for event in events:
        state.note(event)
        assert sum(map(len, state._chunks)) <= FOLD_BYTES + 4 * max(map(len, events))
    assert state.received().choices[0].ids == seen_of(call, SERVER.stream(call, PROMPT, [1])).choices[0].ids
    assert state.received().is_done


def test_stream_state_forgets_a_stream_that_is_too_long() -> None:
    call = openai(Api.COMPLETIONS)
    event = json.dumps({"id": "x", "choices": [{"index": 0, "text": "x" * 100_000}]}).encode()
    with pytest.raises(Unreadable, match="longer"):
        seen_of(call, [b"data: " + event + b"\n\n"] * (MAX_BYTES // 100_000 + 1))


@pytest.mark.parametrize(
    "event",
    [b"data: {}\n\n", b"data: {oops\n\n", b'data: {"meta_info": {"completion_tokens": 1}, "text": "x"}\n\n'],
)
def test_stream_state_raises_unreadable_for_unknown_events(event: bytes) -> None:
    with pytest.raises(Unreadable):
        seen_of(native(), [event])
