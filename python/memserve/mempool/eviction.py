"""Which cached block goes first: orderings as pure functions, and the queue that follows one.

The pool offers leaves without a lease, and only those, so that every order takes tails before
heads, and never an ancestor first. Knows no bytes, clocks or locks; time is a count of uses.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Callable
from typing import Literal, NamedTuple


class BlockUse(NamedTuple):
    """What an ordering may look at."""

    last_used: int
    """The tick of the last use of this block, or of any that came after it in a prompt."""
    uses: int
    """How often that happened since it was inserted, insertion included."""
    depth: int
    """Blocks before this one."""


EvictionPolicy = Callable[[BlockUse], float]
"""The block with the lowest value is evicted first. A use never lowers the value of a block."""


def lru(use: BlockUse) -> float:
    """Least recently used first."""
    return use.last_used


def lfu(use: BlockUse) -> float:
    """Least often used first; of equals, the least recently used."""
    return use.uses + 1 - 1 / (1 + use.last_used)


def cost_aware(half_life_ticks: float = 4096, attention_blocks: float = 512) -> EvictionPolicy:
    """Least expected cost of computing the block again first.

    Cost is linear in depth (attention reads all that comes before) and doubles at
    `attention_blocks`; a use counts half after `half_life_ticks`. The value is the logarithm of
    (1 + uses) x cost x 2^((last_used - now) / half_life) without `now`, which all blocks share: so that
    time alone never changes the order.
    """

    def order(use: BlockUse) -> float:
        return (
            math.log2((1 + use.uses) * (1 + use.depth / attention_blocks)) + use.last_used / half_life_ticks
        )

    return order


EvictionName = Literal["lru", "lfu", "cost"]

EVICTION_POLICIES: dict[EvictionName, EvictionPolicy] = {"lru": lru, "lfu": lfu, "cost": cost_aware()}
"""The values of `--eviction-policy`."""


class EvictionQueue:
    """Slots that were offered, lowest value first. Values may have grown since: they are asked again.

    Each slot waits once, however often it is offered. O(log n) each way.
    """

    def __init__(self, num_slots: int) -> None:
        self._heap: list[tuple[float, int, int]] = []
        # An entry counts only with its slot's present ticket; 0: the slot does not wait.
        self._tickets = array("Q", bytes(8 * num_slots))
        self._last_ticket = 0

    def offer(self, slot: int, value: float) -> None:
        """Let `slot` wait, if it does not already."""
        if not self._tickets[slot]:
            self._last_ticket += 1
            self._tickets[slot] = self._last_ticket
            heapq.heappush(self._heap, (value, self._last_ticket, slot))

    def withdraw(self, slot: int) -> None:
        """Let `slot` wait no longer, if it did."""
        if self._tickets[slot]:
            self._tickets[slot] = 0
            self._tidy()

    def take(self, value_of: Callable[[int], float | None]) -> int | None:
        """The slot that goes first, or None if none that waits may go.

        `value_of` gives a slot's value now, or None if it may not go: it is then forgotten.
        """
        while self._heap:
            value, ticket, slot = heapq.heappop(self._heap)
            if self._tickets[slot] != ticket:
                continue
            self._tickets[slot] = 0
            now = value_of(slot)
            if now is None:
                continue
            if now > value and self._heap and now > self._heap[0][0]:
                self.offer(slot, now)
                continue
            return slot
        return None

    def _tidy(self) -> None:
        """Drop withdrawn entries once they are most of the heap and many."""
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._tickets):
            self._heap = [entry for entry in self._heap if self._tickets[entry[2]] == entry[1]]
            heapq.heapify(self._heap)
