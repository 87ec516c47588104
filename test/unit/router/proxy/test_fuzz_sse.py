"""Streams in any chunks, with any events."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from memserve.core.errors import MemServeError
from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.instance import Instance
from memserve.router.proxy.recovery import ResumableStream, StreamState
from memserve.router.proxy.relay import relay
from memserve.router.proxy.stream_splicer import Diverged, Unreadable
from memserve.router.request import Api, GenerationRequest
from memserve.router.server_info import ServerInfo
from memserve.router.sse import DONE, events_of
from memserve.wire.messages import Role

from ..json_strategies import ANY

EVENTS = st.one_of(
    st.binary(max_size=30),
    st.sampled_from(
        [
            b'data: {"text": "a", "output_ids": [1], '
            b'"meta_info": {"id": "mark-000000-x", "completion_tokens": 1}}\n\n',
            b'data: {"id": "mark-000000-x", "choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n',
            b'data: {"error": {"message": "no", "code": 500}}\n\n',
            b'data: {"meta_info": {"finish_reason": {"type":"abort","status_code":503}}}\n\n',
            b'data: {"type":"abort"}\n\n',
            b"data: {\n\n",
            b": ping\n\n",
            b"\n\n",
            DONE,
        ]
    ),
    ANY.map(lambda said: b"data: %s\n\n" % repr(said).encode("utf-8", "replace")),
)
NAME = "mark-000000-x"
CALLS = [
    GenerationRequest(api, {"stream": True}, NAME, True, (NAME,), None, 1, None, mark="mark") for api in Api
]


class _Leg:
    """A leg that delivers `chunks`."""

    def __init__(self, chunks: list[bytes]) -> None:
        facts = ServerInfo("m", "/m")
        self.instance = Instance(InstanceId("a"), Epoch(1), Role.COLOCATED, "http://a:1", None, facts)
        self._chunks: Iterator[bytes] = iter([one for one in chunks if one])

    async def next(self) -> bytes:
        return next(self._chunks, b"")


class _Client:
    """A client that keeps its chunks."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    @property
    def has_begun(self) -> bool:
        return bool(self.chunks)

    async def write(self, chunk: bytes) -> None:
        self.chunks.append(chunk)


def streamed(call: GenerationRequest, chunks: list[bytes]) -> tuple[bool, bytes]:
    """The bytes that a client gets of a stream, and whether the stream was complete."""
    client = _Client()

    async def run() -> bool:
        state = StreamState(call)
        stream = ResumableStream(client, state)
        leg: Any = _Leg(chunks)
        try:
            await relay(leg, stream.writer(call, leg.instance, None))
            await stream.end()
        except (MemServeError, Diverged):
            return False
        finally:
            with suppress(Unreadable):
                state.received()
        return True

    return asyncio.run(run()), b"".join(client.chunks)


@given(st.sampled_from(CALLS), st.lists(EVENTS, max_size=6), st.data())
def test_relay_of_any_stream_sends_whole_events_and_ends_or_raises(
    call: GenerationRequest, events: list[bytes], data: st.DataObject
) -> None:
    joined = b"".join(events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(joined)), max_size=6)))
    chunks = [joined[a:b] for a, b in zip([0, *cuts], [*cuts, len(joined)], strict=True)]
    is_whole, got = streamed(call, chunks)
    assert b"mark-" not in got or b'"mark-' not in joined
    assert got.endswith(b"\n\n") or not got
    if is_whole:
        assert events_of(got)[-1] == DONE
