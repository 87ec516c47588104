"""The instances of the prompt tree. Each tier of an instance is one holder with a number.

    place     0           1                  numbers of holders: NUM_TIERS x place + tier
    member    ann         bob                a place is reused when its member has left

Stores no blocks. Event loop thread only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from memserve.core.block_addr import LOCAL_TIERS, READABLE_TIERS, Tier
from memserve.core.block_keys import BlockKey
from memserve.core.cache_events import Snapshot
from memserve.core.ids import Epoch, InstanceId
from memserve.scheduling.prompt_tree.approximate import ApproximateCache
from memserve.scheduling.prompt_tree.holder_index import HolderIndex
from memserve.scheduling.prompt_tree.interned_sets import members_of
from memserve.scheduling.prompt_tree.records import AuditResult, TierCounts

NUM_TIERS = len(LOCAL_TIERS)

_MAX_GROUPED = 1 << 16
"""Names in the remembered groups."""

Group = tuple[dict[InstanceId, None], dict[InstanceId, None], list[tuple[InstanceId, int, bool]]]
"""The instances of a set of holders: with their HBM in it; with their HBM and a readable tier; all others,
each with its nearest tier in the set and whether a readable tier is in the set."""


@dataclass(slots=True)
class Holder:
    """An instance; numbers[tier] is its holder of that tier."""

    instance: InstanceId
    epoch: Epoch | None
    numbers: tuple[int, ...]
    sequence: int = 0
    """The number of the last event applied."""
    approximate: ApproximateCache | None = None
    """For a worker that sends no events."""

    @property
    def bits(self) -> int:
        """The bit mask of all its holders."""
        return sum(1 << number for number in self.numbers)

    def num_held(self, index: HolderIndex, key: BlockKey) -> TierCounts:
        """By tier, 1 or 0: whether it holds one block."""
        return tuple(index.num_held(1 << number, (key,)) for number in self.numbers)


class HolderRegistry:
    """The members by name and by holder."""

    def __init__(self) -> None:
        self._members: dict[InstanceId, Holder] = {}
        self._places: list[Holder | None] = []
        self.groups: dict[int, Group] = {}
        """The groups computed lately by set of holders. Read only."""
        self._num_grouped = 0

    def __iter__(self) -> Iterator[Holder]:
        return iter(self._members.values())

    def get(self, instance: InstanceId) -> Holder | None:
        return self._members.get(instance)

    def add(self, instance: InstanceId, epoch: Epoch | None) -> Holder:
        """Add a member that is not in the registry yet."""
        place = self._places.index(None) if None in self._places else len(self._places)
        member = Holder(instance, epoch, tuple(range(place * NUM_TIERS, (place + 1) * NUM_TIERS)))
        self._places[place : place + 1] = [member]
        self._members[instance] = member
        return member

    def remove(self, member: Holder) -> None:
        """Remove a member. No block has its holders any more."""
        del self._members[member.instance]
        self._places[member.numbers[0] // NUM_TIERS] = None
        self._forget_groups()

    def members_of(self, holders: int) -> list[Holder]:
        """The members of a set of holders, once for each of their holders in it."""
        members = [self._places[number // NUM_TIERS] for number in members_of(holders)]
        return [member for member in members if member is not None]

    def discard_learned(self, blocks: Iterable[tuple[BlockKey, int]]) -> int:
        """Remove blocks (key, set of holders) from the approximate caches; returns how many were there."""
        return sum(
            member.approximate.discard(key)
            for key, holders in blocks
            for member in self.members_of(holders)
            if member.approximate is not None
        )

    def group(self, holders: int) -> Group:
        """The instances of a set, by tier. Remembered, because a few large sets recur; not to be changed."""
        group = self.groups.get(holders)
        if group is None:
            nearest: dict[InstanceId, int] = {}
            readable: dict[InstanceId, None] = {}
            for number in members_of(holders):
                place, tier = divmod(number, NUM_TIERS)
                member = self._places[place]
                if member is not None:
                    nearest.setdefault(member.instance, tier)  # the nearest tier of a member comes first
                    if tier in READABLE_TIERS:
                        readable[member.instance] = None
            self._num_grouped += len(nearest) + 8
            if self._num_grouped > _MAX_GROUPED:
                self._forget_groups()
            in_hbm: dict[InstanceId, None] = {}
            in_both: dict[InstanceId, None] = {}
            further: list[tuple[InstanceId, int, bool]] = []
            for instance, tier in nearest.items():
                if tier != Tier.HBM:
                    further.append((instance, tier, instance in readable))
                elif instance in readable:
                    in_both[instance] = None
                else:
                    in_hbm[instance] = None
            group = self.groups[holders] = in_hbm, in_both, further
        return group

    def _forget_groups(self) -> None:
        self.groups.clear()
        self._num_grouped = 0


def compare(index: HolderIndex, member: Holder | None, snapshot: Snapshot) -> AuditResult:
    """Compare a member's blocks in `index` with its snapshot, or with a part of it. Pure."""
    chains = [chain for chain in snapshot.chains if chain.tier < NUM_TIERS]
    reported = sum(len(chain.keys) for chain in chains)
    if member is None:
        return AuditResult(0, reported, 0, snapshot.sequence)
    held = sum(index.held[number] for number in member.numbers)
    both = sum(index.num_held(1 << member.numbers[one.tier], one.keys) for one in chains)
    return AuditResult(held, reported, both, snapshot.sequence - member.sequence)
