"""Sets of holders, each kept once and named by a small number, so that a block stores only that number.

    ids      0    1        2          a holder is a bit; a set is an int of bits
    masks   {}   {a, b}   {a}

Of a million blocks few have sets of their own: whoever leaves is taken out of the sets, not of the
blocks. Two ids may then name equal sets; the one that is not canonical is stale, and its users are to
move. Knows no instances, tiers or blocks. Not thread-safe.
"""

from __future__ import annotations

EMPTY = 0
"""The id of the set of nobody."""


class InternedSets:
    """Interned sets, counted by use. A set that nothing uses any more gives its id back."""

    __slots__ = ("_free", "_ids", "_uses", "masks", "sizes", "stale")

    def __init__(self) -> None:
        self.masks = [0]
        """By id. For reading."""
        self.sizes = [0]
        """How many are in each set, by id. For reading."""
        self.stale: set[int] = set()
        """Ids in use whose set has another, canonical id: `id_of` their mask. For reading."""
        self._uses = [0]
        self._ids = {0: EMPTY}
        self._free: list[int] = []

    def __len__(self) -> int:
        """Ids in use."""
        return len(self.masks) - len(self._free)

    def id_of(self, mask: int) -> int:
        """The canonical id of a set. A new one lasts until its uses have come and gone."""
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
        """So many more (or fewer, if negative) blocks have this set."""
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
        """Nobody of `bits` is in any set any more. O(sets), however many blocks there are."""
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
    """The numbers of the bits of a set, lowest first."""
    numbers = []
    while mask:
        lowest = mask & -mask
        numbers.append(lowest.bit_length() - 1)
        mask ^= lowest
    return numbers
