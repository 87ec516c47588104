"""The pool's own record of what it stored and removed, for those who follow it.

Changes are kept as their net effect until somebody takes them: a block that came and went in
between is not mentioned, and the record is never larger than the index has been. Taken events get
their sequence numbers, removals first. Knows no sockets. Not thread-safe: its pool locks.
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
    """The changes of all tiers' indexes since they were last taken, under one sequence."""

    def __init__(self) -> None:
        self._sequence = 0
        self._changes = {tier: _Changes() for tier in reversed(Tier)}
        self._ready: list[CacheEvent] = []

    def __len__(self) -> int:
        """Blocks whose change has no number yet."""
        return sum(len(changes.stored) + len(changes.removed) for changes in self._changes.values())

    def stored(self, tier: Tier, nodes: Iterable[Node[int]]) -> None:
        """These are in the tier's index now; parents first."""
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
        """These have left it; children first."""
        stored, removed = self._changes[tier].stored, self._changes[tier].removed
        for node in nodes:
            if node.key in stored:
                del stored[node.key]
            else:
                removed[node.key] = None

    def take(self) -> list[CacheEvent]:
        """The events since the last call; the caller sends them to every follower, in order."""
        self._close()
        ready, self._ready = self._ready, []
        return ready

    def sequence(self) -> int:
        """The number of the last event, all changes so far included: what a snapshot made now carries."""
        self._close()
        return self._sequence

    def _close(self) -> None:
        """Turn the net changes into numbered events: far tiers first, as a block that is swapped out
        is stored there before it leaves here."""
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
    """Of one tier. Parents first in `stored`, children first in `removed`; no key is in both."""

    def __init__(self) -> None:
        self.stored: dict[BlockKey, Node[int]] = {}
        self.removed: dict[BlockKey, None] = {}


def snapshot(sequence: int, cached: Iterable[CachedNodes]) -> Snapshot:
    """All that each tier has (parents first) as of event `sequence`.

    Any thread: keys and parents of nodes never change.
    """
    stored: list[Stored] = []
    for tier, nodes in cached:
        stored += [Stored(0, tier, *chain) for chain in chains(_pairs(nodes))]
    return Snapshot(sequence, tuple(stored))


class Digest(NamedTuple):
    """Equal for equal sets of blocks, in whatever order, and hardly ever for others."""

    num_blocks: int
    xor: str
    """Of the first 8 bytes of each key, as 16 hex digits."""


def digest(nodes: Sequence[Node[int]]) -> Digest:
    """Any thread, as keys never change."""
    keys = np.frombuffer(b"".join([node.key for node in nodes]), ">u8").reshape(-1, KEY_BYTES // 8)
    return Digest(len(nodes), f"{np.bitwise_xor.reduce(keys[:, 0]):016x}")


def _pairs(nodes: Iterable[Node[int]]) -> list[tuple[BlockKey, BlockKey | None]]:
    return [(node.key, None if node.parent is None else node.parent.key) for node in nodes]


def chains(
    pairs: Sequence[tuple[BlockKey, BlockKey | None]],
) -> list[tuple[BlockKey | None, tuple[BlockKey, ...]]]:
    """(key, parent) pairs as (parent, keys): neighbours where each comes after the one before it."""
    result = []
    start = 0
    for i in range(1, len(pairs) + 1):
        if i == len(pairs) or pairs[i][1] != pairs[i - 1][0]:
            result.append((pairs[start][1], tuple(key for key, _ in pairs[start:i])))
            start = i
    return result
