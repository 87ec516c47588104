"""The pool's own record of what it stored and removed, for those who follow it.

Changes are kept as their net effect until somebody takes them: a block that came and went in
between is not mentioned, and the record is never larger than the index has been. Taken events get
their sequence numbers, removals first. Knows no sockets. Not thread-safe: its pool locks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.cache_events import CacheEvent, Removed, Snapshot, Stored
from memserve.core.prompt_tree import Node


class EventLog:
    """The changes of one tier's index since they were last taken."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._sequence = 0
        # Parents first in `_stored`, children first in `_removed`; no key is in both.
        self._stored: dict[BlockKey, BlockKey | None] = {}
        self._removed: dict[BlockKey, None] = {}
        self._ready: list[CacheEvent] = []

    def stored(self, nodes: Iterable[Node[int]]) -> None:
        """These are in the index now; parents first."""
        for node in nodes:
            if node.key in self._removed:
                del self._removed[node.key]
            else:
                self._stored[node.key] = None if node.parent is None else node.parent.key

    def removed(self, nodes: Iterable[Node[int]]) -> None:
        """These have left it; children first."""
        for node in nodes:
            if node.key in self._stored:
                del self._stored[node.key]
            else:
                self._removed[node.key] = None

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
        """Turn the net changes into numbered events."""
        if self._removed:
            self._ready.append(Removed(self._next(), self._tier, tuple(self._removed)))
            self._removed = {}
        if self._stored:
            pairs = list(self._stored.items())
            self._ready += [Stored(self._next(), self._tier, *chain) for chain in chains(pairs)]
            self._stored = {}

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence


def snapshot(sequence: int, tier: Tier, nodes: Sequence[Node[int]]) -> Snapshot:
    """All of `nodes` (parents first) as of event `sequence`. Any thread: keys and parents never change."""
    pairs = [(node.key, None if node.parent is None else node.parent.key) for node in nodes]
    return Snapshot(sequence, tuple(Stored(0, tier, *chain) for chain in chains(pairs)))


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
