"""Keeps the global prompt tree true to what the pools report, and finds out how true it is.

    events ──> applied, or a gap ──> "send a snapshot" ──> its parts ──> the pool's part of the tree anew
    now and then, all is well ──> "send an audit" ──> its parts, compared ──> untrue: "send a snapshot"

Only registered pools are heard: what a stranger, or an earlier life, says is not believed. Loop
thread only. Knows messages and the tree; not how it is used.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from memserve.core.block_keys import KEY_BYTES
from memserve.core.cache_events import Snapshot, Stored
from memserve.core.ids import Epoch, InstanceId, pool_name
from memserve.router.cluster.pools import Pools
from memserve.scheduling.prompt_tree.records import FeedCounters
from memserve.scheduling.prompt_tree.tree import AuditResult, GlobalPromptTree
from memserve.wire.messages import (
    AuditWanted,
    Done,
    Message,
    PoolEvents,
    PoolInfo,
    Role,
    SnapshotPart,
    SnapshotWanted,
    Unknown,
)

logger = logging.getLogger(__name__)

AUDIT_S = 60.0
AUDIT_BYTES_PER_S = 1 << 20
"""Of all pools together: audits of large ones come less often."""
MAX_LAYOUTS = 64
"""Of one memory instance."""
MAX_LAYOUT_CHARS = 128
MAX_SNAPSHOT_BLOCKS = 1 << 22
"""Of one pool. What it says beyond that is left out: it costs misses, and no memory."""


class TreeSynchronizer:
    """The tree, and those whose reports it follows."""

    def __init__(
        self,
        tree: GlobalPromptTree,
        pools: Pools,
        *,
        audit_s: float = AUDIT_S,
        max_snapshot_blocks: int = MAX_SNAPSHOT_BLOCKS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Each pool is audited every `audit_s`, the first time after that, if it is not too large."""
        self._tree = tree
        self._pools = pools
        self._audit_s = audit_s
        self._max_snapshot_blocks = max_snapshot_blocks
        self._clock = clock
        self._version = -1
        self._known: dict[tuple[Epoch, str], _Followed] = {}
        """By epoch and layout: a memory instance has a pool for each, and tells of each."""
        self._memories: dict[Epoch, InstanceId] = {}
        self._no_audit_until_s = 0.0
        self._truth: dict[InstanceId, AuditResult] = {}
        self._counters = FeedCounters()

    def synced_tree(self) -> GlobalPromptTree:
        """The tree, after exactly the registered pools have joined it. Cheap without a change."""
        if self._version != self._pools.version:
            self._version = self._pools.version
            # Of two lives of an instance, the later is meant; the ranks of one life hold the same.
            lives = {info.instance_id: info for info in self._pools.infos() if info.rank == 0}
            self._follow({info.epoch: info for info in lives.values()})
        return self._tree

    def truth(self) -> Mapping[InstanceId, AuditResult]:
        """What the last audit of each instance has found; none of those that have gone, or not had one."""
        return MappingProxyType(self._truth)

    def counters(self) -> FeedCounters:
        """What has happened so far; a copy."""
        return replace(self._counters)

    def events(self, message: PoolEvents) -> Message:
        """Apply what a pool says of its changes."""
        tree, pool = self.synced_tree(), self._find(message)
        if pool is None:
            return Unknown()
        if not pool.heard and not message.events:
            return SnapshotWanted()  # "Nothing new" means nothing to whom knows nothing old.
        if not tree.apply(pool.name, message.epoch, message.events) or pool.is_wrong:
            return SnapshotWanted()
        pool.heard = True
        return AuditWanted() if self._is_audit_due(pool) else Done()

    def part(self, message: SnapshotPart) -> Message:
        """Keep a part of a snapshot; with the last one the pool's part of the tree is replaced.

        A part that comes again is left out.
        """
        tree, pool = self.synced_tree(), self._find(message)
        if pool is None:
            return Unknown()
        if message.is_audit:
            return self._audit(pool, message)
        if message.index == 0:
            pool.arriving = _Parts(message.sequence, self._max_snapshot_blocks)
        if pool.arriving is None or not pool.arriving.take(message):
            return SnapshotWanted()
        snapshot = pool.arriving.snapshot() if message.is_last else None
        if snapshot is not None:
            self._counters.left_out += pool.arriving.left_out
            pool.heard, pool.is_wrong = True, False
            tree.reset(pool.name, message.epoch, snapshot)
        return Done()

    def _is_audit_due(self, pool: _Followed) -> bool:
        """Whether to ask for one; it is asked for then."""
        now_s = self._clock()
        if now_s < max(pool.audit_due_s, self._no_audit_until_s):
            return False
        pool.audit = _Audit()
        pool.audit_due_s = now_s + self._audit_s
        self._counters.audits_asked += 1
        held = self._tree.stats().instances[pool.name]
        self._rest(sum(held))
        return True

    def _audit(self, pool: _Followed, part: SnapshotPart) -> Message:
        """Compare a part, and keep nothing of it. One that nobody has asked for comes to nothing."""
        audit = pool.audit
        if audit is None:
            self._counters.unasked_parts += 1
            return Done()
        if part.index == audit.num_parts - 1:
            return Done()
        truth = self._tree.compare(pool.name, Snapshot(part.sequence, part.chains))
        if truth.behind or part.index != audit.num_parts:
            pool.audit = None
            self._counters.void_audits += 1
            return Done()
        audit.num_parts += 1
        audit.reported += truth.reported
        audit.both += truth.both
        if not part.is_last:
            return Done()
        pool.audit = None
        return self._conclude(pool, AuditResult(truth.held, audit.reported, audit.both, 0))

    def _conclude(self, pool: _Followed, truth: AuditResult) -> Message:
        """The verdict of an audit. If the tree is wrong, a snapshot puts it right."""
        instance = pool.name
        self._rest(truth.reported)
        self._counters.audits += 1
        self._counters.phantoms += truth.phantoms
        self._truth[instance] = truth
        missing = truth.reported - truth.both
        if self._counters.left_out or self._tree.stats().counters.forgotten:
            missing = 0  # The tree lacks some on purpose.
        pool.is_wrong = bool(truth.phantoms or missing)
        if not pool.is_wrong:
            return Done()
        self._counters.untrue_audits += 1
        logger.warning(
            "the prompt tree was wrong instance=%s phantoms=%d missing=%d of=%d",
            instance, truth.phantoms, missing, truth.reported,
        )  # fmt: skip
        return SnapshotWanted()

    def _rest(self, num_blocks: int) -> None:
        """Ask for no audit for as long as one of so many blocks stands for."""
        until_s = self._clock() + num_blocks * KEY_BYTES / AUDIT_BYTES_PER_S
        self._no_audit_until_s = max(self._no_audit_until_s, until_s)

    def _find(self, message: PoolEvents | SnapshotPart) -> _Followed | None:
        """Whose message that is; a memory instance may tell of another layout than before."""
        key = message.epoch, message.layout
        known = self._known.get(key)
        if known is None and message.layout and len(message.layout) <= MAX_LAYOUT_CHARS:
            layouts = [layout for epoch, layout in self._known if epoch == message.epoch]
            instance = self._memories.get(message.epoch)
            if instance is not None and len(layouts) < MAX_LAYOUTS:
                known = self._join(message.epoch, pool_name(instance, message.layout), message.layout)
        return known

    def _join(self, epoch: Epoch, name: InstanceId, layout: str = "") -> _Followed:
        known = self._known[epoch, layout] = _Followed(name, self._clock() + self._audit_s)
        self._tree.join(name, epoch)
        return known

    def _follow(self, members: dict[Epoch, PoolInfo]) -> None:
        """Forget what the gone held; listen to those that have come."""
        for key in [key for key in self._known if key[0] not in members]:
            name = self._known.pop(key).name
            self._tree.leave(name)
            self._truth.pop(name, None)
        memories = (info for info in members.values() if info.role is Role.MEMORY)
        self._memories = {info.epoch: info.instance_id for info in memories}
        for epoch, info in members.items():
            if epoch not in self._memories and (epoch, "") not in self._known:
                self._join(epoch, info.instance_id)


@dataclass(slots=True)
class _Followed:
    """A pool that is heard."""

    name: InstanceId
    """In the tree."""
    audit_due_s: float
    heard: bool = False
    """Whether it has said what it holds."""
    is_wrong: bool = False
    """Whether the tree is, as far as this one is concerned."""
    arriving: _Parts | None = None
    audit: _Audit | None = None
    """None: nobody has asked for one."""


@dataclass(slots=True)
class _Audit:
    """One that was asked for, so far."""

    num_parts: int = 0
    reported: int = 0
    both: int = 0


class _Parts:
    """A snapshot that is arriving."""

    def __init__(self, sequence: int, max_blocks: int) -> None:
        self.left_out = 0
        """Blocks beyond `max_blocks`."""
        self._sequence = sequence
        self._room = max_blocks
        self._chains: list[Stored] = []
        self._num_parts = 0
        self._is_whole = False
        self._is_given = False

    def take(self, part: SnapshotPart) -> bool:
        """Keep the next part; false, changing nothing, if that is not what it is, nor the one before."""
        if part.sequence != self._sequence or part.index not in (self._num_parts - 1, self._num_parts):
            return False
        if part.index < self._num_parts:
            return True
        if self._is_whole:
            return False
        self._num_parts += 1
        self._is_whole = part.is_last
        for chain in part.chains:
            size = max(1, len(chain.keys))  # One of no keys takes memory, too.
            if size > self._room:
                self._room = 0  # What comes after it may hang on it.
                self.left_out += len(chain.keys)
            else:
                self._room -= size
                self._chains.append(chain)
        return True

    def snapshot(self) -> Snapshot | None:
        """All of it, when the last part is here; once."""
        if not self._is_whole or self._is_given:
            return None
        chains, self._chains, self._is_given = tuple(self._chains), [], True
        return Snapshot(self._sequence, chains)
