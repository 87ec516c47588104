"""A bound on the bytes of all request bodies that the router holds. Knows no requests."""

from __future__ import annotations


class ByteBudget:
    """Event loop thread only."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.held = 0

    def try_take(self, num_bytes: int) -> bool:
        """Hold so many more; False if that is too many, and none were taken."""
        if self.held + num_bytes > self._max_bytes:
            return False
        self.held += num_bytes
        return True

    def give(self, num_bytes: int) -> None:
        """Let go of them."""
        self.held -= num_bytes
