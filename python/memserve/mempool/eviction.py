"""Which cached block is evicted first: policies as pure functions, and the queue ordered by one of them.

The pool offers only unleased leaves, so that every policy evicts tails before heads, and never an ancestor
first. Knows no bytes, clocks or locks; time is a count of uses.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Callable
from typing import Literal, NamedTuple


class BlockUse(NamedTuple):
    """What an eviction policy may depend on."""

    last_used: int
    """The tick of the last use of this block or of a block that came after it in a prompt."""
    uses: int
    """Number of such uses since the block was inserted, insertion included."""
    depth: int
    """Blocks before this one."""


EvictionPolicy = Callable[[BlockUse], float]
"""The block with the lowest value is evicted first. A use never lowers the value of a block."""


def lru(use: BlockUse) -> float:
    """Least recently used first."""
    return use.last_used


def lfu(use: BlockUse) -> float:
    """Least often used first; among equals, the least recently used."""
    return use.uses + 1 - 1 / (1 + use.last_used)


def cost_aware(half_life_ticks: float = 4096, attention_blocks: float = 512) -> EvictionPolicy:
    """Lowest expected cost of computing the block again first.

    The cost is linear in depth (attention reads all tokens before) and doubles at `attention_blocks`; a use
    counts half after `half_life_ticks`. The value is the logarithm of
    (1 + uses) x cost x 2^((last_used - now) / half_life) without `now`, which all blocks share: time alone
    never changes the order.
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
    """Offered slots, lowest value first. A value may have grown since the offer: `take` asks again.

    A slot is in the queue at most once, however often it is offered. O(log n) each way.
    """

    def __init__(self, num_slots: int) -> None:
        self._heap: list[tuple[float, int, int]] = []
        # An entry is valid only with its slot's current ticket; 0: the slot is not in the queue.
        self._tickets = array("Q", bytes(8 * num_slots))
        self._last_ticket = 0

    def offer(self, slot: int, value: float) -> None:
        """Add `slot`, if it is not in the queue."""
        if not self._tickets[slot]:
            self._last_ticket += 1
            self._tickets[slot] = self._last_ticket
            heapq.heappush(self._heap, (value, self._last_ticket, slot))

    def withdraw(self, slot: int) -> None:
        """Remove `slot`, if it is in the queue."""
        if self._tickets[slot]:
            self._tickets[slot] = 0
            self._compact()

    def take(self, value_of: Callable[[int], float | None]) -> int | None:
        """Remove and return the first slot that may be evicted; None if there is none.

        `value_of` gives a slot's current value, or None if it may not be evicted: it leaves the queue then.
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

    def _compact(self) -> None:
        """Drop withdrawn entries once they are many and most of the heap."""
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._tickets):
            self._heap = [entry for entry in self._heap if self._tickets[entry[2]] == entry[1]]
            heapq.heapify(self._heap)
