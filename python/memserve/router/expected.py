"""Blocks that instances are about to hold: dispatched to them, not yet reported. Each until a time.

Knows which blocks, and of whom; not what is held already, nor the clock. Loop thread only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from memserve.core.block_keys import BlockKey
from memserve.core.ids import InstanceId
from memserve.router.tree_records import Depth


class ExpectedBlocks:
    """Tails of dispatched prompts, by instance. Forgotten when reported, when late, or with the instance."""

    def __init__(self, max_blocks: int | None) -> None:
        """`max_blocks`: more than that are not remembered, over all instances."""
        self._max_blocks = max_blocks
        self._until: dict[InstanceId, dict[BlockKey, float]] = {}
        self._due: list[tuple[float, int, InstanceId, Sequence[BlockKey]]] = []
        self._order = 0
        self._num_due = 0

    def __len__(self) -> int:
        """Blocks that are expected, or were and have not been looked at since."""
        return sum(map(len, self._until.values()))

    def add(self, instance: InstanceId, keys: Sequence[BlockKey], until_s: float) -> bool:
        """Expect `keys`, which chain; False, changing nothing, if there is no room."""
        if self._max_blocks is not None and self._num_due + len(keys) > self._max_blocks:
            return False
        mine = self._until.setdefault(instance, {})
        later = {key: until for key in keys if (until := mine.get(key)) is not None and until > until_s}
        mine.update(dict.fromkeys(keys, until_s))
        mine.update(later)
        self._order += 1
        self._num_due += len(keys)
        heapq.heappush(self._due, (until_s, self._order, instance, tuple(keys)))
        return True

    def reported(self, instance: InstanceId, keys: Iterable[BlockKey]) -> None:
        """The instance has told of these: what it says from now on is what counts."""
        mine = self._until.get(instance)
        if mine:
            for key in keys:
                mine.pop(key, None)

    def forget(self, instance: InstanceId) -> None:
        """Expect nothing of it any more."""
        self._until.pop(instance, None)

    def expire(self, now_s: float) -> None:
        """Drop what is late."""
        while self._due and self._due[0][0] <= now_s:
            _, _, instance, keys = heapq.heappop(self._due)
            self._num_due -= len(keys)
            mine = self._until.get(instance)
            if mine is None:
                continue
            for key in keys:
                if mine.get(key, now_s + 1) <= now_s:
                    del mine[key]
            if not mine:
                del self._until[instance]

    def lengthen(self, depths: dict[InstanceId, Depth], keys: Sequence[BlockKey], now_s: float) -> None:
        """Add to what each instance holds of `keys` what is expected of it right after that."""
        num_keys = len(keys)
        for instance, mine in self._until.items():
            held = depths.get(instance)
            start = end = held.total if held else 0
            while end < num_keys and mine.get(keys[end], now_s) > now_s:
                end += 1
            if end > start:
                depths[instance] = Depth(held.near if held else 0, end)
