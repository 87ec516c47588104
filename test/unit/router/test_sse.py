"""The event splitter cuts a stream as the standard does, wherever its chunks end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.router import sse
from memserve.router.sse import EventSplitter, EventTooLong, data_of, events_of, with_data

from .event_streams import cut, data_in

STREAMS = st.lists(
    st.binary(max_size=6)
    | st.sampled_from([b"\n", b"\r", b"\r\n", b"\n\n", b"data:", b"data: {}", b"data", b": ping", b"id: 1"])
)


@given(STREAMS.map(b"".join), st.data())
def test_splitter_gives_equal_events_for_any_chunks(stream: bytes, data: st.DataObject) -> None:
    whole, pieces = EventSplitter(), EventSplitter()
    events = whole.feed(stream)
    assert [event for chunk in cut(stream, data) for event in pieces.feed(chunk)] == events
    assert pieces.rest().lstrip(b"\n") == whole.rest().lstrip(b"\n")


@given(STREAMS.map(b"".join))
def test_splitter_finds_the_data_that_the_standard_finds(stream: bytes) -> None:
    found = [data_of(event) for event in EventSplitter().feed(stream)]
    assert [one for one in found if one] == [one for one in map(bytes.strip, data_in(stream)) if one]


def test_splitter_passes_on_chunks_of_whole_events_as_they_are() -> None:
    chunk = b'data: {"a": 1}\n\n: ping\n\ndata: [DONE]\n\n'
    assert EventSplitter().whole(chunk) is chunk


def test_splitter_gives_an_event_as_soon_as_it_is_complete() -> None:
    splitter = EventSplitter()
    assert [splitter.feed(bytes([one])) for one in b"data: 1\r\r"][-1] == [b"data: 1\n\n"]
    assert splitter.feed(b"\ndata: 2\r\n\r\n") == [b"data: 2\n\n"]


def test_splitter_refuses_an_event_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "_MAX_EVENT_BYTES", 100)
    splitter = EventSplitter()
    long = b"data: " + b"x" * 200 + b"\n\n"
    assert splitter.whole(long) == long
    splitter.whole(b"x" * 100)
    with pytest.raises(EventTooLong):
        splitter.whole(b"x")


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\n\n", b"{}"),
        (b": a comment\nevent: message\ndata: {}\nid: 1\n\n", b"{}"),
        (b'data: {"a":\ndata: 1}\n\n', b'{"a":\n1}'),
        (b": ping\n\n", b""),
        (b"database: 1\n\n", b""),
    ],
)
def test_data_of_an_event_is_that_of_its_data_lines(event: bytes, data: bytes) -> None:
    assert data_of(event) == data
    rewritten = with_data(event, b"new")
    assert data_of(rewritten) == b"new"
    assert events_of(rewritten) == [rewritten]
    assert [line for line in event.split(b"\n") if line and not line.startswith(b"data:")] == [
        line for line in rewritten.split(b"\n") if line and not line.startswith(b"data:")
    ]
