"""The parents of cached blocks and their pin counts by slot, in columns instead of objects.

A pin holds a block and its ancestors. Only the pinned block counts the pin; each block counts its pinned
children, so that a pin stops at the first ancestor that was pinned already.
Knows no keys. Not thread-safe: its pool locks.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from memserve.core.block_addr import NO_SLOT
from memserve.mempool.allocator import Slots


class Pins:
    """The pins of `num_slots` slots; no slot is pinned at first."""

    def __init__(self, num_slots: int) -> None:
        # Arrays serve single slots, NumPy views of the same memory many slots: each is slow at the other.
        self._above = array("I", bytes(4 * num_slots))
        self._counts = array("I", bytes(4 * num_slots))
        self._above_of = np.frombuffer(self._above, np.uint32)
        self._counts_of = np.frombuffer(self._counts, np.uint32)

    def link(self, slots: Slots, above: int) -> None:
        """Record a chain of unpinned blocks below slot `above`, or a root chain (NO_SLOT)."""
        self._above_of[slots[1:]] = slots[:-1]
        self._above[int(slots[0])] = above

    def relink(self, slot: int, above: int) -> None:
        """The parent of the block in `slot` has moved to slot `above`."""
        self._above[slot] = above

    def move(self, before: int, after: int) -> None:
        """Move an unpinned block; the caller relinks its children."""
        self._above[after] = self._above[before]

    def chain_to(self, slot: int, num_blocks: int) -> list[int]:
        """The slots of the chain of `num_blocks` blocks that ends in `slot`, in order."""
        above, slots = self._above, []
        for _ in range(num_blocks):
            slots.append(slot)
            slot = above[slot]
        slots.reverse()
        return slots

    def pin(self, slot: int) -> int:
        """Pin a block and its ancestors; returns how many of them had no pin before."""
        counts, above, newly = self._counts, self._above, 0
        while slot != NO_SLOT:
            counts[slot] += 1
            if counts[slot] > 1:
                break
            newly += 1
            slot = above[slot]
        return newly

    def unpin(self, slot: int) -> list[int]:
        """End one pin; returns the slots that have no pin any more, children before their parents."""
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
