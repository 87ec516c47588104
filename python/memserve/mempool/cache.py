"""The slots of one tier and the index over them, changed together; each change goes to the event log.

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
from memserve.mempool.eviction import EvictionPolicy
from memserve.mempool.index import BlockIndex, CachedNode


class BlockCache:
    """A slot is CACHED in `allocator` exactly while a node of `index` names it."""

    def __init__(
        self, num_slots: int, max_slots: int, tier: Tier, eviction: EvictionPolicy, events: EventLog
    ) -> None:
        self.allocator = Allocator(num_slots, max_slots)
        self.index = BlockIndex(max_slots, eviction)
        self.tier = tier
        self._events = events
        self.evictions = 0

    def take(self, num_blocks: int, state: SlotState) -> Slots:
        """`num_blocks` FREE slots, now in `state`; evicts blocks if too few are free.

        Raises, changing nothing, OutOfBlocks, or BlockStateError for a negative number.
        """
        if num_blocks < 0:
            raise BlockStateError(f"{num_blocks} blocks cannot be had")
        free, evictable = self.allocator.count(FREE), self.index.num_evictable
        if self.allocator.is_draining:  # Evicting a block from a slot that retires makes no room.
            evictable -= len(self.movable(self.allocator.limit))
        if num_blocks > free + evictable:
            raise OutOfBlocks(num_blocks, free, evictable)
        while (lacking := num_blocks - self.allocator.count(FREE)) > 0:
            self.evict(lacking)
        return self.allocator.take(num_blocks, state)

    def evict(self, num_blocks: int) -> None:
        """Free `num_blocks` blocks in the order of eviction. The caller knows that so many are evictable."""
        victims = self.index.evict(num_blocks)
        self.evictions += len(victims)
        self._uncache(victims, FREE)

    def nodes(self) -> list[CachedNode]:
        """All blocks, parents first: a copy."""
        return self.index.tree.nodes()

    def publish(self, keys: Sequence[BlockKey], slots: Slots, parent: BlockKey | None) -> int:
        """Turn the slots of new keys, a suffix of `keys`, from PRIVATE to CACHED; returns how many.

        The caller has checked that all `slots` are PRIVATE. Raises KeyError, changing nothing, if the parent
        of the first new key is not cached.
        """
        added = self.index.insert(keys, slots, parent)
        self.allocator.change(slots[len(slots) - len(added) :], PRIVATE, CACHED)
        self._events.stored(self.tier, added)
        return len(added)

    def drop(self, top: CachedNode) -> int:
        """Take a block and all blocks after it out of the index, leased or not; returns how many.

        Leased slots are QUARANTINED until `unpin` ends their last lease.
        """
        free, held = self.index.drop(top)
        self._uncache(free, FREE)  # All blocks before a leased one are leased: `held` is last.
        self._uncache(held, QUARANTINED)
        return len(free) + len(held)

    def movable(self, first: int) -> Slots:
        """The slots from `first` on that hold cached, unleased blocks. A few nanoseconds per slot."""
        slots = self.allocator.used_from(first, CACHED)
        return slots[~self.index.are_pinned(slots)]

    def unpin(self, node: CachedNode) -> None:
        """End one pin of the index, and free dropped blocks that it was the last to hold."""
        self.allocator.move(np.array(self.index.unpin(node), np.int64), QUARANTINED, FREE)

    def _uncache(self, nodes: Sequence[CachedNode], state: SlotState) -> None:
        slots = np.fromiter((node.payload for node in nodes), np.int64, len(nodes))
        self.allocator.move(slots, CACHED, state)
        self._events.removed(self.tier, nodes)
