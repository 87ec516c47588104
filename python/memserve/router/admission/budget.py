"""A bound on the memory that requests take. Knows no requests."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

SERVED_FACTOR = 9
"""What a body that is being served takes beside itself, per byte: measured with lists of token ids, which
take the most (9.2 in all, 3.7 with text): parsed, cut into blocks, written again for each leg."""
SHARE = 4
"""Requests may take this part of the machine's memory, unless the configuration says how much."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class ByteBudget:
    """Event loop thread only."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0

    def try_take(self, num_bytes: int) -> bool:
        """Hold so many more; False if that is too many, and none were taken."""
        if self.held + num_bytes > self.max_bytes:
            return False
        self.held += num_bytes
        return True

    def give(self, num_bytes: int) -> None:
        """Let go of them."""
        self.held -= num_bytes


def default_bytes(cgroup_limit: Path = _CGROUP_LIMIT) -> int:
    """A share of this machine's memory, or of what its container may have."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # not in a container, or one without a limit: "max"
        memory = min(memory, int(cgroup_limit.read_text()))
    return memory // SHARE
