"""The holders of each block. Holders have prefixes, so that along a prompt the holders become fewer.

    prompt     k0   k1   k2   k3   k4   k5
    set id      7    7    7    2    2    0       found by doubling and bisection, not block by block

A holder is the number of its bit in the sets. Its blocks are prefix-closed, whatever it reports: a chain
whose parent it does not hold is rejected, and removing a block removes its descendants.
Knows no instances, tiers, events or clocks. Not thread-safe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from memserve.core.block_keys import KEY_BYTES, BlockKey
from memserve.scheduling.prompt_tree.block_table import TOP, BlockTable
from memserve.scheduling.prompt_tree.interned_sets import EMPTY, InternedSets, members_of

SWEEP_SLOTS = 256
"""Slots swept per change after a holder has left."""


class HolderIndex:
    """The blocks and their holders."""

    def __init__(self, max_sets: int | None) -> None:
        """`max_sets`: distinct sets of holders that `forget_until` keeps; None: it is never called."""
        self._max_sets = max_sets
        self._table = BlockTable(with_order=max_sets is not None)
        self._sets = InternedSets()
        self.held: Counter[int] = Counter()
        """The number of blocks of each holder."""
        self._unswept = 0
        """Slots below this may have no holder since `clear`, or a stale set."""

    def __len__(self) -> int:
        """The number of blocks in memory; a few of them may have no holder any more."""
        return len(self._table)

    @property
    def num_sets(self) -> int:
        """The number of distinct sets of holders, the empty set included."""
        return len(self._sets)

    def store(self, holder: int, parent: BlockKey | None, keys: Sequence[BlockKey]) -> int:
        """Store `keys`, a chain below `parent`, for a holder; returns how many, from the front, it has now.

        Fewer than all if the rest are not keys, not a chain, or contradict the parents of known keys.
        """
        table, bit, num_keys = self._table, 1 << holder, len(keys)
        above = TOP
        if parent is not None:
            above = table.index.get(parent, TOP)
            if not self._sets.masks[table.sets[above]] & bit:
                return 0
        slots = list(map(table.index.get, keys))
        num_known = slots.index(None) if None in slots else num_keys
        known = [slot for slot in slots[:num_known] if slot is not None]
        expected = [above, *known]
        if list(map(table.parents.__getitem__, known)) != expected[:-1]:
            wrong = next(i for i, slot in enumerate(known) if table.parents[slot] != expected[i])
            self._mark(holder, known[:wrong])
            return wrong
        self._mark(holder, known)
        end = num_keys
        if slots.count(None) != num_keys - num_known:
            end = next(i for i in range(num_known, num_keys) if slots[i] is not None)
        new = keys[num_known:end]
        if not new:
            return end
        if set(map(len, new)) != {KEY_BYTES} or len(set(new)) != len(new):
            return num_known
        set_id = self._sets.id_of(bit)
        self._sets.use(set_id, len(new))
        table.add(new, expected[-1], set_id)
        self.held[holder] += len(new)
        return end

    def remove(self, holder: int, keys: Sequence[BlockKey]) -> None:
        """Remove blocks and their descendants from a holder."""
        table, sets, bit = self._table, self._sets, 1 << holder
        masks, get, set_of, children = sets.masks, table.index.get, table.sets, table.children
        removed, run = 0, 0
        last, changed = -1, EMPTY  # most keys have the same set as the key before: count them together
        for key in keys:
            slot = get(key, TOP)
            set_id = set_of[slot]
            if set_id != last:
                self._move(last, changed, run)
                last, run = -1, 0
                if not masks[set_id] & bit:
                    continue
                last, changed = set_id, sets.id_of(masks[set_id] ^ bit)
            child = children[slot]
            tail = not child or (set_of[child] == changed and not table.siblings[child])
            if not tail and (below := self._below(slot, bit)):
                self._move(last, changed, run)
                run = 0
                self.remove(holder, [table.key_of(one) for one in below])
                changed = sets.id_of(masks[set_id] ^ bit)
            run += 1
            removed += 1
            set_of[slot] = changed
            if changed == EMPTY and not children[slot]:
                parent = table.remove(slot, key)
                if not masks[set_of[parent]]:
                    self._remove_unheld(parent)
        self._move(last, changed, run)
        self.held[holder] -= removed

    def clear(self, holders: Sequence[int]) -> None:
        """Remove all blocks of the holders at once; `sweep` frees the memory later."""
        if any(self.held[holder] for holder in holders):
            self._sets.clear(sum(1 << holder for holder in holders))
            self._unswept = self._table.num_slots
        for holder in holders:
            del self.held[holder]

    def ends(self, keys: Sequence[BlockKey]) -> list[tuple[int, int]]:
        """(set of holders, how many of `keys`, from the front, they have), fewest blocks first.

        Holders of no block are in no set. For a holder in several sets the last one counts: where most
        holders end at one place, the whole set is returned, because it recurs. Counts as a use.
        O(changes x log n).
        """
        get, set_of = self._table.index.get, self._table.sets
        masks, sizes = self._sets.masks, self._sets.sizes
        num_keys = len(keys)
        result: list[tuple[int, int]] = []
        end = 0
        set_id = set_of[get(keys[0], TOP)] if num_keys else EMPTY
        last = set_of[get(keys[-1], TOP)] if num_keys else EMPTY
        holders = masks[set_id]
        while holders:
            if last == set_id:
                end = num_keys
            else:
                low, step = end, 1  # keys[low] has this set, keys[high] has another
                high = num_keys - 1
                while low + step < high:
                    if set_of[get(keys[low + step], TOP)] != set_id:
                        high = low + step
                        break
                    low += step
                    step += step
                while high - low > 1:
                    middle = (low + high) >> 1
                    if set_of[get(keys[middle], TOP)] == set_id:
                        low = middle
                    else:
                        high = middle
                end = high
            before, set_id = set_id, set_of[get(keys[end], TOP)] if end < num_keys else EMPTY
            left = holders & masks[set_id]
            if left != holders:
                most = sizes[before] > 2 * sizes[set_id]
                result.append((holders if most else holders ^ left, end))
                holders = left
        if end:
            self._table.use(get(keys[end - 1], TOP))
        return result

    def num_held(self, holders: int, keys: Sequence[BlockKey]) -> int:
        """How many of `keys` at least one of the holders has. O(n)."""
        get, set_of, masks = self._table.index.get, self._table.sets, self._sets.masks
        return sum(1 for key in keys if masks[set_of[get(key, TOP)]] & holders)

    def depth(self, holders: int, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the front, at least one of the holders has. O(log n)."""
        get, set_of, masks = self._table.index.get, self._table.sets, self._sets.masks
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high) >> 1
            if masks[set_of[get(keys[middle], TOP)]] & holders:
                low = middle + 1
            else:
                high = middle
        return low

    def digest(self, holder: int) -> tuple[int, int]:
        """The number of its blocks and the xor of the first 8 bytes of their keys. O(all blocks)."""
        set_of, masks, bit, xor, count = self._table.sets, self._sets.masks, 1 << holder, 0, 0
        for key, slot in self._table.index.items():
            if masks[set_of[slot]] & bit:
                xor ^= int.from_bytes(key[:8], "big")
                count += 1
        return count, xor

    def fits(self, max_blocks: int) -> bool:
        """Whether `forget_until` would forget nothing."""
        assert self._max_sets is not None
        return len(self._table.index) <= max_blocks and len(self._sets) <= self._max_sets

    def forget_until(self, max_blocks: int) -> list[tuple[BlockKey, int]]:
        """Forget the least recently used tails until the rest fits; returns (key, holders) of each."""
        table, sets = self._table, self._sets
        assert self._max_sets is not None
        forgotten: list[tuple[BlockKey, int]] = []
        while len(table) > max_blocks or len(sets) > self._max_sets:
            if self._unswept:
                self.sweep(SWEEP_SLOTS)
                continue
            slot = table.oldest_tail()
            if slot == TOP:
                break
            set_id = table.sets[slot]
            mask = sets.masks[set_id]
            key = table.key_of(slot)
            forgotten.append((key, mask))
            self.held.subtract(members_of(mask))
            sets.use(set_id, -1)
            table.remove(slot, key)
        return forgotten

    def sweep(self, num_slots: int) -> None:
        """Free blocks without holders among the next `num_slots` slots, and replace their stale sets."""
        table, sets = self._table, self._sets
        if not sets.stale:
            self._unswept = 0
        start = self._unswept
        self._unswept = stop = max(start - num_slots, 0)
        for slot in range(start - 1, stop - 1, -1):
            set_id = table.sets[slot]
            if set_id in sets.stale:
                if mask := sets.masks[set_id]:
                    table.sets[slot] = canonical = sets.id_of(mask)
                    sets.use(canonical, 1)
                    sets.use(set_id, -1)
                else:
                    self._remove_unheld(slot)

    def _move(self, before: int, after: int, num_blocks: int) -> None:
        """Count `num_blocks` blocks that change from one set to another."""
        if num_blocks:
            self._sets.use(after, num_blocks)
            self._sets.use(before, -num_blocks)

    def _mark(self, holder: int, slots: Sequence[int]) -> None:
        """Add a holder to known blocks that form a chain."""
        set_of, sets, bit, start = self._table.sets, self._sets, 1 << holder, 0
        for set_id, run in groupby(map(set_of.__getitem__, slots)):
            end = start + sum(1 for _ in run)
            mask = sets.masks[set_id]
            if not mask & bit:
                changed = sets.id_of(mask | bit)
                for slot in slots[start:end]:
                    set_of[slot] = changed
                self._move(set_id, changed, end - start)
                self.held[holder] += end - start
            start = end
        if slots:
            self._table.use(slots[-1])

    def _below(self, top: int, bit: int) -> list[int]:
        """The descendants of a block that the holder has, too; children before their parents."""
        table, masks = self._table, self._sets.masks
        found = [top]
        for slot in found:  # grows as it goes
            found += [child for child in table.children_of(slot) if masks[table.sets[child]] & bit]
        return found[:0:-1]

    def _remove_unheld(self, slot: int) -> None:
        """Remove a leaf without holders, and then its ancestors in the same way."""
        table, sets = self._table, self._sets
        while slot and not table.children[slot] and not sets.masks[table.sets[slot]]:
            sets.use(table.sets[slot], -1)
            slot = table.remove(slot, table.key_of(slot))
