"""What an instance streams, handed on as it comes; what it says went wrong in there, raised.

instance ── relay ──> ResumableStream ──> the client: whole events only, so that a stream can end, or be
                        └─> StreamState       continued, wherever an instance leaves off
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from memserve.router.cluster.instance import Instance
from memserve.router.errors import UpstreamError, message_of
from memserve.router.proxy.retry import AttemptId
from memserve.router.proxy.stream_splicer import StreamSplicer
from memserve.router.proxy.stream_state import StreamState
from memserve.router.proxy.upstream import Leg
from memserve.router.sse import DONE, EventSplitter, data_of

Write = Callable[[bytes], Awaitable[None]]

MAX_EVENT_BYTES = 1 << 20
"""So much of an event is kept until it is whole; one that is longer is not remembered."""

_ERROR, _ABORT = b'data: {"error"', b'"type":"abort"'
_DATA = b"data:"
_FIELDS = (_DATA, b":", b"event:", b"id:", b"retry:")

decode_json = msgspec.json.Decoder().decode


class Sink(Protocol):
    """The client's end of a stream."""

    @property
    def has_begun(self) -> bool:
        """Whether the client may have seen anything."""

    async def write(self, chunk: bytes) -> None:
        """Send `chunk` now. Raises ClientLeft."""


async def relay(leg: Leg, write: Write, on_first: Callable[[bytes], None] | None = None) -> None:
    """Write what comes. Raises what `Leg` and `write` raise, and UpstreamError for an error (5xx) in between,
    for what is no event stream, and for one that ends before its end."""
    chunk = await leg.first()
    if not chunk or not (chunk.startswith(_FIELDS) or _DATA.startswith(chunk)):
        raise _failed(leg.instance, 502, "its answer is no event stream")
    if on_first is not None:
        on_first(chunk)
    tail = b""
    while chunk:
        if _ERROR in chunk or _ABORT in chunk:
            await _write_until_fault(leg.instance, chunk, write)
        else:
            await write(chunk)
        tail = chunk if len(chunk) >= len(DONE) else tail + chunk
        chunk = await leg.next()
    if not tail.endswith(DONE):
        raise _failed(leg.instance, 502, "its answer ended before its end")


async def _write_until_fault(instance: Instance, chunk: bytes, write: Write) -> None:
    *events, rest = chunk.split(b"\n\n")
    for event in events:
        if (fault := _fault_in(instance, event)) is not None:
            raise fault
        await write(event + b"\n\n")
    if rest:
        await write(rest)


def _fault_in(instance: Instance, event: bytes) -> UpstreamError | None:
    """The error of its own that an instance tells of in `event`.

    OpenAI's endpoints of SGLang write an error object then, /generate an answer that ends in an abort.
    """
    data = data_of(event)
    if _ABORT not in data and not event.startswith(_ERROR):
        return None
    try:
        said: Any = decode_json(data)
        error = said.get("error") or said["meta_info"]["finish_reason"]
        status = error.get("code") or error.get("status_code")
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(status, int) or not 500 <= status < 600:
        return None
    return _failed(instance, status, message_of(status, msgspec.json.encode({"error": error})))


def _failed(instance: Instance, status: int, message: str) -> UpstreamError:
    return UpstreamError(instance.instance_id, instance.role, status, message)


class ResumableStream:
    """The client's end of one stream, whoever feeds it."""

    def __init__(self, sink: Sink, transcript: StreamState | None) -> None:
        """`transcript`: told of what the client gets."""
        self._sink = sink
        self._transcript = transcript
        self._rest = b""

    @property
    def transcript(self) -> StreamState | None:
        """None also if the stream turned out to be none that can be remembered."""
        return self._transcript

    async def write(self, chunk: bytes) -> None:
        """Send the events that `chunk` completes. Raises ClientLeft."""
        if self._rest or not chunk.endswith(b"\n\n"):
            chunk = self._cut(chunk)
        if chunk:
            if self._transcript is not None:
                self._transcript.note(chunk)
            await self._sink.write(chunk)

    async def end(self) -> None:
        """Send what has come in part: there is no more. Raises ClientLeft."""
        rest, self._rest = self._rest, b""
        if rest:
            await self._sink.write(rest)

    def writer(self, alias: AttemptId | None, continuation: StreamSplicer | None) -> Write:
        """Where the next attempt writes to; what the last one left in part is dropped."""
        self._rest = b""
        if alias is None:
            return self.write
        splitter = EventSplitter()

        async def write(chunk: bytes) -> None:
            for event in splitter.feed(chunk):
                own = alias.removed(event)
                if continuation is not None:
                    own = continuation.rewrite(own)
                if own:
                    await self.write(own)

        return write

    def _cut(self, chunk: bytes) -> bytes:
        """The whole events; the rest is kept."""
        chunk = self._rest + chunk
        # A server's own way to end events, or one that does not end: hand on what comes.
        if b"\r\n\r\n" in chunk or len(chunk) > MAX_EVENT_BYTES:
            self._transcript, self._rest = None, b""
            return chunk
        end = chunk.rfind(b"\n\n") + 2
        if end == 1:
            self._rest = chunk
            return b""
        self._rest = chunk[end:]
        return chunk[:end]
