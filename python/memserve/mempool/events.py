"""The pool's log of stored and removed blocks, for its publisher.

The log keeps the net effect of all changes until they are taken: a block that was stored and removed in
between is left out, and the log is never larger than the index has been. Taken events get their sequence
numbers, removals first. Knows no sockets. Not thread-safe: its pool locks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from memserve.core.block_addr import Tier
from memserve.core.block_keys import KEY_BYTES, BlockKey
from memserve.core.block_tree import Node
from memserve.core.cache_events import CacheEvent, Removed, Snapshot, Stored

CachedNodes = tuple[Tier, Sequence[Node[int]]]
"""All blocks of a tier, parents first."""


class EventLog:
    """The changes of all tiers since they were last taken, in one sequence."""

    def __init__(self) -> None:
        self._sequence = 0
        self._changes = {tier: _Changes() for tier in reversed(Tier)}
        self._ready: list[CacheEvent] = []

    def __len__(self) -> int:
        """The number of blocks whose change has no sequence number yet."""
        return sum(len(changes.stored) + len(changes.removed) for changes in self._changes.values())

    def stored(self, tier: Tier, nodes: Iterable[Node[int]]) -> None:
        """Log blocks that were added to a tier; parents first."""
        stored, removed = self._changes[tier].stored, self._changes[tier].removed
        if not removed:
            stored.update({node.key: node for node in nodes})
            return
        for node in nodes:
            if node.key in removed:
                del removed[node.key]
            else:
                stored[node.key] = node

    def removed(self, tier: Tier, nodes: Iterable[Node[int]]) -> None:
        """Log blocks that were removed from a tier; children first."""
        stored, removed = self._changes[tier].stored, self._changes[tier].removed
        for node in nodes:
            if node.key in stored:
                del stored[node.key]
            else:
                removed[node.key] = None

    def take(self) -> list[CacheEvent]:
        """The events since the last call; the caller publishes them in order."""
        self._close()
        ready, self._ready = self._ready, []
        return ready

    def sequence(self) -> int:
        """Number all changes so far; returns the last number, which a snapshot made now carries."""
        self._close()
        return self._sequence

    def _close(self) -> None:
        """Turn the net changes into numbered events, far tiers first: a block that is swapped out is stored
        in the far tier before it leaves the near one."""
        for tier, changes in self._changes.items():
            if changes.removed:
                self._ready.append(Removed(self._next(), tier, tuple(changes.removed)))
                changes.removed = {}
            if changes.stored:
                new = chains(_pairs(changes.stored.values()))
                self._ready += [Stored(self._next(), tier, *chain) for chain in new]
                changes.stored = {}

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence


class _Changes:
    """The changes of one tier. `stored`: parents first; `removed`: children first; no key is in both."""

    def __init__(self) -> None:
        self.stored: dict[BlockKey, Node[int]] = {}
        self.removed: dict[BlockKey, None] = {}


def snapshot(sequence: int, cached: Iterable[CachedNodes]) -> Snapshot:
    """The snapshot of all tiers' blocks (parents first) after event `sequence`.

    Any thread: keys and parents of nodes never change.
    """
    stored: list[Stored] = []
    for tier, nodes in cached:
        stored += [Stored(0, tier, *chain) for chain in chains(_pairs(nodes))]
    return Snapshot(sequence, tuple(stored))


class Digest(NamedTuple):
    """Equal for equal sets of blocks, whatever their order; other sets hardly ever have equal digests."""

    num_blocks: int
    xor: str
    """The xor of the first 8 bytes of each key, as 16 hex digits."""


def digest(nodes: Sequence[Node[int]]) -> Digest:
    """The digest of a set of blocks. Any thread: keys never change."""
    keys = np.frombuffer(b"".join([node.key for node in nodes]), ">u8").reshape(-1, KEY_BYTES // 8)
    return Digest(len(nodes), f"{np.bitwise_xor.reduce(keys[:, 0]):016x}")


def _pairs(nodes: Iterable[Node[int]]) -> list[tuple[BlockKey, BlockKey | None]]:
    return [(node.key, None if node.parent is None else node.parent.key) for node in nodes]


def chains(
    pairs: Sequence[tuple[BlockKey, BlockKey | None]],
) -> list[tuple[BlockKey | None, tuple[BlockKey, ...]]]:
    """(key, parent) pairs joined to (parent, keys): runs in which each key is the parent of the next."""
    result = []
    start = 0
    for i in range(1, len(pairs) + 1):
        if i == len(pairs) or pairs[i][1] != pairs[i - 1][0]:
            result.append((pairs[start][1], tuple(key for key, _ in pairs[start:i])))
            start = i
    return result
