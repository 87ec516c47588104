"""Blocks that instances are about to hold: dispatched to them, not yet reported. Each until a time.

Knows which blocks, and of whom; not what is held already, nor the clock. Loop thread only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.ids import InstanceId
from memserve.scheduling.prompt_tree.records import NO_OVERLAP, Overlap


class _Dispatched(NamedTuple):
    until_s: float
    keys: Sequence[BlockKey]
    """The whole prompt, not only what is expected of it."""


class InFlightBlocks:
    """Tails of dispatched prompts, by instance. Forgotten when reported, when late, or with the instance."""

    def __init__(self, max_blocks: int | None) -> None:
        """`max_blocks`: of prompts with more than that, over all instances, no more are remembered."""
        self._max_blocks = max_blocks
        self._expected: dict[InstanceId, dict[BlockKey, _Dispatched]] = {}
        self._due: list[tuple[float, int, InstanceId, _Dispatched]] = []
        self._order = 0
        self.num_kept = 0
        """Blocks of all dispatched prompts that are not late, reported or not: what takes memory."""

    def __len__(self) -> int:
        """Blocks that are expected, late ones included if `expire` has not come by."""
        return sum(map(len, self._expected.values()))

    def add(self, instance: InstanceId, keys: Sequence[BlockKey], depth: int, until_s: float) -> bool:
        """Expect `keys`, a prompt, from `depth` on; False, changing nothing, if there is no room."""
        if self._max_blocks is not None and self.num_kept + len(keys) > self._max_blocks:
            return False
        tail = keys[depth:]
        if not tail:
            return True
        mine = self._expected.setdefault(instance, {})
        prompt = _Dispatched(until_s, tuple(keys))
        later = {}
        if mine:
            later = {key: one for key in tail if (one := mine.get(key)) is not None and one.until_s > until_s}
        mine.update(dict.fromkeys(tail, prompt))
        mine.update(later)
        self._order += 1
        self.num_kept += len(keys)
        heapq.heappush(self._due, (until_s, self._order, instance, prompt))
        return True

    def chain_to(self, instance: InstanceId, key: BlockKey) -> Sequence[BlockKey]:
        """The blocks of a prompt up to this one, if it is expected of the instance; else none."""
        prompt = self._expected.get(instance, {}).get(key)
        return () if prompt is None else prompt.keys[: prompt.keys.index(key) + 1]

    def reported(self, instance: InstanceId, keys: Iterable[BlockKey]) -> None:
        """The instance has told of these: what it says from now on is what counts."""
        mine = self._expected.get(instance)
        if mine:
            for key in keys:
                mine.pop(key, None)

    def forget(self, instance: InstanceId) -> None:
        """Expect nothing of it any more."""
        self._expected.pop(instance, None)

    def expire(self, now_s: float) -> None:
        """Drop what is late."""
        while self._due and self._due[0][0] <= now_s:
            _, _, instance, prompt = heapq.heappop(self._due)
            self.num_kept -= len(prompt.keys)
            mine = self._expected.get(instance)
            if mine is None:
                continue
            for key in prompt.keys:
                if mine.get(key) is prompt:
                    del mine[key]
            if not mine:
                del self._expected[instance]

    def lengthen(self, overlaps: dict[InstanceId, Overlap], keys: Sequence[BlockKey], now_s: float) -> None:
        """Add to what each instance holds of `keys` the blocks expected right after that, as if in DRAM."""
        num_keys = len(keys)
        for instance, mine in self._expected.items():
            held = overlaps.get(instance, NO_OVERLAP)
            start = end = held.cached
            while end < num_keys and (one := mine.get(keys[end])) is not None and one.until_s > now_s:
                end += 1
            if end > start:
                depths = held.depths[: Tier.DRAM] + (end,) * len(held.depths[Tier.DRAM :])
                overlaps[instance] = Overlap(depths, held.readable)
