"""Which keys are cached in which slots: prefix-closed, with pins, uses and an order of eviction.

A pin holds a block and all before it. Only the pinned block itself counts the lease; each block
counts its pinned children, so that `num_evictable` is a subtraction and a pin stops at the first
ancestor that was pinned already. A use is noted at the last block of the chain alone: what is
evicted hands its uses on to its parent, which is thereby as young as its youngest descendant was.

Knows no states, bytes or addresses. Not thread-safe: its pool locks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from memserve.core.block_keys import BlockKey
from memserve.core.prompt_tree import Node, PromptTree
from memserve.mempool.eviction import BlockUse, EvictionQueue, Ordering

CachedNode = Node[int]
"""Its payload is the slot."""


class BlockIndex:
    """keys -> slots. A slot is in at most one node."""

    def __init__(self, num_slots: int, ordering: Ordering) -> None:
        self.tree: PromptTree[int] = PromptTree()
        """For reading."""
        self._ordering = ordering
        self._queue = EvictionQueue(num_slots)
        self._nodes: list[CachedNode | None] = [None] * num_slots
        self._pins = array("I", bytes(4 * num_slots))
        self._uses = array("Q", bytes(8 * num_slots))
        self._depths = array("I", bytes(4 * num_slots))
        self._last_used = array("Q", bytes(8 * num_slots))
        self._num_pinned = 0
        self._dropped: set[CachedNode] = set()
        self._tick = 0

    @property
    def num_evictable(self) -> int:
        """Blocks that `evict` could take, given time: neither leased nor before a leased one."""
        return len(self.tree) - self._num_pinned

    def insert(
        self, keys: Sequence[BlockKey], slots: Sequence[int], parent: BlockKey | None
    ) -> list[CachedNode]:
        """Add what is missing below `parent`, and use the chain; returns the new nodes, parents first.

        Raises KeyError, changing nothing, if something is missing and its parent is too.
        """
        added = self.tree.insert(keys, slots, parent)
        self._tick += 1
        if added:
            above = added[0].parent
            depth = 0 if above is None else self._depths[above.payload] + 1
            for node in added:
                slot = node.payload
                self._nodes[slot] = node
                self._pins[slot] = self._uses[slot] = 0
                self._depths[slot] = depth
                self._last_used[slot] = self._tick
                depth += 1
        if keys:
            last = self.tree.get(keys[-1])
            assert last is not None
            self._use(last)
            self._offer(last)
        return added

    def pin(self, node: CachedNode) -> None:
        """Keep a node of the tree, and all before it, until as many `unpin`. Counts as a use."""
        self._tick += 1
        self._use(node)
        pins = self._pins
        above: CachedNode | None = node
        while above is not None:
            slot = above.payload
            pins[slot] += 1
            if pins[slot] > 1:
                break
            self._num_pinned += 1
            above = above.parent

    def unpin(self, node: CachedNode) -> list[int]:
        """End one pin. Returns slots of dropped blocks that nobody holds any more."""
        pins = self._pins
        released = []
        above: CachedNode | None = node
        while above is not None:
            slot = above.payload
            pins[slot] -= 1
            if pins[slot]:
                break
            if self._dropped and above in self._dropped:
                self._dropped.remove(above)
                released.append(slot)
            else:
                self._num_pinned -= 1
                self._offer(above)
            above = above.parent
        return released

    def evict(self, num_blocks: int) -> list[CachedNode]:
        """Take out that many blocks, in the order of eviction; fewer if there are not that many."""
        taken: list[CachedNode] = []
        while len(taken) < num_blocks:
            slot = self._queue.take(self._value)
            if slot is None:
                break
            node = self._nodes[slot]
            assert node is not None
            self._remove_leaf(node)
            if node.parent is not None:
                self._offer(node.parent)
            taken.append(node)
        return taken

    def delete(self, keys: Sequence[BlockKey]) -> list[CachedNode]:
        """Take out the end of a chain, up to the first block that is leased or has others after it."""
        taken = []
        for node in reversed(self.tree.match(keys)):
            if not node.is_leaf or self._pins[node.payload]:
                break
            self._queue.withdraw(node.payload)
            self._remove_leaf(node)
            taken.append(node)
        if taken and taken[-1].parent is not None:
            self._offer(taken[-1].parent)
        return taken

    def drop(self, top: CachedNode) -> tuple[list[CachedNode], list[CachedNode]]:
        """Take out a block and all that come after it, leased or not: they are not to be found again.

        Returns (free, held), children first: of `held`, `unpin` gives the slots back one day.
        """
        free, held = [], []
        parent = top.parent
        for node in self.tree.remove_subtree(top):
            slot = node.payload
            self._nodes[slot] = None
            self._queue.withdraw(slot)
            if self._pins[slot]:
                self._num_pinned -= 1
                self._dropped.add(node)
                held.append(node)
            else:
                free.append(node)
        if parent is not None:
            self._offer(parent)
        return free, held

    def roots(self) -> list[CachedNode]:
        """Blocks that begin a prompt."""
        return [node for node in self.tree if node.parent is None]

    def _use(self, node: CachedNode) -> None:
        self._uses[node.payload] += 1
        self._last_used[node.payload] = self._tick

    def _offer(self, node: CachedNode) -> None:
        value = self._value(node.payload)
        if value is not None:
            self._queue.offer(node.payload, value)

    def _value(self, slot: int) -> float | None:
        """The ordering's word on a slot; None if its block may not be evicted now."""
        node = self._nodes[slot]
        if node is None or self._pins[slot] or not node.is_leaf:
            return None
        return self._ordering(BlockUse(self._last_used[slot], self._uses[slot], self._depths[slot]))

    def _remove_leaf(self, node: CachedNode) -> None:
        """Its uses become its parent's, which the caller offers."""
        slot = node.payload
        self.tree.remove(node)
        self._nodes[slot] = None
        if node.parent is not None:
            above = node.parent.payload
            self._uses[above] += self._uses[slot]
            self._last_used[above] = max(self._last_used[above], self._last_used[slot])
