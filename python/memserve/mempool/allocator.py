"""The owner of each slot of an arena, as one state per slot; the array of states is the authority.

    FREE -> PRIVATE -> CACHED -> FREE            alloc, insert, evict
    FREE -> RESERVED -> PRIVATE                  reserve, commit: then as above
    PRIVATE | RESERVED -> FREE                   free, cancel
    CACHED | RESERVED -> QUARANTINED -> FREE     a reader or writer may still access it
    FREE <-> RETIRED                             set_limit: the slot has no memory, or loses it soon

Knows no keys and no bytes. Not thread-safe: its pool locks.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from memserve.core.errors import BlockStateError, InvariantViolated

Slots = npt.NDArray[np.int64]
"""Slots of one arena, in a caller's order: batches are arrays, never a Python object per block."""


class SlotState(IntEnum):
    """The state of a slot: which accesses to its bytes are allowed."""

    FREE = 0
    PRIVATE = 1
    """Owned by one caller, which may write to it, and has to publish or free it."""
    CACHED = 2
    """In the index: never written, read by lease holders."""
    RESERVED = 3
    """Promised to a remote writer."""
    QUARANTINED = 4
    """Out of the index or past its reservation, but a reader or writer may still access the bytes."""
    RETIRED = 5
    """Beyond the current size of the arena, which is the sum of the other states."""


FREE, PRIVATE, CACHED, RESERVED, QUARANTINED, RETIRED = SlotState


class Allocator:
    """`max_slots` slots; initially the first `num_slots` are FREE and the others RETIRED."""

    def __init__(self, num_slots: int, max_slots: int) -> None:
        self.max_slots = max_slots
        self._states = np.full(max_slots, FREE, np.uint8)
        self._free = np.empty(max_slots, np.uint32)  # a stack: the first count(FREE) entries
        self._counts = [max_slots, 0, 0, 0, 0, 0]
        self.set_limit(num_slots)

    def set_limit(self, num_slots: int) -> None:
        """Retire the slots from `num_slots` on, and make the retired ones before it FREE.

        A slot that is not FREE retires when it is freed. O(max_slots), a nanosecond each.
        """
        states = self._states
        self.limit = num_slots
        states[:num_slots][states[:num_slots] == RETIRED] = FREE
        states[num_slots:][states[num_slots:] == FREE] = RETIRED
        free = np.flatnonzero(states == FREE)
        self._free[: len(free)] = free[::-1]
        self._counts[FREE] = len(free)
        self._counts[RETIRED] = int((states == RETIRED).sum())

    @property
    def is_draining(self) -> bool:
        """Whether a slot beyond the limit is not RETIRED yet."""
        return self._counts[RETIRED] < self.max_slots - self.limit

    def used_from(self, first: int, state: SlotState) -> Slots:
        """The slots from `first` on that are in `state`, in order."""
        return np.flatnonzero(self._states[first:] == state) + first

    @property
    def end(self) -> int:
        """One past the last slot that is neither FREE nor RETIRED: the least size of the arena now."""
        used = np.flatnonzero((self._states != FREE) & (self._states != RETIRED))
        return int(used[-1]) + 1 if len(used) else 0

    def count(self, state: SlotState) -> int:
        return self._counts[state]

    def state(self, slot: int) -> SlotState:
        return SlotState(self._states[slot])

    def take(self, num_blocks: int, state: SlotState) -> Slots:
        """Turn `num_blocks` FREE slots into PRIVATE or RESERVED ones. The pool has checked their number.

        Slots that were freed together are taken together, in the same order: neighbours stay neighbours.
        """
        top = self._counts[FREE]
        if not 0 <= num_blocks <= top:
            raise InvariantViolated(f"{num_blocks} slots taken of {top} free ones")
        slots = self._free[top - num_blocks : top][::-1].astype(np.int64)
        self._states[slots] = state
        self._counts[FREE] -= num_blocks
        self._counts[state] += num_blocks
        return slots

    def move(self, slots: Slots, before: SlotState, after: SlotState) -> None:
        """Change the state of all `slots`. All or nothing.

        Raises BlockStateError, changing nothing, if a slot is not `before`, foreign, or named twice.
        """
        self.require(slots, before)
        self.change(slots, before, after)

    def change(self, slots: Slots, before: SlotState, after: SlotState) -> None:
        """As `move`, for a caller that has checked that all slots are `before`."""
        self._states[slots] = after
        self._counts[before] -= len(slots)
        self._counts[after] += len(slots)
        if after == FREE:
            if self.limit < self.max_slots and (slots >= self.limit).any():
                slots = self._retire(slots)
            top = self._counts[FREE]
            self._free[top - len(slots) : top] = slots[::-1]

    def _retire(self, slots: Slots) -> Slots:
        """Retire the slots beyond the limit among newly FREE `slots`; returns the others."""
        beyond = slots >= self.limit
        self._states[slots[beyond]] = RETIRED
        self._counts[FREE] -= int(beyond.sum())
        self._counts[RETIRED] += int(beyond.sum())
        return slots[~beyond]

    def require(self, slots: Slots, state: SlotState) -> None:
        """Raises BlockStateError if one of `slots` is not in `state`, not in this arena, or named twice."""
        if not len(slots):
            return
        ordered = np.sort(slots)
        if ordered[0] < 0 or ordered[-1] >= self.max_slots:
            raise BlockStateError("a block of another pool")
        states = self._states[slots]
        if (states != state).any():
            wrong = SlotState(states[states != state][0])
            raise BlockStateError(f"a block is {wrong.name}, not {state.name}")
        if (ordered[1:] == ordered[:-1]).any():
            raise BlockStateError("a block is named twice")
