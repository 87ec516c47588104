"""A tier that somebody else owns, as it is told: an engine's HBM, beside the pool's own tiers.

Its blocks are in the pool's events and snapshots, and nowhere else: nobody finds, leases or evicts
them here. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.block_tree import BlockTree, Node
from memserve.mempool.events import EventLog


class ExternalTier:
    """Which keys the tier holds; prefix-closed, as any. Any thread: it has its pool's lock."""

    def __init__(self, tier: Tier, events: EventLog, lock: AbstractContextManager[object]) -> None:
        self.tier = tier
        self._events = events
        self._lock = lock
        self._tree: BlockTree[int] = BlockTree()

    def __len__(self) -> int:
        return len(self._tree)

    def stored(self, keys: Sequence[BlockKey], parent: BlockKey | None = None) -> int:
        """A chain is in the tier now, after `parent`, or from the root; returns how many of its blocks count.

        All, or none if what they come after is not in the tier: nobody could reach them.
        """
        with self._lock:
            try:
                added = self._tree.insert(keys, [0] * len(keys), parent)
            except KeyError:
                return 0
            self._events.stored(self.tier, added)
        return len(keys)

    def removed(self, keys: Sequence[BlockKey]) -> int:
        """These have left it, in whatever order they are named, and with them all that come after them.

        Those that it does not have are ignored. Returns how many have left.
        """
        with self._lock:
            tops = (self._tree.get(key) for key in keys)
            return self._drop([top for top in tops if top is not None])

    def clear(self) -> int:
        """Nothing is left in it; returns how many there were."""
        with self._lock:
            return self._drop([node for node in self._tree.nodes() if node.parent is None])

    def nodes(self) -> list[Node[int]]:
        """All of its blocks, parents first. The caller holds the lock."""
        return self._tree.nodes()

    def _drop(self, tops: Sequence[Node[int]]) -> int:
        before = len(self._tree)
        for top in tops:
            if top.key in self._tree:  # One before it may have taken it along.
                self._events.removed(self.tier, self._tree.remove_subtree(top))
        return before - len(self._tree)
