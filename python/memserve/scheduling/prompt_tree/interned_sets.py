"""Sets of holders, each stored once under a small id, so that a block stores only the id.

    ids      0    1        2          a holder is a bit; a set is an int of bits
    masks   {}   {a, b}   {a}

A million blocks have few distinct sets: a holder that leaves is removed from the sets, not from the
blocks. Two ids may then have equal sets; the id that is not canonical is stale, and its users have to
move. Knows no instances, tiers or blocks. Not thread-safe.
"""

from __future__ import annotations

EMPTY = 0
"""The id of the empty set."""


class InternedSets:
    """Interned sets with use counts. An unused set gives its id back."""

    __slots__ = ("_free", "_ids", "_uses", "masks", "sizes", "stale")

    def __init__(self) -> None:
        self.masks = [0]
        """The sets by id. Read only."""
        self.sizes = [0]
        """The sizes of the sets by id. Read only."""
        self.stale: set[int] = set()
        """Ids in use whose set has another, canonical id: `id_of` their mask. Read only."""
        self._uses = [0]
        self._ids = {0: EMPTY}
        self._free: list[int] = []

    def __len__(self) -> int:
        """The number of ids in use."""
        return len(self.masks) - len(self._free)

    def id_of(self, mask: int) -> int:
        """The canonical id of a set. A new id lasts until its use count returns to 0."""
        known = self._ids.get(mask)
        if known is not None:
            return known
        if self._free:
            new = self._free.pop()
            self.masks[new] = mask
            self.sizes[new] = mask.bit_count()
        else:
            new = len(self.masks)
            self.masks.append(mask)
            self.sizes.append(mask.bit_count())
            self._uses.append(0)
        self._ids[mask] = new
        return new

    def use(self, set_id: int, num_uses: int) -> None:
        """Add `num_uses`, which may be negative, to the use count of a set."""
        if set_id == EMPTY:
            return
        self._uses[set_id] += num_uses
        if not self._uses[set_id]:
            mask = self.masks[set_id]
            if set_id in self.stale:
                self.stale.remove(set_id)
            else:
                del self._ids[mask]
            self.masks[set_id] = 0
            self._free.append(set_id)

    def clear(self, bits: int) -> None:
        """Remove the holders `bits` from all sets. O(sets), independent of the number of blocks."""
        free = set(self._free)
        keep = ~bits
        self.masks = masks = [mask & keep for mask in self.masks]
        self.sizes = list(map(int.bit_count, masks))
        self._ids = ids = {0: EMPTY}
        self.stale = stale = set[int]()
        for set_id, mask in enumerate(masks):
            if set_id not in free and ids.setdefault(mask, set_id) != set_id:
                stale.add(set_id)


def members_of(mask: int) -> list[int]:
    """The numbers of the holders in a set, lowest first."""
    numbers = []
    while mask:
        lowest = mask & -mask
        numbers.append(lowest.bit_length() - 1)
        mask ^= lowest
    return numbers
