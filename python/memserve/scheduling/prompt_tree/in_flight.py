"""Blocks of dispatched prompts that the instances have not reported yet. Each block expires.

Knows neither the blocks that instances hold nor the clock. Event loop thread only.
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
    """All blocks of the prompt, not only the expected ones."""


class InFlightBlocks:
    """The expected tails of prompts, by instance. Removed when reported, expired, or with the instance."""

    def __init__(self, max_blocks: int | None) -> None:
        """`max_blocks`: limit for the blocks of all remembered prompts; None: no limit."""
        self._max_blocks = max_blocks
        self._expected: dict[InstanceId, dict[BlockKey, _Dispatched]] = {}
        self._due: list[tuple[float, int, InstanceId, _Dispatched]] = []
        self._order = 0
        self.num_kept = 0
        """Blocks of all prompts that have not expired, reported or not: they take memory."""

    def __len__(self) -> int:
        """The number of expected blocks; includes expired blocks until `expire` is called."""
        return sum(map(len, self._expected.values()))

    def add(self, instance: InstanceId, keys: Sequence[BlockKey], depth: int, until_s: float) -> bool:
        """Expect the blocks of a prompt from `depth` on; False, changing nothing, beyond `max_blocks`."""
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
        """The prompt up to `key`, if `key` is expected of the instance; otherwise empty."""
        prompt = self._expected.get(instance, {}).get(key)
        return () if prompt is None else prompt.keys[: prompt.keys.index(key) + 1]

    def reported(self, instance: InstanceId, keys: Iterable[BlockKey]) -> None:
        """The instance has reported these blocks: they are no longer expected."""
        mine = self._expected.get(instance)
        if mine:
            for key in keys:
                mine.pop(key, None)

    def forget(self, instance: InstanceId) -> None:
        """Remove all expected blocks of an instance."""
        self._expected.pop(instance, None)

    def expire(self, now_s: float) -> None:
        """Remove the blocks that have expired."""
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
        """Extend each overlap by the expected blocks that follow it, counted as if in DRAM."""
        num_keys = len(keys)
        for instance, mine in self._expected.items():
            held = overlaps.get(instance, NO_OVERLAP)
            start = end = held.cached
            while end < num_keys and (one := mine.get(keys[end])) is not None and one.until_s > now_s:
                end += 1
            if end > start:
                depths = held.depths[: Tier.DRAM] + (end,) * len(held.depths[Tier.DRAM :])
                overlaps[instance] = Overlap(depths, held.readable)
