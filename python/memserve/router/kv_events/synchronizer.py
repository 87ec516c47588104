"""Keeps the global prompt tree in step with the reports of the pools, and audits it.

    events ──> applied, or a gap ──> SnapshotWanted ──> its parts ──> the pool's blocks are replaced
    events applied, audit due ──> AuditWanted ──> its parts, compared ──> differences: SnapshotWanted

Only registered pools are heard: messages of unknown epochs are rejected. Event loop thread only. Knows
messages and the tree, not the users of the tree.
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
from memserve.scheduling.prompt_tree.records import SyncCounters
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

MAX_LAYOUTS = 64
"""Layouts of one memory instance."""
MAX_LAYOUT_CHARS = 128


class TreeSynchronizer:
    """The tree and the pools that report to it."""

    def __init__(
        self,
        tree: GlobalPromptTree,
        pools: Pools,
        *,
        audit_s: float = 60.0,
        max_snapshot_blocks: int = 1 << 22,
        audit_bytes_per_s: int = 1 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Each pool is audited every `audit_s`, the first time after `audit_s`; large pools less often.

        `audit_bytes_per_s`: keys audited per second, over all pools. `max_snapshot_blocks`: of one pool;
        further blocks are left out, which costs misses instead of memory.
        """
        self._tree = tree
        self._pools = pools
        self._audit_s = audit_s
        self._audit_bytes_per_s = audit_bytes_per_s
        self._max_snapshot_blocks = max_snapshot_blocks
        self._clock = clock
        self._version = -1
        self._known: dict[tuple[Epoch, str], _PoolState] = {}
        """By epoch and layout: a memory instance has one pool for each layout, and reports each."""
        self._memories: dict[Epoch, InstanceId] = {}
        self._no_audit_until_s = 0.0
        self._audit_results: dict[InstanceId, AuditResult] = {}
        self._counters = SyncCounters()

    def synced_tree(self) -> GlobalPromptTree:
        """The tree, after exactly the registered pools have joined it. Cheap without a change."""
        if self._version != self._pools.version:
            self._version = self._pools.version
            # The latest epoch of an instance counts; all ranks of an epoch hold the same blocks.
            lives = {info.instance_id: info for info in self._pools.infos() if info.rank == 0}
            self._update_members({info.epoch: info for info in lives.values()})
        return self._tree

    def audit_results(self) -> Mapping[InstanceId, AuditResult]:
        """The result of the last audit of each present instance that has had one."""
        return MappingProxyType(self._audit_results)

    def counters(self) -> SyncCounters:
        """A copy of the counters."""
        return replace(self._counters)

    def events(self, message: PoolEvents) -> Message:
        """Apply the events of a pool, and answer it."""
        tree, pool = self.synced_tree(), self._find(message)
        if pool is None:
            return Unknown()
        if not pool.heard and not message.events:
            return SnapshotWanted()  # an empty update cannot confirm a state we never received
        if not tree.apply(pool.name, message.epoch, message.events) or pool.is_wrong:
            return SnapshotWanted()
        pool.heard = True
        return AuditWanted() if self._is_audit_due(pool) else Done()

    def part(self, message: SnapshotPart) -> Message:
        """Keep a part of a snapshot, or compare a part of an audit; answers the pool.

        The last part of a snapshot replaces the pool's blocks in the tree. A repeated part is ignored.
        """
        tree, pool = self.synced_tree(), self._find(message)
        if pool is None:
            return Unknown()
        if message.is_audit:
            return self._audit(pool, message)
        if message.index == 0:
            pool.arriving = _SnapshotParts(message.sequence, self._max_snapshot_blocks)
        if pool.arriving is None or not pool.arriving.take(message):
            return SnapshotWanted()
        snapshot = pool.arriving.snapshot() if message.is_last else None
        if snapshot is not None:
            self._counters.left_out += pool.arriving.left_out
            pool.heard, pool.is_wrong = True, False
            tree.reset(pool.name, message.epoch, snapshot)
        return Done()

    def _is_audit_due(self, pool: _PoolState) -> bool:
        """Whether to request an audit; the audit is begun then."""
        now_s = self._clock()
        if now_s < max(pool.audit_due_s, self._no_audit_until_s):
            return False
        pool.audit = _Audit()
        pool.audit_due_s = now_s + self._audit_s
        self._counters.audits_asked += 1
        held = self._tree.stats().instances[pool.name]
        self._delay_audits(sum(held))
        return True

    def _audit(self, pool: _PoolState, part: SnapshotPart) -> Message:
        """Compare one part with the tree and drop it. Parts that the router did not request are ignored."""
        audit = pool.audit
        if audit is None:
            self._counters.unasked_parts += 1
            return Done()
        if part.index == audit.num_parts - 1:
            return Done()
        result = self._tree.compare(pool.name, Snapshot(part.sequence, part.chains))
        if result.lag or part.index != audit.num_parts:
            pool.audit = None
            self._counters.void_audits += 1
            return Done()
        audit.num_parts += 1
        audit.reported += result.reported
        audit.both += result.both
        if not part.is_last:
            return Done()
        pool.audit = None
        return self._conclude(pool, AuditResult(result.held, audit.reported, audit.both, 0))

    def _conclude(self, pool: _PoolState, result: AuditResult) -> Message:
        """End an audit. If the tree is wrong, request a snapshot."""
        instance = pool.name
        self._delay_audits(result.reported)
        self._counters.audits += 1
        self._counters.phantoms += result.phantoms
        self._audit_results[instance] = result
        missing = result.reported - result.both
        if self._counters.left_out or self._tree.stats().counters.forgotten:
            missing = 0  # the tree lacks some blocks on purpose
        pool.is_wrong = bool(result.phantoms or missing)
        if not pool.is_wrong:
            return Done()
        self._counters.untrue_audits += 1
        logger.warning(
            "the prompt tree was wrong instance=%s phantoms=%d missing=%d of=%d",
            instance, result.phantoms, missing, result.reported,
        )  # fmt: skip
        return SnapshotWanted()

    def _delay_audits(self, num_blocks: int) -> None:
        """Request no audit for the time that an audit of `num_blocks` takes."""
        until_s = self._clock() + num_blocks * KEY_BYTES / self._audit_bytes_per_s
        self._no_audit_until_s = max(self._no_audit_until_s, until_s)

    def _find(self, message: PoolEvents | SnapshotPart) -> _PoolState | None:
        """The pool that sent a message; None if unknown. A memory instance may report a new layout."""
        key = message.epoch, message.layout
        known = self._known.get(key)
        if known is None and message.layout and len(message.layout) <= MAX_LAYOUT_CHARS:
            layouts = [layout for epoch, layout in self._known if epoch == message.epoch]
            instance = self._memories.get(message.epoch)
            if instance is not None and len(layouts) < MAX_LAYOUTS:
                known = self._join(message.epoch, pool_name(instance, message.layout), message.layout)
        return known

    def _join(self, epoch: Epoch, name: InstanceId, layout: str = "") -> _PoolState:
        known = self._known[epoch, layout] = _PoolState(name, self._clock() + self._audit_s)
        self._tree.join(name, epoch)
        return known

    def _update_members(self, members: dict[Epoch, PoolInfo]) -> None:
        """Remove the pools that have left from the tree, and add the new ones."""
        for key in [key for key in self._known if key[0] not in members]:
            name = self._known.pop(key).name
            self._tree.leave(name)
            self._audit_results.pop(name, None)
        memories = (info for info in members.values() if info.role is Role.MEMORY)
        self._memories = {info.epoch: info.instance_id for info in memories}
        for epoch, info in members.items():
            if epoch not in self._memories and (epoch, "") not in self._known:
                self._join(epoch, info.instance_id)


@dataclass(slots=True)
class _PoolState:
    """A pool that reports to the tree."""

    name: InstanceId
    """Its name in the tree."""
    audit_due_s: float
    heard: bool = False
    """Whether it has reported its blocks."""
    is_wrong: bool = False
    """Whether an audit found the tree wrong; reset by a snapshot."""
    arriving: _SnapshotParts | None = None
    audit: _Audit | None = None
    """None: no audit was requested."""


@dataclass(slots=True)
class _Audit:
    """The sums of an audit in progress."""

    num_parts: int = 0
    reported: int = 0
    both: int = 0


class _SnapshotParts:
    """A snapshot of which parts have arrived."""

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
        """Keep the next part, or ignore a repeated last one; False, changing nothing, for other parts."""
        if part.sequence != self._sequence or part.index not in (self._num_parts - 1, self._num_parts):
            return False
        if part.index < self._num_parts:
            return True
        if self._is_whole:
            return False
        self._num_parts += 1
        self._is_whole = part.is_last
        for chain in part.chains:
            size = max(1, len(chain.keys))  # a chain without keys takes memory, too
            if size > self._room:
                self._room = 0  # later chains may continue this one
                self.left_out += len(chain.keys)
            else:
                self._room -= size
                self._chains.append(chain)
        return True

    def snapshot(self) -> Snapshot | None:
        """The whole snapshot, once, when the last part has arrived; otherwise None."""
        if not self._is_whole or self._is_given:
            return None
        chains, self._chains, self._is_given = tuple(self._chains), [], True
        return Snapshot(self._sequence, chains)
