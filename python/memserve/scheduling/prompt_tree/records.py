"""The results and counters of the prompt tree. Plain records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from memserve.core.block_addr import LOCAL_TIERS
from memserve.core.ids import InstanceId, server_of

TierCounts = tuple[int, ...]
"""Numbers of blocks by tier: counts[tier] for each of LOCAL_TIERS."""


class Overlap(msgspec.Struct, frozen=True, gc=False):
    """How much of one prompt one instance holds. A Struct: C code makes hundreds of them per request."""

    depths: TierCounts
    """By tier, the blocks from the front that are in that tier or in one nearer to the compute; the last
    depth counts all of them. DRAM and the tiers after it include blocks that are expected soon."""
    readable: int
    """Blocks from the front in READABLE_TIERS: what another instance can fetch if this one has a pool."""

    @property
    def cached(self) -> int:
        """Blocks from the front in any tier. In a hot loop write `depths[-1]`."""
        return self.depths[-1]


NO_OVERLAP = Overlap((0,) * len(LOCAL_TIERS), 0)


def by_server(overlaps: Mapping[InstanceId, Overlap]) -> Mapping[InstanceId, Overlap]:
    """The overlaps by server: of its data-parallel ranks the deepest, and the most readable."""
    if not any("/dp" in name for name in overlaps):
        return overlaps
    found: dict[InstanceId, Overlap] = {}
    for name, overlap in overlaps.items():
        server = server_of(name)
        known = found.get(server, overlap)
        deeper = known if known.cached >= overlap.cached else overlap
        found[server] = Overlap(deeper.depths, max(known.readable, overlap.readable))
    return found


@dataclass(frozen=True, slots=True)
class AuditResult:
    """The tree's blocks of one instance compared with the instance's own, in (block, tier) pairs."""

    held: int
    """Pairs in the tree."""
    reported: int
    """Pairs in the snapshot."""
    both: int
    """Pairs in both."""
    lag: int
    """Events in the snapshot that the tree has not applied; negative if the tree is ahead. Unless it is 0,
    the tree and the snapshot may differ."""

    @property
    def phantoms(self) -> int:
        """Pairs only in the tree: each costs a cache miss."""
        return self.held - self.both

    @property
    def precision(self) -> float:
        """The share of the tree's pairs that the instance holds."""
        return self.both / self.held if self.held else 1.0

    @property
    def recall(self) -> float:
        """The share of the instance's pairs that the tree has."""
        return self.both / self.reported if self.reported else 1.0


@dataclass(slots=True)
class TreeCounters:
    """Counts since the tree was made."""

    gaps: int = 0
    """Batches of events with a missing event."""
    resets: int = 0
    """Snapshots applied."""
    repeated: int = 0
    """Events and snapshots that had been applied before."""
    unknown: int = 0
    """Calls with an unknown instance, or an epoch that has ended."""
    orphans: int = 0
    """Blocks rejected because the instance does not hold their parent."""
    refused: int = 0
    """Blocks rejected because they are not keys, are too many, or contradict the tree."""
    forgotten: int = 0
    """Blocks forgotten, or not stored, to keep the budget."""

    def count_not_taken(self, num_blocks: int, *, is_orphan: bool) -> None:
        """Blocks of an event were rejected."""
        if is_orphan:
            self.orphans += num_blocks
        else:
            self.refused += num_blocks


@dataclass(slots=True)
class SyncCounters:
    """Counts of audits, and of blocks left out of snapshots, since the router began."""

    audits_asked: int = 0
    audits: int = 0
    """Audits with a result."""
    void_audits: int = 0
    """Audits without a result: a part was missing, or the tree had applied other events."""
    untrue_audits: int = 0
    """Audits that found the tree wrong and asked for a snapshot."""
    phantoms: int = 0
    """Blocks found only in the tree."""
    unasked_parts: int = 0
    """Parts of audits that the router had not asked for."""
    left_out: int = 0
    """Blocks left out of snapshots that were too large."""


@dataclass(frozen=True, slots=True)
class TreeStats:
    """The counts of a tree at one moment."""

    blocks: int
    """Blocks in memory; a few of them may have no holder any more."""
    holdings: int
    """(block, instance, tier) triples."""
    holder_sets: int
    expected: int
    instances: dict[InstanceId, TierCounts]
    counters: TreeCounters
