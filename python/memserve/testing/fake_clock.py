"""A clock that advances only on request."""

from __future__ import annotations


class FakeClock:
    """Replaces `time.monotonic`."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        """The time, in seconds."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Move the time forward by `seconds`."""
        self.now_s += seconds
