"""Server-sent events as SGLang writes them. Knows no sockets."""

from __future__ import annotations

from collections.abc import Iterator

DONE = b"data: [DONE]\n\n"


class EventSplitter:
    """Splits a byte stream into events; a chunk may end anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The events completed by `chunk`, each with its closing blank line."""
        *events, self._rest = (self._rest + chunk).split(b"\n\n")
        for event in events:
            yield event + b"\n\n"

    def rest(self) -> bytes:
        """The bytes after the last event: b"" after a well-formed stream."""
        return self._rest


def data_of(event: bytes) -> bytes:
    """The payload of an event; b"" if it has none."""
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            return line[5:].strip()
    return b""


def with_data(event: bytes, data: bytes) -> bytes:
    """`event` with the payload `data`; its other lines stay."""
    lines = [b"data: " + data if line.startswith(b"data:") else line for line in event.split(b"\n")]
    return b"\n".join(lines)
