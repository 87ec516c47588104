"""Passes an instance's events on as they come, and raises the errors that they report.

Whatever way the network cuts the stream, the client gets the same events, and the same error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from memserve.router.cluster.instance import Instance
from memserve.router.errors import UpstreamError, UpstreamRejected, message_of, refusal
from memserve.router.proxy.aborts import ABORT
from memserve.router.proxy.upstream import Leg
from memserve.router.request import JsonObject, decode_json, encode_json
from memserve.router.sse import EventSplitter, EventTooLong, data_of, events_of

Write = Callable[[bytes], Awaitable[None]]

_ERROR = b'"error"'
"""With `ABORT`, what events that report a fault hold; text that holds it has backslashes there."""


class Sink(Protocol):
    """The client's end of a stream."""

    @property
    def has_begun(self) -> bool:
        """Whether the client may have received a part."""

    async def write(self, chunk: bytes) -> None:
        """Send `chunk` now. Raises ClientLeft."""


async def relay(leg: Leg, write: Write, on_first: Callable[[bytes], None] | None = None) -> None:
    """Write whole events as they come, joined as they come. Raises as `Leg` and `write`.

    `on_first` gets the first event; comments before it are dropped. Raises UpstreamRejected (4xx) or
    UpstreamError (5xx) for a first event that refuses the request, and UpstreamError for a later one with a
    server error, for an answer that is no event stream, and for a stream that ends without [DONE].
    """
    splitter, last = EventSplitter(), b""
    while chunk := await leg.next():
        try:
            events = splitter.whole(chunk)
        except EventTooLong as error:
            raise _failed(leg.instance, 502, str(error)) from error
        if events and not last:
            events = _begun(leg.instance, events, on_first)
        if not events:
            continue
        last = events
        if _ERROR in events or ABORT in events:
            await _write_until_fault(leg.instance, events, write)
        else:
            await write(events)
    if not last:
        raise _failed(leg.instance, 502, "its answer is not an event stream")
    if splitter.rest().strip(b"\n") or data_of(events_of(last)[-1]) != b"[DONE]":
        raise _failed(leg.instance, 502, "its answer ended before its end")


def _begun(instance: Instance, events: bytes, on_first: Callable[[bytes], None] | None) -> bytes:
    """`events` from the first on that has data; b"" if none has. Raises as `relay`."""
    split = events_of(events)
    start = next((number for number, event in enumerate(split) if data_of(event)), None)
    if start is None:
        return b""
    first = split[start]
    if _ERROR in first and (error := _object(data_of(first)).get("error")):
        raise _refused(instance, error)
    if on_first is not None:
        on_first(first)
    return b"".join(split[start:]) if start else events


async def _write_until_fault(instance: Instance, events: bytes, write: Write) -> None:
    for event in events_of(events):
        if (fault := _fault_in(instance, event)) is not None:
            raise fault
        await write(event)


def _fault_in(instance: Instance, event: bytes) -> UpstreamError | None:
    """The server error (5xx) that `event` reports, if it does.

    SGLang's OpenAI endpoints then write an error object, /generate an answer that ends in an abort.
    """
    if _ERROR not in event and ABORT not in event:
        return None
    said = _object(data_of(event))
    meta: Any = said.get("meta_info")
    error = said.get("error") or (meta.get("finish_reason") if isinstance(meta, dict) else None)
    if not isinstance(error, dict):
        return None
    status = error.get("code") or error.get("status_code")
    if not isinstance(status, int) or not 500 <= status < 600:
        return None
    return _failed(instance, status, message_of(status, encode_json({"error": error})))


def _refused(instance: Instance, error: object) -> UpstreamRejected | UpstreamError:
    """The error for a stream whose first event reports one, with its status: SGLang refuses inside a 200."""
    status = error.get("code") if isinstance(error, dict) else None
    body = encode_json({"error": error})
    if isinstance(status, int) and 500 <= status < 600:
        return _failed(instance, status, message_of(status, body))
    return refusal(status if isinstance(status, int) and 400 <= status < 500 else 400, body)


def _object(data: bytes) -> JsonObject:
    """`data` as a JSON object; empty if it is none."""
    try:
        said = decode_json(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _failed(instance: Instance, status: int, message: str) -> UpstreamError:
    return UpstreamError(instance.instance_id, instance.role, status, message)
