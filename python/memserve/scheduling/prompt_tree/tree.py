"""The global prompt tree: how much of a prompt each instance has cached, by tier.

    events, snapshots ──> GlobalPromptTree.apply, reset     exact: instances that report
    dispatched        ──> expect                       until they have reported
    answered          ──> join_approximate, learn      approximate: workers that report nothing
                          overlaps(keys) ──> {instance: Overlap}

Within `max_blocks` the tree forgets the least recently used tails. A wrong entry costs a cache miss, never
a wrong answer. Knows no sockets and no policy. Files: `holder_index` (prefixes by holder), `block_table`
(columns), `interned_sets`, `registry` (instances), `in_flight`, `approximate`, `records`.
Source: MemServe (global prompt trees, TTL); sequence numbers, epochs and tiers are ours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.cache_events import CacheEvent, Snapshot, Stored
from memserve.core.ids import Epoch, InstanceId
from memserve.scheduling.prompt_tree.approximate import ApproximateCache
from memserve.scheduling.prompt_tree.holder_index import SWEEP_SLOTS, HolderIndex
from memserve.scheduling.prompt_tree.in_flight import InFlightBlocks
from memserve.scheduling.prompt_tree.records import (
    NO_OVERLAP,
    AuditResult,
    Overlap,
    TierCounts,
    TreeCounters,
    TreeStats,
)
from memserve.scheduling.prompt_tree.registry import NUM_TIERS, Holder, HolderRegistry, compare

__all__ = [
    "BYTES_PER_BLOCK",
    "AuditResult",
    "GlobalPromptTree",
    "Overlap",
    "TierCounts",
    "TreeCounters",
    "TreeStats",
]

logger = logging.getLogger(__name__)

BYTES_PER_BLOCK = 256
"""Memory of one block with its key. Measured; a test checks it."""

MAX_CHAIN_BLOCKS = 1 << 20
"""An event with more blocks than this is rejected."""

_FEW = 6
"""Up to so many names a loop is faster than dict.fromkeys."""


class GlobalPromptTree:
    """The tree. Event loop thread only. No call raises for what an instance sent."""

    def __init__(self, *, max_blocks: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_blocks`: budget in bytes // BYTES_PER_BLOCK; None: no limit. A block counts again for each
        worker that it was learned from, and for each prompt in which it is expected. There is at most one
        distinct set of holders per 16 blocks, but at least 1024."""
        if max_blocks is not None and max_blocks < 1:
            raise ValueError(f"max_blocks is at least 1, not {max_blocks}")
        self._max_blocks = max_blocks
        self._clock = clock
        self._index = HolderIndex(None if max_blocks is None else max(1024, max_blocks // 16))
        self._in_flight = InFlightBlocks(None if max_blocks is None else max(1, max_blocks // 4))
        self._registry = HolderRegistry()
        self._learned = 0
        self._learned_due_s = float("inf")
        self._counters = TreeCounters()

    def join(self, instance: InstanceId, epoch: Epoch) -> None:
        """Add an instance that reports its blocks. Idempotent; a new epoch starts without blocks."""
        known = self._registry.get(instance)
        if known is None or known.epoch != epoch:
            self.leave(instance)
            self._registry.add(instance, epoch)

    def join_approximate(self, instance: InstanceId, *, capacity_blocks: int | None, ttl_s: float) -> None:
        """Add an instance that never reports, with an empty `ApproximateCache`; replaces an earlier one.

        Raises ValueError, changing nothing, if the capacity or the TTL is not positive.
        """
        approximate = ApproximateCache(capacity_blocks, ttl_s)
        self.leave(instance)
        self._registry.add(instance, None).approximate = approximate

    def leave(self, instance: InstanceId) -> None:
        """Remove an instance with all its blocks: O(sets of holders), not O(blocks). Idempotent."""
        member = self._registry.get(instance)
        if member is None:
            return
        self._learned -= len(member.approximate or ())
        self._index.clear(member.numbers)
        self._in_flight.forget(instance)
        self._registry.remove(member)

    def __contains__(self, instance: InstanceId) -> bool:
        """Whether the instance has joined."""
        return self._registry.get(instance) is not None

    def apply(self, instance: InstanceId, epoch: Epoch, events: Sequence[CacheEvent]) -> bool:
        """Apply the events of an instance in order; events applied before are skipped.

        False if an event is missing, or the instance or its epoch is unknown. The events before the gap
        are applied then, those after it are not: send the missing events, or call `reset`.
        """
        member = self._find(instance, epoch)
        if member is None:
            return False
        for event in events:
            if event.sequence <= member.sequence:
                self._counters.repeated += 1
            elif event.sequence > member.sequence + 1:
                self._counters.gaps += 1
                return False
            else:
                member.sequence = event.sequence
                self._change(member, event)
        self.tidy(SWEEP_SLOTS)
        return True

    def reset(self, instance: InstanceId, epoch: Epoch, snapshot: Snapshot) -> None:
        """Replace the instance's blocks by a snapshot. Ignored if the tree has applied later events."""
        member = self._find(instance, epoch)
        if member is None:
            return
        if snapshot.sequence < member.sequence:
            self._counters.repeated += 1
            return
        self._index.clear(member.numbers)
        for chain in snapshot.chains:
            self._change(member, chain)
        member.sequence = snapshot.sequence
        self._counters.resets += 1
        self.tidy(SWEEP_SLOTS)
        logger.info(
            "prompt tree reset instance=%s sequence=%d chains=%d",
            instance, snapshot.sequence, len(snapshot.chains),
        )  # fmt: skip

    def expect(self, instance: InstanceId, keys: Sequence[BlockKey], until_s: float) -> None:
        """A prompt was dispatched to the instance: count its blocks as held until reported, or `until_s`.

        `until_s`: on the tree's clock. Ignored if the instance is unknown or too many blocks are expected.
        """
        member = self._registry.get(instance)
        if member is None:
            self._counters.unknown += 1
            return
        now_s = self._clock()
        self._in_flight.expire(now_s)
        depth = self._index.depth(member.bits, keys)
        if until_s > now_s and not self._in_flight.add(instance, keys, depth, until_s):
            self._counters.forgotten += len(keys) - depth
        self._keep_budget()

    def learn(self, instance: InstanceId, keys: Sequence[BlockKey]) -> None:
        """An approximate instance has answered a prompt: it holds all `keys` of it in HBM."""
        member = self._registry.get(instance)
        if member is None or member.approximate is None:
            self._counters.unknown += 1
            return
        now_s = self._clock()
        self._in_flight.expire(now_s)
        if self._learned_due_s <= now_s:
            self._expire_learned(now_s)
        number, approximate = member.numbers[Tier.HBM], member.approximate
        before = len(approximate)
        taken = self._index.store(number, None, keys[: self._max_blocks])
        if gone := approximate.use(keys[:taken], now_s):
            self._index.remove(number, gone)
        self._learned += len(approximate) - before
        self._learned_due_s = min(self._learned_due_s, approximate.due_s())
        self._in_flight.reported(instance, keys)
        self._keep_budget()

    def overlaps(self, keys: Sequence[BlockKey]) -> dict[InstanceId, Overlap]:
        """The overlap of a prompt with each instance that holds, or is expected to hold, its first block.

        Counts as a use for the order of forgetting. O(instances found + changes of holders x log keys).
        """
        now_s = self._clock()
        if self._learned_due_s <= now_s:
            self._expire_learned(now_s)
        result: dict[InstanceId, Overlap] = {}
        get, group, groups, any_readable = result.get, self._registry.group, self._registry.groups, False
        for holders, depth in self._index.ends(keys):  # ascending depth: a later set extends an earlier one
            in_hbm, in_both, further = groups.get(holders) or group(holders)
            every = (depth,) * NUM_TIERS
            if in_hbm:
                overlap = Overlap(every, 0)
                if any_readable or len(in_hbm) < _FEW:  # keep what is readable of an instance
                    for instance in in_hbm:
                        known = get(instance)
                        result[instance] = Overlap(every, known.readable) if known else overlap
                else:
                    result.update(dict.fromkeys(in_hbm, overlap))
            if in_both:
                any_readable = True
                result.update(dict.fromkeys(in_both, Overlap(every, depth)))
            if further:
                any_readable = True
                for instance, tier, is_readable in further:
                    known = get(instance, NO_OVERLAP)
                    readable = depth if is_readable else known.readable
                    result[instance] = Overlap(known.depths[:tier] + every[tier:], readable)
        self._in_flight.lengthen(result, keys, now_s)
        return result

    def holders(self, key: BlockKey) -> dict[InstanceId, TierCounts]:
        """The instances that hold one block, by tier 1 or 0. Not a use. O(instances)."""
        counts = ((member.instance, member.num_held(self._index, key)) for member in self._registry)
        return {instance: held for instance, held in counts if any(held)}

    def stats(self) -> TreeStats:
        """A copy of the tree's counts."""
        held = self._index.held
        return TreeStats(
            blocks=len(self._index),
            holdings=held.total(),
            holder_sets=self._index.num_sets,
            expected=len(self._in_flight),
            instances={
                member.instance: tuple(held[number] for number in member.numbers) for member in self._registry
            },
            counters=replace(self._counters),
        )

    def compare(self, instance: InstanceId, snapshot: Snapshot) -> AuditResult:
        """Compare the tree's blocks of an instance with its snapshot, or with a part of it. Pure."""
        return compare(self._index, self._registry.get(instance), snapshot)

    def digest(self, instance: InstanceId) -> dict[Tier, tuple[int, int]]:
        """By tier, the number of blocks and the xor of the first 8 bytes of their keys. O(all blocks)."""
        member = self._registry.get(instance)
        numbers = member.numbers if member is not None else ()
        return {Tier(tier): self._index.digest(number) for tier, number in enumerate(numbers)}

    def tidy(self, num_blocks: int = 65536) -> None:
        """Free expired and unheld blocks, looking at `num_blocks`. For a timer; events do a little of it."""
        now_s = self._clock()
        self._in_flight.expire(now_s)
        if self._learned_due_s <= now_s:
            self._expire_learned(now_s)
        self._index.sweep(num_blocks)

    def _find(self, instance: InstanceId, epoch: Epoch) -> Holder | None:
        member = self._registry.get(instance)
        if member is None or member.epoch != epoch:
            self._counters.unknown += 1
            return None
        return member

    def _change(self, member: Holder, event: CacheEvent) -> None:
        """Apply one event, or a chain of a snapshot."""
        if event.tier >= NUM_TIERS:
            return
        number, keys = member.numbers[event.tier], event.keys
        if isinstance(event, Stored):
            if len(keys) > MAX_CHAIN_BLOCKS:
                self._counters.refused += len(keys)
                return
            if self._max_blocks is not None and len(keys) > self._max_blocks:
                self._counters.forgotten += len(keys) - self._max_blocks
                keys = keys[: self._max_blocks]
            if event.parent is not None and not self._index.num_held(1 << number, [event.parent]):
                # The tree has forgotten the parent; a holder of a block holds all blocks before it.
                chain = self._in_flight.chain_to(member.instance, event.parent)
                self._in_flight.reported(member.instance, chain[: self._index.store(number, None, chain)])
            taken = self._index.store(number, event.parent, keys)
            if lost := len(keys) - taken:
                self._counters.count_not_taken(lost, is_orphan=not taken and event.parent is not None)
            self._keep_budget()
        else:
            self._index.remove(number, keys)
        self._in_flight.reported(member.instance, event.keys)

    def _keep_budget(self) -> None:
        """Forget blocks beyond the budget, one by one if learned blocks may count several times."""
        if self._max_blocks is None:
            return
        index = self._index
        if index.fits(self._max_blocks - self._learned - self._in_flight.num_kept):
            return
        while True:
            over = len(index) + self._learned + self._in_flight.num_kept - self._max_blocks
            gone = index.forget_until(len(index) - max(0, min(over, 1) if self._learned else over))
            self._counters.forgotten += len(gone)
            if self._learned:
                self._learned -= self._registry.discard_learned(gone)
            if over <= 1 or not self._learned or not gone:
                return

    def _expire_learned(self, now_s: float) -> None:
        self._learned_due_s = float("inf")
        for member in self._registry:
            if member.approximate is not None:
                gone = member.approximate.expire(now_s)
                self._learned -= len(gone)
                self._index.remove(member.numbers[Tier.HBM], gone)
                self._learned_due_s = min(self._learned_due_s, member.approximate.due_s())
