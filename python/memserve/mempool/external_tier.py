"""A tier that the pool does not own, such as an engine's HBM: the pool is told what it holds.

Its blocks appear in the pool's events and snapshots alone: the pool does not match, lease or evict them.
Knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.block_tree import BlockTree, Node
from memserve.mempool.events import EventLog


class ExternalTier:
    """The keys that the tier holds; prefix-closed. Any thread: takes its pool's lock."""

    def __init__(self, tier: Tier, events: EventLog, lock: AbstractContextManager[object]) -> None:
        self.tier = tier
        self._events = events
        self._lock = lock
        self._tree: BlockTree[int] = BlockTree()

    def __len__(self) -> int:
        return len(self._tree)

    def stored(self, keys: Sequence[BlockKey], parent: BlockKey | None = None) -> int:
        """Record a chain below `parent`, or from the root; returns how many of its blocks are recorded.

        All blocks, or none if the parent is not in the tier: then no prompt could reach them.
        """
        with self._lock:
            try:
                added = self._tree.insert(keys, [0] * len(keys), parent)
            except KeyError:
                return 0
            self._events.stored(self.tier, added)
        return len(keys)

    def removed(self, keys: Sequence[BlockKey]) -> int:
        """Remove blocks, in any order, and their descendants; unknown keys are ignored.

        Returns how many blocks were removed.
        """
        with self._lock:
            tops = (self._tree.get(key) for key in keys)
            return self._drop([top for top in tops if top is not None])

    def clear(self) -> int:
        """Remove all blocks; returns how many."""
        with self._lock:
            return self._drop([node for node in self._tree.nodes() if node.parent is None])

    def nodes(self) -> list[Node[int]]:
        """All blocks, parents first. The caller holds the lock."""
        return self._tree.nodes()

    def _drop(self, tops: Sequence[Node[int]]) -> int:
        before = len(self._tree)
        for top in tops:
            if top.key in self._tree:  # it may have left as a descendant of an earlier one
                self._events.removed(self.tier, self._tree.remove_subtree(top))
        return before - len(self._tree)
