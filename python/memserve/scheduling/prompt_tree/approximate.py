"""The assumed cache of a worker that reports nothing: the prompts it answered, up to a capacity and a TTL.

The worker is assumed to evict the least recently used block first, tails before heads. A use of a prompt
is recorded from its last block to its first, so a block is always older than the blocks before it.
Knows no tree. Event loop thread only. Source: MemServe ("index updates ride on responses"; TTL in minutes).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from memserve.core.block_keys import BlockKey


class ApproximateCache:
    """One worker's blocks, least recently used first."""

    __slots__ = ("_capacity_blocks", "_ttl_s", "_used")

    def __init__(self, capacity_blocks: int | None, ttl_s: float) -> None:
        """`capacity_blocks`: None if unknown. Raises ValueError unless both are positive."""
        if ttl_s <= 0 or (capacity_blocks is not None and capacity_blocks < 1):
            raise ValueError(f"no approximate cache of {capacity_blocks} blocks for {ttl_s} s")
        self._capacity_blocks = capacity_blocks
        self._ttl_s = ttl_s
        self._used: OrderedDict[BlockKey, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used)

    def use(self, keys: Sequence[BlockKey], now_s: float) -> list[BlockKey]:
        """Record a served prompt; returns the evicted keys, tails first, which may be its own."""
        used = self._used
        for key in reversed(keys):
            used.pop(key, None)
            used[key] = now_s
        gone = []
        while self._capacity_blocks is not None and len(used) > self._capacity_blocks:
            gone.append(used.popitem(last=False)[0])
        return gone

    def due_s(self) -> float:
        """The time at which the oldest block expires."""
        for since_s in self._used.values():
            return since_s + self._ttl_s
        return float("inf")

    def expire(self, now_s: float) -> list[BlockKey]:
        """Remove and return the expired keys, tails first."""
        gone = []
        while self.due_s() <= now_s:
            gone.append(self._used.popitem(last=False)[0])
        return gone

    def discard(self, key: BlockKey) -> bool:
        """Remove a key; whether it was in the cache."""
        return self._used.pop(key, None) is not None
