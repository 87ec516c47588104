"""Which cached block comes after which, by slot, and how often each is held: columns, no objects.

A pin holds a block and all before it. Only the pinned block itself counts it; each block counts its
pinned children, so that a pin stops at the first ancestor that was pinned already.
Knows no keys. Not thread-safe: its pool locks.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from memserve.core.block_addr import NO_SLOT
from memserve.mempool.allocator import Slots


class Pins:
    """Of `num_slots` slots, none pinned at first."""

    def __init__(self, num_slots: int) -> None:
        # Arrays for single slots, NumPy's view of the same memory for many: each is slow at the other.
        self._above = array("I", bytes(4 * num_slots))
        self._counts = array("I", bytes(4 * num_slots))
        self._above_of = np.frombuffer(self._above, np.uint32)
        self._counts_of = np.frombuffer(self._counts, np.uint32)

    def link(self, slots: Slots, above: int) -> None:
        """A chain of unpinned blocks after the one in slot `above`, or after none (NO_SLOT)."""
        self._above_of[slots[1:]] = slots[:-1]
        self._above[int(slots[0])] = above

    def relink(self, slot: int, above: int) -> None:
        """The block before that in `slot` is in another slot now."""
        self._above[slot] = above

    def move(self, before: int, after: int) -> None:
        """An unpinned block is in another slot now; the caller relinks those after it."""
        self._above[after] = self._above[before]

    def chain_to(self, slot: int, num_blocks: int) -> list[int]:
        """The slots of that many blocks that end with this one, in order."""
        above, slots = self._above, []
        for _ in range(num_blocks):
            slots.append(slot)
            slot = above[slot]
        slots.reverse()
        return slots

    def pin(self, slot: int) -> int:
        """Hold a block and all before it; returns how many that were not held before."""
        counts, above, newly = self._counts, self._above, 0
        while slot != NO_SLOT:
            counts[slot] += 1
            if counts[slot] > 1:
                break
            newly += 1
            slot = above[slot]
        return newly

    def unpin(self, slot: int) -> list[int]:
        """End one pin; returns the slots that are not held any more, children before their parents."""
        counts, above, freed = self._counts, self._above, []
        while slot != NO_SLOT:
            counts[slot] -= 1
            if counts[slot]:
                break
            freed.append(slot)
            slot = above[slot]
        return freed

    def is_pinned(self, slot: int) -> bool:
        return self._counts[slot] > 0

    def are_pinned(self, slots: Slots) -> npt.NDArray[np.bool_]:
        return self._counts_of[slots] > 0
