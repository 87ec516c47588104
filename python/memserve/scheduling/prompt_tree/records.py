"""What the cluster's prompt tree tells of itself. Plain records."""

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
    """The tree's word on one instance against the instance's own, in (block, tier) pairs."""

    held: int
    """That the tree has."""
    reported: int
    """That the snapshot has."""
    both: int
    behind: int
    """Events that the snapshot has seen and the tree has not; negative if it is the other way round.
    Unless it is 0, the two need not agree."""

    @property
    def phantoms(self) -> int:
        """In the tree, but not there: each costs a miss."""
        return self.held - self.both

    @property
    def precision(self) -> float:
        """Of what the tree has, the share that is there."""
        return self.both / self.held if self.held else 1.0

    @property
    def recall(self) -> float:
        """Of what is there, the share that the tree has."""
        return self.both / self.reported if self.reported else 1.0


@dataclass(slots=True)
class TreeCounters:
    """What has happened to a tree since it was made."""

    gaps: int = 0
    """Batches of events that stopped at a missing one."""
    resets: int = 0
    """Snapshots taken in."""
    repeated: int = 0
    """Events, snapshots that came when what they say was known."""
    unknown: int = 0
    """Calls with an instance that is not there, or an epoch that is over."""
    orphans: int = 0
    """Blocks refused because what comes before them is not known to be held."""
    refused: int = 0
    """Blocks refused because they are no keys, too many, or contradict the tree."""
    forgotten: int = 0
    """Blocks forgotten, or not even taken in, to keep the budget."""


@dataclass(slots=True)
class FeedCounters:
    """What has come of audits since the router began, and what was not let in."""

    audits_asked: int = 0
    audits: int = 0
    """That came to a verdict."""
    void_audits: int = 0
    """That came to none: a part was missing, or the tree was not of the same moment."""
    untrue_audits: int = 0
    """That found the tree wrong; a snapshot has put it right."""
    phantoms: int = 0
    """Blocks that the tree had and the instance had not."""
    unasked_parts: int = 0
    """Of audits that nobody had asked for."""
    left_out: int = 0
    """Blocks of snapshots that were too large."""


@dataclass(frozen=True, slots=True)
class TreeStats:
    """A tree at one moment."""

    blocks: int
    """In memory; a few of them may be nobody's any more."""
    holdings: int
    """(block, instance, tier) triples."""
    holder_sets: int
    expected: int
    instances: dict[InstanceId, TierCounts]
    counters: TreeCounters
