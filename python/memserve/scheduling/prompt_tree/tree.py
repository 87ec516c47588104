"""The one prompt tree of the cluster: which instance has how much of a prompt, by tier.

    events, snapshots ──> GlobalPromptTree.apply, reset     exact: instances that report
    dispatched        ──> expect                       until they have reported
    answered          ──> mirror, learn                approximate: workers that report nothing
                          overlaps(keys) ──> {instance: Overlap}

Within `max_blocks` it forgets the tails used longest ago. A wrong entry costs a miss, never a wrong
answer. Knows no sockets and no policy. Files: `holdings` (prefixes by holder), `block_table` (columns),
`holders` (interned sets), `roster` (instances), `expected`, `mirror`, `tree_records`.
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
from memserve.scheduling.prompt_tree.registry import NUM_TIERS, Holder, HolderRegistry

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
"""Memory of one block, key and all. Measured; a test holds it true."""

MAX_CHAIN_BLOCKS = 1 << 20
"""An event of more blocks than this is no prompt's."""

BLOCKS_PER_SET = 16
"""Within a budget there is at most one distinct set of holders for so many blocks, or `MIN_SETS`."""
MIN_SETS = 1024


class GlobalPromptTree:
    """Loop thread only. No call raises for what an instance sent."""

    def __init__(self, *, max_blocks: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_blocks`: bytes of the budget // BYTES_PER_BLOCK. A block counts once more for each
        worker that it is learned of, and each prompt in which it is expected."""
        if max_blocks is not None and max_blocks < 1:
            raise ValueError(f"a tree has at least one block, not {max_blocks}")
        self._max_blocks = max_blocks
        self._clock = clock
        self._holdings = HolderIndex(
            None if max_blocks is None else max(MIN_SETS, max_blocks // BLOCKS_PER_SET)
        )
        self._expected = InFlightBlocks(None if max_blocks is None else max(1, max_blocks // 4))
        self._roster = HolderRegistry()
        self._learned = 0
        self._learned_due_s = float("inf")
        self._counters = TreeCounters()

    def join(self, instance: InstanceId, epoch: Epoch) -> None:
        """It reports from now on, and has nothing yet. Idempotent; a new epoch forgets the old one."""
        known = self._roster.get(instance)
        if known is None or known.epoch != epoch:
            self._enter(instance, epoch)

    def join_approximate(self, instance: InstanceId, *, capacity_blocks: int | None, ttl_s: float) -> None:
        """It never reports: see `ApproximateCache` for what it is believed to hold. Forgets what was.

        Raises ValueError, changing nothing, if the capacity or the TTL is none.
        """
        mirror = ApproximateCache(capacity_blocks, ttl_s)
        self._enter(instance, None).mirror = mirror

    def leave(self, instance: InstanceId) -> None:
        """All its holdings go, at once: O(sets of holders), not O(blocks). Idempotent."""
        member = self._roster.get(instance)
        if member is None:
            return
        self._learned -= len(member.mirror or ())
        self._holdings.clear(member.numbers)
        self._expected.forget(instance)
        self._roster.leave(member)

    def follows(self, instance: InstanceId) -> bool:
        """Whether it has joined, or is mirrored."""
        return self._roster.get(instance) is not None

    def apply(self, instance: InstanceId, epoch: Epoch, events: Sequence[CacheEvent]) -> bool:
        """Bring the instance's holdings up to the last of `events`, leaving out those that are in already.

        False if one is missing, or the instance or its epoch is not known: what comes before the gap is
        in, nothing after it; then `reset` helps, or the missing events.
        """
        member = self._of(instance, epoch)
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
        self._tidy(SWEEP_SLOTS)
        return True

    def reset(self, instance: InstanceId, epoch: Epoch, snapshot: Snapshot) -> None:
        """It holds what the snapshot says, and nothing else. Left out if the tree knows of later events."""
        member = self._of(instance, epoch)
        if member is None:
            return
        if snapshot.sequence < member.sequence:
            self._counters.repeated += 1
            return
        self._holdings.clear(member.numbers)
        for chain in snapshot.chains:
            self._change(member, chain)
        member.sequence = snapshot.sequence
        self._counters.resets += 1
        self._tidy(SWEEP_SLOTS)
        logger.info(
            "prompt tree reset instance=%s sequence=%d chains=%d",
            instance, snapshot.sequence, len(snapshot.chains),
        )  # fmt: skip

    def expect(self, instance: InstanceId, keys: Sequence[BlockKey], until_s: float) -> None:
        """A prompt is on its way there: it counts as held until reported, or until that time of the clock.

        What it holds already is not expected. Left out if it is not known, or too much is expected.
        """
        member = self._roster.get(instance)
        if member is None:
            self._counters.unknown += 1
            return
        now_s = self._clock()
        self._expected.expire(now_s)
        depth = self._holdings.depth(member.bits, keys)
        if until_s > now_s and not self._expected.add(instance, keys, depth, until_s):
            self._counters.forgotten += len(keys) - depth
        self._keep_budget()

    def learn(self, instance: InstanceId, keys: Sequence[BlockKey]) -> None:
        """A worker that never reports has answered: it has `keys`, from a prompt's first on, in HBM."""
        member = self._roster.get(instance)
        if member is None or member.mirror is None:
            self._counters.unknown += 1
            return
        now_s = self._clock()
        self._expected.expire(now_s)
        if self._learned_due_s <= now_s:
            self._expire_learned(now_s)
        number, mirror = member.numbers[Tier.HBM], member.mirror
        before = len(mirror)
        taken = self._holdings.store(number, None, keys[: self._max_blocks])
        if gone := mirror.use(keys[:taken], now_s):
            self._holdings.remove(number, gone)
        self._learned += len(mirror) - before
        self._learned_due_s = min(self._learned_due_s, mirror.due_s())
        self._expected.reported(instance, keys)
        self._keep_budget()

    def overlaps(self, keys: Sequence[BlockKey]) -> dict[InstanceId, Overlap]:
        """How much of a prompt each instance has; only those that have, or expect, its first block.

        Counts as a use, for the order of forgetting. O(instances that have some + changes x log keys).
        """
        now_s = self._clock()
        if self._learned_due_s <= now_s:
            self._expire_learned(now_s)
        result: dict[InstanceId, Overlap] = {}
        get, group, any_readable = result.get, self._roster.group, False
        for holders, depth in self._holdings.ends(
            keys
        ):  # ascending depth: a later set extends an earlier one
            in_hbm, in_both, further = group(holders)
            every = (depth,) * NUM_TIERS
            if in_hbm:
                overlap = Overlap(every, 0)
                if any_readable:  # keep what is readable of an instance
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
        self._expected.lengthen(result, keys, now_s)
        return result

    def depth_in(self, instance: InstanceId, tier: Tier, keys: Sequence[BlockKey]) -> int:
        """How many of a prompt's blocks, from the first, one instance has in one tier. O(log keys)."""
        member = self._roster.get(instance)
        if member is None or tier >= NUM_TIERS:
            return 0
        return self._holdings.depth(1 << member.numbers[tier], keys)

    def holders(self, key: BlockKey) -> dict[InstanceId, TierCounts]:
        """Who has one block, by tier: 1 or 0. Not a use. O(instances)."""
        found = {
            member.instance: tuple(self._holdings.num_held(1 << number, (key,)) for number in member.numbers)
            for member in self._roster
        }
        return {instance: held for instance, held in found.items() if any(held)}

    def stats(self) -> TreeStats:
        """The tree now; a copy."""
        held = self._holdings.held
        return TreeStats(
            blocks=len(self._holdings),
            holdings=held.total(),
            holder_sets=self._holdings.num_sets,
            expected=len(self._expected),
            instances={
                member.instance: tuple(held[number] for number in member.numbers) for member in self._roster
            },
            counters=replace(self._counters),
        )

    def compare(self, instance: InstanceId, snapshot: Snapshot) -> AuditResult:
        """The tree's word on an instance against a snapshot of it, or a part of one. Pure."""
        member = self._roster.get(instance)
        chains = [chain for chain in snapshot.chains if chain.tier < NUM_TIERS]
        reported = sum(len(chain.keys) for chain in chains)
        if member is None:
            return AuditResult(0, reported, 0, snapshot.sequence)
        held = sum(self._holdings.held[number] for number in member.numbers)
        both = sum(self._holdings.num_held(1 << member.numbers[one.tier], one.keys) for one in chains)
        return AuditResult(held, reported, both, snapshot.sequence - member.sequence)

    def digest(self, instance: InstanceId) -> dict[Tier, tuple[int, int]]:
        """By tier, how many blocks it holds, and the first 8 bytes of their keys xored. O(all blocks)."""
        member = self._roster.get(instance)
        numbers = member.numbers if member is not None else ()
        return {Tier(tier): self._holdings.digest(number) for tier, number in enumerate(numbers)}

    def tidy(self, num_blocks: int = 65536) -> None:
        """Give back memory of what is late or nobody's. For a timer; events do it in passing, too."""
        self._tidy(num_blocks)

    def _enter(self, instance: InstanceId, epoch: Epoch | None) -> Holder:
        self.leave(instance)
        return self._roster.enter(instance, epoch)

    def _of(self, instance: InstanceId, epoch: Epoch) -> Holder | None:
        member = self._roster.get(instance)
        if member is None or member.epoch != epoch:
            self._counters.unknown += 1
            return None
        return member

    def _change(self, member: Holder, event: CacheEvent) -> None:
        """Apply one event, or a chain of a snapshot."""
        if event.tier >= NUM_TIERS:
            return
        number = member.numbers[event.tier]
        keys = event.keys
        if isinstance(event, Stored):
            if len(keys) > MAX_CHAIN_BLOCKS:
                self._counters.refused += len(keys)
                return
            if self._max_blocks is not None and len(keys) > self._max_blocks:
                self._counters.forgotten += len(keys) - self._max_blocks
                keys = keys[: self._max_blocks]
            if event.parent is not None and not self._holdings.num_held(1 << number, [event.parent]):
                # It has been forgotten, yet who has a block has all that comes before it.
                chain = self._expected.chain_to(member.instance, event.parent)
                self._expected.reported(member.instance, chain[: self._holdings.store(number, None, chain)])
            taken = self._holdings.store(number, event.parent, keys)
            if taken < len(keys):
                if taken or event.parent is None:
                    self._counters.refused += len(keys) - taken
                else:
                    self._counters.orphans += len(keys)
            self._keep_budget()
        else:
            self._holdings.remove(number, keys)
        self._expected.reported(member.instance, event.keys)

    def _keep_budget(self) -> None:
        """Block by block where something is learned, as then a block may count several times."""
        if self._max_blocks is None:
            return
        holdings = self._holdings
        if holdings.fits(self._max_blocks - self._learned - self._expected.num_kept):
            return
        while True:
            over = len(holdings) + self._learned + self._expected.num_kept - self._max_blocks
            gone = holdings.forget_until(len(holdings) - max(0, min(over, 1) if self._learned else over))
            self._counters.forgotten += len(gone)
            for key, holders in gone if self._learned else ():
                for member in self._roster.of(holders):
                    if member.mirror is not None:
                        self._learned -= member.mirror.discard(key)
            if over <= 1 or not self._learned or not gone:
                return

    def _tidy(self, num_blocks: int) -> None:
        now_s = self._clock()
        self._expected.expire(now_s)
        if self._learned_due_s <= now_s:
            self._expire_learned(now_s)
        self._holdings.sweep(num_blocks)

    def _expire_learned(self, now_s: float) -> None:
        self._learned_due_s = float("inf")
        for member in self._roster:
            if member.mirror is not None:
                gone = member.mirror.expire(now_s)
                self._learned -= len(gone)
                self._holdings.remove(member.numbers[Tier.HBM], gone)
                self._learned_due_s = min(self._learned_due_s, member.mirror.due_s())
