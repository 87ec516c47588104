"""Keeps the global prompt tree true to what the pools report.

    events ──> applied, or a gap ──> "send a snapshot" ──> its parts ──> the pool's part of the tree anew

Only registered pools are heard: what a stranger, or an earlier life, says is not believed. Loop
thread only. Knows messages and the tree; not how it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memserve.core.cache_events import Snapshot, Stored
from memserve.core.ids import Epoch
from memserve.router.pools import Pools
from memserve.router.prompt_tree import ClusterTree
from memserve.wire.messages import Done, Message, PoolEvents, PoolInfo, SnapshotPart, SnapshotWanted, Unknown


@dataclass(slots=True)
class _Parts:
    """A snapshot that is arriving."""

    sequence: int
    chains: list[Stored] = field(default_factory=list)
    num_parts: int = 0


class TreeFeed:
    """The tree, and those whose reports it follows."""

    def __init__(self, tree: ClusterTree, pools: Pools) -> None:
        self._tree = tree
        self._pools = pools
        self._version = -1
        self._known: dict[Epoch, PoolInfo] = {}
        self._arriving: dict[Epoch, _Parts] = {}

    @property
    def tree(self) -> ClusterTree:
        """What the pools hold that are members now."""
        if self._version != self._pools.version:
            self._version = self._pools.version
            self._follow({info.epoch: info for info in self._pools.infos() if info.rank == 0})
        return self._tree

    def events(self, message: PoolEvents) -> Message:
        """Apply what a pool says of its changes."""
        tree, info = self.tree, self._known.get(message.epoch)
        if info is None:
            return Unknown()
        applied = tree.apply(info.instance_id, message.epoch, message.events)
        return Done() if applied else SnapshotWanted()

    def part(self, message: SnapshotPart) -> Message:
        """Keep a part of a snapshot; with the last one the pool's part of the tree is replaced."""
        tree, info = self.tree, self._known.get(message.epoch)
        if info is None:
            return Unknown()
        if message.index == 0:
            self._arriving[message.epoch] = _Parts(message.sequence)
        arriving = self._arriving.get(message.epoch)
        if arriving is None or (arriving.sequence, arriving.num_parts) != (message.sequence, message.index):
            return SnapshotWanted()
        arriving.chains += message.chains
        arriving.num_parts += 1
        if message.is_last:
            del self._arriving[message.epoch]
            snapshot = Snapshot(message.sequence, tuple(arriving.chains))
            tree.reset(info.instance_id, message.epoch, snapshot)
        return Done()

    def _follow(self, members: dict[Epoch, PoolInfo]) -> None:
        """Forget what the gone held; listen to those that have come."""
        for epoch in self._known.keys() - members.keys():
            self._tree.leave(self._known.pop(epoch).instance_id)
            self._arriving.pop(epoch, None)
        for epoch, info in members.items():
            if epoch not in self._known:
                self._known[epoch] = info
                self._tree.join(info.instance_id, epoch)
