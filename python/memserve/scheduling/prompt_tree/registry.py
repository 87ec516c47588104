"""The instances of the cluster's prompt tree, and which holder in the tree is whose tier.

    place     0           1                  numbers of holders: HBM 2 x place, DRAM 2 x place + 1
    member    ann         bob                a place is taken again when its member has left

Knows no blocks. Loop thread only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memserve.core.block_addr import Tier
from memserve.core.ids import Epoch, InstanceId
from memserve.scheduling.prompt_tree.approximate import ApproximateCache
from memserve.scheduling.prompt_tree.interned_sets import members_of

TIERS = 2
"""HBM and DRAM. What is REMOTE is another instance's, and told by that one."""

_MAX_GROUPED = 1 << 16
"""Names that are remembered by the sets of holders that they are in."""

Group = tuple[dict[InstanceId, None], list[InstanceId]]
"""Instances whose HBM is in a set of holders, and those of whom only DRAM is."""


@dataclass(slots=True)
class Holder:
    """An instance. Its holders are numbers[Tier.HBM] and numbers[Tier.DRAM]."""

    instance: InstanceId
    epoch: Epoch | None
    numbers: tuple[int, ...]
    sequence: int = 0
    """The last event that is in the tree."""
    mirror: ApproximateCache | None = None
    """Of a worker that sends none."""

    @property
    def bits(self) -> int:
        """Of both its holders."""
        return sum(1 << number for number in self.numbers)


class HolderRegistry:
    """Members by name and by holder."""

    def __init__(self) -> None:
        self._members: dict[InstanceId, Holder] = {}
        self._places: list[Holder | None] = []
        self._groups: dict[int, Group] = {}
        self._num_grouped = 0

    def __iter__(self) -> Iterator[Holder]:
        return iter(self._members.values())

    def get(self, instance: InstanceId) -> Holder | None:
        return self._members.get(instance)

    def enter(self, instance: InstanceId, epoch: Epoch | None) -> Holder:
        """A new member, in a place of its own. It is not here yet."""
        place = self._places.index(None) if None in self._places else len(self._places)
        member = Holder(instance, epoch, tuple(range(place * TIERS, (place + 1) * TIERS)))
        self._places[place : place + 1] = [member]
        self._members[instance] = member
        return member

    def leave(self, member: Holder) -> None:
        """It is here; nobody holds anything by its numbers any more."""
        del self._members[member.instance]
        self._places[member.numbers[0] // TIERS] = None
        self._forget_groups()

    def of(self, holders: int) -> list[Holder]:
        """Whose the bits of a set are, once for each bit."""
        members = [self._places[number // TIERS] for number in members_of(holders)]
        return [member for member in members if member is not None]

    def group(self, holders: int) -> Group:
        """The same by tier. Remembered, as a few large sets come again and again; not to be changed."""
        group = self._groups.get(holders)
        if group is None:
            in_hbm: dict[InstanceId, None] = {}
            names: dict[InstanceId, None] = {}
            for number in members_of(holders):
                place, tier = divmod(number, TIERS)
                member = self._places[place]
                if member is not None:
                    names[member.instance] = None
                    if tier == Tier.HBM:
                        in_hbm[member.instance] = None
            self._num_grouped += len(names) + 8
            if self._num_grouped > _MAX_GROUPED:
                self._forget_groups()
            group = self._groups[holders] = in_hbm, [name for name in names if name not in in_hbm]
        return group

    def _forget_groups(self) -> None:
        self._groups.clear()
        self._num_grouped = 0
