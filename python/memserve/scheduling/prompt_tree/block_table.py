"""The blocks of the prompt tree in columns, and the order in which their tails are forgotten.

    slot    0 (before every prompt)   1    2    3   ...     a block's number in every column
    key                               k0   k1   k2          parent, first child, siblings, set, last use

The only objects per block are its key and its slot number in a dict, which the garbage collector never
visits: ten million `Node`s of `core.block_tree` would stop the event loop for seconds.
Slot 0 is the parent of every root and holds no block, so an unknown key can be read as slot 0.
Knows no holders: a block has the id of a set of holders. Not thread-safe.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator, Sequence

from memserve.core.block_keys import KEY_BYTES, BlockKey

TOP = 0
"""The slot before every prompt."""

_SLOT_BITS = 32


class BlockTable:
    """Prefix-closed blocks by key. Callers may read the columns and write `sets`."""

    __slots__ = (
        "_free", "_keys", "_previous", "_queue", "_queued", "_tick", "_used",
        "children", "index", "parents", "sets", "siblings",
    )  # fmt: skip

    def __init__(self, *, with_order: bool) -> None:
        """`with_order`: maintain the order for `oldest_tail`."""
        self.index: dict[BlockKey, int] = {}
        self.sets = array("I", [0])
        self.parents = array("I", [0])
        self.children = array("I", [0])
        """The newest child of each block."""
        self.siblings = array("I", [0])
        """The next older child of the same parent."""
        self._previous = array("I", [0])
        self._used = array("Q", [0])
        self._keys = bytearray(KEY_BYTES)
        self._free: list[int] = []
        self._tick = 0
        # At most one entry per slot: its tick, which may be older than the slot's last use, and the slot.
        self._queue: list[int] = []
        self._queued = bytearray(1) if with_order else None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_slots(self) -> int:
        """The number of rows of the columns."""
        return len(self.sets)

    def key_of(self, slot: int) -> BlockKey:
        """The key of the block in a slot."""
        return BlockKey(bytes(self._keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES]))

    def children_of(self, slot: int) -> Iterator[int]:
        """The children of a block. A child may be removed once it has been yielded."""
        child = self.children[slot]
        while child:
            following = self.siblings[child]
            yield child
            child = following

    def add(self, keys: Sequence[BlockKey], parent: int, set_id: int) -> None:
        """Add a chain of new blocks below `parent`, all with one set. At least one key; none is known yet."""
        num = len(keys)
        self._tick += 1
        if len(self._free) >= num:
            slots = self._free[-num:]
            del self._free[-num:]
            self._fill(keys, slots, parent, set_id)
            top, last = slots[0], slots[-1]
        else:
            top = self.num_slots
            last = top + num - 1
            self.index.update(zip(keys, range(top, last + 1), strict=True))
            self._keys += b"".join(keys)
            self.sets += array("I", [set_id]) * num
            self.parents.append(parent)
            self.parents.extend(range(top, last))
            self.children.extend(range(top + 1, last + 1))
            self.children.append(0)
            zeros = bytes(4 * num)
            self.siblings.frombytes(zeros)
            self._previous.frombytes(zeros)
            self._used += array("Q", [self._tick]) * num
            if self._queued is not None:
                self._queued += bytes(num)
        sibling = self.children[parent]
        if sibling:
            self.siblings[top] = sibling
            self._previous[sibling] = top
        self.children[parent] = top
        self._offer(last)

    def remove(self, slot: int, key: BlockKey) -> int:
        """Remove a leaf; returns its parent, which inherits its last use."""
        del self.index[key]
        after, before, parent = self.siblings[slot], self._previous[slot], self.parents[slot]
        if after:
            self._previous[after] = before
            self.siblings[slot] = 0
        if before:
            self.siblings[before] = after
            self._previous[slot] = 0
        else:
            self.children[parent] = after
        self.sets[slot] = 0
        self._free.append(slot)
        if self._queued is not None and parent:
            used = self._used
            if used[slot] > used[parent]:
                used[parent] = used[slot]
            if not after and not self.children[parent]:
                self._offer(parent)
        return parent

    def use(self, slot: int) -> None:
        """Record a use of a block, and thereby of all blocks before it."""
        self._tick += 1
        self._used[slot] = self._tick

    def oldest_tail(self) -> int:
        """The least recently used leaf; TOP if there is no block."""
        queue, queued, used = self._queue, self._queued, self._used
        assert queued is not None
        mask = (1 << _SLOT_BITS) - 1
        while queue:
            entry = queue[0]
            slot = entry & mask
            if self.children[slot] or not self._is_here(slot):
                queued[slot] = 0
                heapq.heappop(queue)
            elif entry >> _SLOT_BITS != used[slot]:
                heapq.heapreplace(queue, used[slot] << _SLOT_BITS | slot)
            else:
                return slot
        return TOP

    def _is_here(self, slot: int) -> bool:
        return self.index.get(self.key_of(slot)) == slot

    def _offer(self, slot: int) -> None:
        """Queue a block that has become a leaf."""
        if self._queued is not None and not self._queued[slot]:
            self._queued[slot] = 1
            heapq.heappush(self._queue, self._used[slot] << _SLOT_BITS | slot)

    def _fill(self, keys: Sequence[BlockKey], slots: Sequence[int], parent: int, set_id: int) -> None:
        """Fill reused slots as `add` does, except for the siblings of the first block."""
        self.index.update(zip(keys, slots, strict=True))
        above = parent
        for key, slot in zip(keys, slots, strict=True):
            self._keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES] = key
            self.sets[slot] = set_id
            self.parents[slot] = above
            self._used[slot] = self._tick
            if above != parent:
                self.children[above] = slot
            above = slot
        self.children[above] = 0
