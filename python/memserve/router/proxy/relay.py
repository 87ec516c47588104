"""Passes an instance's stream on as it comes, and raises the errors that the stream reports."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from memserve.router.cluster.instance import Instance
from memserve.router.errors import UpstreamError, message_of
from memserve.router.proxy.upstream import Leg
from memserve.router.request import decode_json
from memserve.router.sse import DONE, data_of

Write = Callable[[bytes], Awaitable[None]]

_ERROR, _ABORT = b'data: {"error"', b'"type":"abort"'
_DATA = b"data:"
_FIELDS = (_DATA, b":", b"event:", b"id:", b"retry:")


class Sink(Protocol):
    """The client's end of a stream."""

    @property
    def has_begun(self) -> bool:
        """Whether the client may have received a part."""

    async def write(self, chunk: bytes) -> None:
        """Send `chunk` now. Raises ClientLeft."""


async def relay(leg: Leg, write: Write, on_first: Callable[[bytes], None] | None = None) -> None:
    """Write the chunks as they come. Raises as `Leg` and `write`.

    Raises UpstreamError for an error event (5xx), for an answer that is no event stream, and for a stream
    that ends without [DONE].
    """
    chunk = await leg.first()
    if not chunk or not (chunk.startswith(_FIELDS) or _DATA.startswith(chunk)):
        raise _failed(leg.instance, 502, "its answer is not an event stream")
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
    """The server error (5xx) that `event` reports, if it does.

    SGLang's OpenAI endpoints then write an error object, /generate an answer that ends in an abort.
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
