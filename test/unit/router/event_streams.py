"""Event streams as a network may deliver them, and what a client reads from them."""

from __future__ import annotations

from hypothesis import strategies as st


def cut(stream: bytes, data: st.DataObject, max_cuts: int = 8) -> list[bytes]:
    """`stream` in pieces."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=max_cuts)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    return [one for one in pieces if one]


def data_in(stream: bytes) -> list[bytes]:
    """The data of all events, as the standard reads a stream. WHATWG HTML, 9.2.6."""
    found: list[bytes] = []
    lines: list[bytes] = []
    for line in stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]:
        if not line and lines:
            found.append(b"\n".join(lines))
            lines = []
        elif line.startswith(b"data:"):
            lines.append(line[5:].removeprefix(b" "))
    return found


@st.composite
def written(draw: st.DrawFn, payload: bytes) -> bytes:
    """An event with the JSON `payload`, in any spelling that the standard allows."""
    before = draw(st.sampled_from([[], [b": ping", b""], [b": ping"], [b"event: message"], [b"id: 1"]]))
    rows = payload.split(b", ", 1) if draw(st.booleans()) else [payload]
    field = draw(st.sampled_from([b"data: ", b"data:"]))
    last = [field + row + b"," for row in rows[:-1]] + [field + rows[-1], b"", b""]
    return draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"])).join([*before, *last])
