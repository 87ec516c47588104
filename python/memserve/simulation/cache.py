"""One simulated instance's cached prompts: leaf-first LRU over a number of blocks.

A prompt's blocks are touched from its last to its first, so a block is always older than its parent:
the oldest of all is a leaf, and a plain LRU list evicts leaf-first. Knows no tiers and no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from memserve.core.block_keys import BlockKey


class PromptCache:
    """The blocks cached at one instance. Prefix-closed."""

    def __init__(self, capacity_blocks: int | None) -> None:
        """None: nothing is ever evicted."""
        self._capacity = capacity_blocks
        self._blocks: OrderedDict[BlockKey, BlockKey | None] = OrderedDict()
        """Parents by key, the least recently used first."""

    def __len__(self) -> int:
        return len(self._blocks)

    def depth(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the front, are cached. Touches nothing."""
        blocks = self._blocks
        for depth, key in enumerate(keys):
            if key not in blocks:
                return depth
        return len(keys)

    def insert(self, keys: Sequence[BlockKey]) -> tuple[int, list[BlockKey]]:
        """Cache a whole prompt and make it the most recently used.

        Returns how many of its blocks had been there, and those evicted for the rest, children before
        their parents; of a prompt that is larger than the cache, the first blocks stay.
        """
        blocks, before = self._blocks, self.depth(keys)
        for i in range(len(keys) - 1, -1, -1):
            if i < before:
                blocks.move_to_end(keys[i])
            else:
                blocks[keys[i]] = keys[i - 1] if i else None
        evicted: list[BlockKey] = []
        if self._capacity is not None:
            while len(blocks) > self._capacity:
                evicted.append(blocks.popitem(last=False)[0])
        return before, evicted

    def chains(self) -> list[tuple[BlockKey | None, tuple[BlockKey, ...]]]:
        """All that is cached as (parent, blocks), parents first: what a snapshot says."""
        return [(self._blocks[key], (key,)) for key in reversed(self._blocks)]
