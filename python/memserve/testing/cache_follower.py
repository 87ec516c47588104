"""Follows a pool's cache events into an index of its own, so that tests can compare the two."""

from __future__ import annotations

from memserve.core.block_tree import BlockTree
from memserve.core.cache_events import CacheEvent, Removed, Snapshot, Stored


class CacheFollower:
    """The index of another process, kept up to date by its events. Not thread-safe.

    `tree` holds the tiers of each block as bits, 1 << tier; a block in no tier stays while blocks
    after it are cached (in another tier), so that the tree is prefix-closed.
    """

    def __init__(self) -> None:
        """Of a new pool: nothing is cached, the first event is number 1."""
        self.tree: BlockTree[int] = BlockTree()
        self.sequence = 0
        """Number of the last event applied."""

    def reset(self, snapshot: Snapshot) -> None:
        """Replace the tree by the snapshot."""
        self.tree = BlockTree()
        for chain in snapshot.chains:
            self._store(chain)
        self.sequence = snapshot.sequence

    def apply(self, event: CacheEvent) -> bool:
        """Apply `event`; False, changing nothing, if an event before it is missing: then call `reset`.

        An event applied before is ignored.
        """
        if event.sequence > self.sequence + 1:
            return False
        if event.sequence == self.sequence + 1:
            self.sequence = event.sequence
            if isinstance(event, Stored):
                self._store(event)
            else:
                self._remove(event)
        return True

    def _store(self, event: Stored) -> None:
        self.tree.insert(event.keys, [0] * len(event.keys), event.parent)
        for node in self.tree.match(event.keys):
            node.payload |= 1 << event.tier

    def _remove(self, event: Removed) -> None:
        for key in event.keys:
            node = self.tree.get(key)
            if node is not None:
                node.payload &= ~(1 << event.tier)
            while node is not None and not node.payload and node.is_leaf:
                self.tree.remove(node)
                node = node.parent
