"""The index of a tier, keys -> slots: prefix-closed, with pins, uses and an order of eviction.

A use is recorded at the last block of a chain alone: an evicted block hands its uses on to its parent,
which is thereby as young as its youngest descendant was. The slots of a chain are read from columns, from
the last slot backwards: the nodes of a million blocks would miss the processor's caches.

Knows no states, bytes or addresses. Not thread-safe: its pool locks.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Sequence

import numpy as np
import numpy.typing as npt

from memserve.core.block_addr import NO_SLOT
from memserve.core.block_keys import BlockKey
from memserve.core.block_tree import BlockTree, Node
from memserve.mempool.allocator import Slots
from memserve.mempool.eviction import BlockUse, EvictionPolicy, EvictionQueue
from memserve.mempool.pins import Pins

CachedNode = Node[int]
"""Its payload is the slot."""


class BlockIndex:
    """The cached blocks by key. A slot is in at most one node."""

    def __init__(self, num_slots: int, ordering: EvictionPolicy) -> None:
        self.tree: BlockTree[int] = BlockTree()
        """Read only."""
        self._ordering = ordering
        self._queue = EvictionQueue(num_slots)
        self._nodes: list[CachedNode | None] = [None] * num_slots
        self._pins = Pins(num_slots)
        self._uses = array("Q", bytes(8 * num_slots))
        self._depths = array("I", bytes(4 * num_slots))
        self._last_used = array("Q", bytes(8 * num_slots))
        self._uses_of = np.frombuffer(self._uses, np.uint64)
        self._depths_of = np.frombuffer(self._depths, np.uint32)
        self._last_used_of = np.frombuffer(self._last_used, np.uint64)
        self._num_pinned = 0
        self._dropped: set[int] = set()  # slots of pinned blocks that have left the index
        self._tick = 0

    @property
    def num_evictable(self) -> int:
        """The number of blocks without a pin on them or on a descendant: `evict` can take them all."""
        return len(self.tree) - self._num_pinned

    def locate(self, keys: Sequence[BlockKey], start: int) -> tuple[list[int], CachedNode | None]:
        """The slots of keys[start:] up to the first key that is not cached, and the last node."""
        depth = self.tree.depth(keys)
        last = self.tree.get(keys[depth - 1]) if depth > start else None
        return ([], None) if last is None else (self._pins.chain_to(last.payload, depth - start), last)

    def insert(self, keys: Sequence[BlockKey], slots: Slots, parent: BlockKey | None) -> list[CachedNode]:
        """Add the missing blocks of a chain below `parent`, and use it; returns new nodes, parents first.

        Raises KeyError, changing nothing, if the parent of the first missing block is missing, too.
        """
        added = self.tree.insert(keys, slots.tolist(), parent)
        self._tick += 1
        if added:
            new = slots[len(slots) - len(added) :]
            above = added[0].parent
            depth = 0 if above is None else self._depths[above.payload] + 1
            self._pins.link(new, NO_SLOT if above is None else above.payload)
            self._uses_of[new] = 0
            self._last_used_of[new] = self._tick
            self._depths_of[new] = np.arange(depth, depth + len(new))
            nodes = self._nodes
            for node in added:
                nodes[node.payload] = node
        if keys:
            last = added[-1] if added else self.tree.get(keys[-1])
            assert last is not None
            self._use(last)
            self._offer(last)
        return added

    def pin(self, node: CachedNode) -> None:
        """Keep a node and its ancestors until a matching `unpin`. Counts as a use."""
        self._tick += 1
        self._use(node)
        self._num_pinned += self._pins.pin(node.payload)

    def unpin(self, node: CachedNode) -> list[int]:
        """End one pin. Returns the slots of dropped blocks that have no pin any more."""
        released = []
        for slot in self._pins.unpin(node.payload):
            if self._dropped and slot in self._dropped:
                self._dropped.remove(slot)
                released.append(slot)
            else:
                self._num_pinned -= 1
                above = self._nodes[slot]
                if above is not None and above.is_leaf:
                    self._offer(above)
        return released

    def evict(self, num_blocks: int) -> list[CachedNode]:
        """Remove up to `num_blocks` blocks, in the order of eviction."""
        chosen = self._choose(num_blocks)
        self.remove(chosen)
        return chosen

    def remove(self, nodes: Sequence[CachedNode]) -> None:
        """Remove unpinned blocks; each block comes after its descendants in `nodes`."""
        for node in nodes:
            self._remove(node)
        for node in nodes:
            if node.parent is not None:
                self._offer(node.parent)

    def at(self, slot: int) -> CachedNode | None:
        """The block in a slot; None if the slot is not in the index."""
        return self._nodes[slot]

    def is_pinned(self, node: CachedNode) -> bool:
        """Whether a block or a descendant of it is pinned."""
        return self._pins.is_pinned(node.payload)

    def are_pinned(self, slots: Slots) -> npt.NDArray[np.bool_]:
        """As `is_pinned`, for the blocks in these slots."""
        return self._pins.are_pinned(slots)

    def relocate(self, before: int, after: int) -> None:
        """Move an unpinned block to another slot; nothing else changes."""
        node = self._nodes[before]
        assert node is not None
        self._queue.withdraw(before)
        for column in (self._uses, self._depths, self._last_used):
            column[after] = column[before]
        self._pins.move(before, after)
        for child in node.children():
            self._pins.relink(child.payload, after)
        self._nodes[after], self._nodes[before] = node, None
        node.payload = after
        self._offer(node)

    def drop(self, top: CachedNode) -> tuple[list[CachedNode], list[CachedNode]]:
        """Remove a block and its descendants, pinned or not.

        Returns (free, held), children first: the slots of `held` come back from later `unpin` calls.
        """
        free, held = [], []
        parent = top.parent
        for node in self.tree.remove_subtree(top):
            slot = node.payload
            self._nodes[slot] = None
            self._queue.withdraw(slot)
            if self._pins.is_pinned(slot):
                self._num_pinned -= 1
                self._dropped.add(slot)
                held.append(node)
            else:
                free.append(node)
        if parent is not None:
            self._offer(parent)
        return free, held

    def last_use(self, node: CachedNode) -> int:
        """The tick of the last use of this block; 0 if never used. Wrong once the node has left its slot."""
        return self._last_used[node.payload] if self._uses[node.payload] else 0

    def roots(self) -> list[CachedNode]:
        """The first blocks of prompts."""
        return [node for node in self.tree if node.parent is None]

    def _use(self, node: CachedNode) -> None:
        self._uses[node.payload] += 1
        self._last_used[node.payload] = self._tick

    def _choose(self, num_blocks: int) -> list[CachedNode]:
        """Take the next blocks to evict out of the queue; each hands its uses on."""
        chosen: dict[CachedNode, None] = {}

        def value(slot: int) -> float | None:
            return self._value(slot, chosen)

        while len(chosen) < num_blocks:
            slot = self._queue.take(value)
            if slot is None:
                break
            node = self._nodes[slot]
            assert node is not None
            chosen[node] = None
            if node.parent is not None:
                self._hand_on(node)
                self._offer(node.parent, chosen)
        return list(chosen)

    def _offer(self, node: CachedNode, leaving: Container[CachedNode] = ()) -> None:
        value = self._value(node.payload, leaving)
        if value is not None:
            self._queue.offer(node.payload, value)

    def _value(self, slot: int, leaving: Container[CachedNode] = ()) -> float | None:
        """The eviction policy's value of a slot; None if its block cannot be evicted after `leaving`."""
        node = self._nodes[slot]
        if node is None or self._pins.is_pinned(slot) or not node.is_leaf_without(leaving):
            return None
        return self._ordering(BlockUse(self._last_used[slot], self._uses[slot], self._depths[slot]))

    def _hand_on(self, node: CachedNode) -> None:
        """Add the uses of an evicted block to its parent; the caller offers the parent."""
        if node.parent is not None:
            slot, above = node.payload, node.parent.payload
            self._uses[above] += self._uses[slot]
            self._uses[slot] = 0
            self._last_used[above] = max(self._last_used[above], self._last_used[slot])

    def _remove(self, node: CachedNode) -> None:
        self._queue.withdraw(node.payload)
        self.tree.remove(node)
        self._nodes[node.payload] = None
