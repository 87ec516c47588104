"""What a pool tells others of its index, and how they follow it: exact, with gaps noticed.

    pool      Stored 1, Removed 2, Stored 3, ...              one sequence over all tiers
    follower  Snapshot(sequence=2), then 3, 4, ...            older ones are in the snapshot

Knows no sockets and no slots. Source: SGLang's KV events; the sequence over tiers is ours.
"""

from __future__ import annotations

import msgspec

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.prompt_tree import PromptTree


class Stored(msgspec.Struct, frozen=True, tag=True):
    """A chain of blocks is cached now. keys[0] comes after `parent`, or begins a prompt."""

    sequence: int
    tier: Tier
    parent: BlockKey | None
    keys: tuple[BlockKey, ...]


class Removed(msgspec.Struct, frozen=True, tag=True):
    """Blocks are cached no longer; children before their parents."""

    sequence: int
    tier: Tier
    keys: tuple[BlockKey, ...]


CacheEvent = Stored | Removed


class Snapshot(msgspec.Struct, frozen=True, tag=True):
    """All that is cached after event `sequence`: chains in an order in which each parent comes first."""

    sequence: int
    chains: tuple[Stored, ...]


class Follower:
    """Another process's index, kept up by its events. Its owner locks.

    `tree` holds the tiers of each block as bits, 1 << tier; a block in no tier stays while blocks
    after it are cached (in another tier), so that the tree is prefix-closed.
    """

    def __init__(self) -> None:
        """Of a pool that has just begun: nothing is cached, the first event is number 1."""
        self.tree: PromptTree[int] = PromptTree()
        self.sequence = 0
        """The last event that is in the tree."""

    def reset(self, snapshot: Snapshot) -> None:
        """Forget everything but the snapshot."""
        self.tree = PromptTree()
        for chain in snapshot.chains:
            self._store(chain)
        self.sequence = snapshot.sequence

    def apply(self, event: CacheEvent) -> bool:
        """Bring the tree up to `event`; False, changing nothing, if one before it is missing.

        Then only `reset` helps. An event that is in the tree already is left out.
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
