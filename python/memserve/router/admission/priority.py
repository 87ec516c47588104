"""How urgent a request says that it is."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

PRIORITY = "x-priority"
MAX_PRIORITY = 1 << 31


class _Body(msgspec.Struct):
    priority: int | None = None


def priority_of(headers: Mapping[str, str], body: bytes) -> int:
    """Of a header, or else of SGLang's field; higher comes first, and 0 is what has none."""
    text = headers.get(PRIORITY)
    if text is not None:
        try:
            return max(-MAX_PRIORITY, min(MAX_PRIORITY, int(text[:20])))
        except ValueError:
            return 0
    if b'"priority"' not in body:
        return 0
    try:
        return msgspec.json.decode(body, type=_Body).priority or 0
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return 0  # what is wrong with it is said when it is read
