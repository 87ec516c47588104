"""Server-sent events: cut out of a byte stream, read and rewritten. Knows no sockets.

    bytes     data: a⏎⏎data: b⏎  ⏎: ping⏎⏎da          as the network delivers them
    events   └───────┘└────────────┘└───────┘└ kept until its end comes

Source: WHATWG HTML, 9.2 "Server-sent events". SGLang writes `data: …`, LF, LF, nearly always whole in a read.
"""

from __future__ import annotations

from memserve.core.errors import MemServeError

DONE = b"data: [DONE]\n\n"
_MAX_EVENT_BYTES = 256 << 20
"""The longest event that is collected: the logprobs of a long prompt take some tens of MiB."""

_END = b"\n\n"


class EventTooLong(MemServeError):
    """A stream goes on for longer than any event, without the end of one."""

    def __init__(self) -> None:
        super().__init__(f"an event of its answer is longer than {_MAX_EVENT_BYTES >> 20} MiB")


class EventSplitter:
    """Cuts a stream into events, wherever its chunks end. Lines that end in CR or CR LF end in LF then."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._num_bytes = 0
        self._is_after_cr = False

    def whole(self, chunk: bytes) -> bytes:
        """The events that `chunk` completes, joined; b"" if there are none. Raises EventTooLong."""
        if self._is_after_cr or b"\r" in chunk:
            chunk = self._with_lf(chunk)
        if not self._parts and chunk.endswith(_END):
            return chunk.lstrip(b"\n")
        if self._parts and self._parts[-1].endswith(b"\n"):
            last = self._parts.pop()
            self._parts.append(last[:-1])
            self._num_bytes -= 1
            chunk = b"\n" + chunk
        end = chunk.rfind(_END) + 2
        if end == 1:
            self._keep(chunk)
            return b""
        whole = b"".join([*self._parts, chunk[:end]])
        self._parts, self._num_bytes = [], 0
        self._keep(chunk[end:])
        return whole.lstrip(b"\n")

    def feed(self, chunk: bytes) -> list[bytes]:
        """The same one by one: `events_of`."""
        return events_of(self.whole(chunk))

    def rest(self) -> bytes:
        """The bytes after the last event: b"" after a well-formed stream."""
        return b"".join(self._parts)

    def _keep(self, chunk: bytes) -> None:
        if chunk:
            self._parts.append(chunk)
            self._num_bytes += len(chunk)
            if self._num_bytes > _MAX_EVENT_BYTES:
                raise EventTooLong

    def _with_lf(self, chunk: bytes) -> bytes:
        if self._is_after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._is_after_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def events_of(whole: bytes) -> list[bytes]:
    """Whole events one by one, each with its closing blank line; other blank lines are dropped."""
    if whole.find(_END) == len(whole) - 2 and not whole.startswith(b"\n"):
        return [whole]
    events = [event.strip(b"\n") for event in whole.split(_END)]
    return [event + _END for event in events if event]


def data_of(event: bytes) -> bytes:
    """The payload of an event; b"" if it has none, as a comment."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2:
        return event[6:-2].strip()
    lines = [line for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join([line[5:].removeprefix(b" ") for line in lines]).strip()


def with_data(event: bytes, data: bytes) -> bytes:
    """`event` with the payload `data`, which is a line; its lines without data stay."""
    kept = [line for line in event.split(b"\n") if line and not line.startswith(b"data:")]
    return b"\n".join([*kept, b"data: " + data, b"", b""])
