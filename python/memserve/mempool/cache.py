"""The slots of one tier and the index over them, changed together, each change told to the event log.

Knows no bytes, addresses or reservations. Not thread-safe: its pool locks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.errors import BlockStateError, OutOfBlocks
from memserve.mempool.allocator import CACHED, FREE, PRIVATE, QUARANTINED, Allocator, Slots, SlotState
from memserve.mempool.events import EventLog
from memserve.mempool.eviction import Ordering
from memserve.mempool.index import BlockIndex, CachedNode


class BlockCache:
    """A slot is CACHED in `allocator` exactly while a node of `index` names it."""

    def __init__(self, num_slots: int, tier: Tier, ordering: Ordering) -> None:
        self.allocator = Allocator(num_slots)
        self.index = BlockIndex(num_slots, ordering)
        self.events = EventLog(tier)
        self.evictions = 0

    def take(self, num_blocks: int, state: SlotState) -> Slots:
        """That many slots, evicting what is needed.

        Raises, changing nothing, OutOfBlocks, or BlockStateError for less than none.
        """
        if num_blocks < 0:
            raise BlockStateError(f"{num_blocks} blocks cannot be had")
        free, evictable = self.allocator.count(FREE), self.index.num_evictable
        if num_blocks > free + evictable:
            raise OutOfBlocks(num_blocks, free, evictable)
        if num_blocks > free:
            victims = self.index.evict(num_blocks - free)
            self.evictions += len(victims)
            self._retire(victims, FREE)
        return self.allocator.take(num_blocks, state)

    def publish(self, keys: Sequence[BlockKey], slots: Slots, parent: BlockKey | None) -> int:
        """PRIVATE slots become CACHED where their key is new, from some key to the end; returns how many.

        Raises KeyError, changing nothing, if what the first new key comes after is not cached.
        """
        added = self.index.insert(keys, slots.tolist(), parent)
        self.allocator.move(slots[len(slots) - len(added) :], PRIVATE, CACHED)
        self.events.stored(added)
        return len(added)

    def delete(self, keys: Sequence[BlockKey]) -> int:
        """Free the end of a chain, up to a block that is leased or has others after it; returns how many."""
        removed = self.index.delete(keys)
        self._retire(removed, FREE)
        return len(removed)

    def drop(self, top: CachedNode) -> int:
        """Take a block and all after it out of the index, leased or not; returns how many.

        Leased slots are QUARANTINED until `unpin` ends their last lease.
        """
        free, held = self.index.drop(top)
        self._retire(free, FREE)  # What is leased has only leased blocks before it: held is last.
        self._retire(held, QUARANTINED)
        return len(free) + len(held)

    def unpin(self, node: CachedNode) -> None:
        """End one pin of the index, and free what was only waiting for that."""
        self.allocator.move(np.array(self.index.unpin(node), np.int64), QUARANTINED, FREE)

    def _retire(self, nodes: Sequence[CachedNode], state: SlotState) -> None:
        slots = np.fromiter((node.payload for node in nodes), np.int64, len(nodes))
        self.allocator.move(slots, CACHED, state)
        self.events.removed(nodes)
