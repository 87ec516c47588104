"""Who owns each slot of an arena: one state per slot, and that array is the authority.

    FREE -> PRIVATE -> CACHED -> FREE            alloc, insert, evict
    FREE -> RESERVED -> PRIVATE                  reserve, commit: then as above
    PRIVATE | RESERVED -> FREE                   free, cancel
    CACHED | RESERVED -> QUARANTINED -> FREE     somebody may still read, or still write

Knows no keys and no bytes. Not thread-safe: its pool locks.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from memserve.core.errors import BlockStateError, InvariantViolated


class SlotState(IntEnum):
    """What may happen to a slot's bytes."""

    FREE = 0
    PRIVATE = 1
    """A caller's alone: it may write, and has to publish or free it."""
    CACHED = 2
    """In the index: nobody writes, lease holders read."""
    RESERVED = 3
    """Promised to a writer elsewhere."""
    QUARANTINED = 4
    """Out of the index or past its reservation, but somebody may still touch the bytes."""


FREE, PRIVATE, CACHED, RESERVED, QUARANTINED = SlotState


class Allocator:
    """`num_slots` slots, all FREE at first."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._states = bytearray(num_slots)
        self._free = list(range(num_slots - 1, -1, -1))
        self._counts = [num_slots, 0, 0, 0, 0]

    def count(self, state: SlotState) -> int:
        return self._counts[state]

    def state(self, slot: int) -> SlotState:
        return SlotState(self._states[slot])

    def take(self, num_blocks: int, state: SlotState) -> list[int]:
        """Turn that many FREE slots into PRIVATE or RESERVED ones. The pool saw to it that there are."""
        start = len(self._free) - num_blocks
        if start < 0 or num_blocks < 0:
            raise InvariantViolated(f"{num_blocks} slots taken of {len(self._free)} free ones")
        slots = self._free[start:]
        del self._free[start:]
        states, value = self._states, int(state)  # a plain int: an enum's member is slow to store
        for slot in slots:
            states[slot] = value
        self._counts[FREE] -= num_blocks
        self._counts[state] += num_blocks
        return slots

    def move(self, slots: Sequence[int], before: SlotState, after: SlotState) -> None:
        """Change the state of all `slots`. All or nothing.

        Raises BlockStateError, changing nothing, if one is not `before`, not here, or named twice.
        """
        self.require(slots, before)
        states, value = self._states, int(after)
        for slot in slots:
            states[slot] = value
        self._counts[before] -= len(slots)
        self._counts[after] += len(slots)
        if after == FREE:
            self._free.extend(slots)

    def require(self, slots: Sequence[int], state: SlotState) -> None:
        """Raises BlockStateError if one of `slots` is not in that state, not here, or named twice."""
        if not slots:
            return
        if min(slots) < 0 or max(slots) >= self.num_slots:
            raise BlockStateError("a block of another pool")
        if set(map(self._states.__getitem__, slots)) != {int(state)}:
            found = {SlotState(self._states[slot]).name for slot in slots} - {state.name}
            raise BlockStateError(f"a block is {' or '.join(sorted(found))}, not {state.name}")
        if len(set(slots)) != len(slots):
            raise BlockStateError("a block is named twice")
