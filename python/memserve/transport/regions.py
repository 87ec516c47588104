"""Registered byte ranges of one process, and the table that turns (region, offset) into an address.

Knows no peers, sockets or blocks: only numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memserve.core.errors import OutOfBounds

Int64s = npt.NDArray[np.int64]

MAX_REGIONS = 4096
"""Regions that one process can have registered at a time."""

_ID, _ADDRESS, _NUM_BYTES = range(3)
_FREE = -1


@dataclass(frozen=True, slots=True)
class Region:
    """`num_bytes` bytes at `address` of one process; the process keeps them mapped while registered."""

    region_id: int
    address: int
    num_bytes: int


class RegionTable:
    """The regions of one process: [MAX_REGIONS, 3] int64 rows of id, address, num_bytes.

    A region lives in row `id % MAX_REGIONS` and an id is never used twice, so a copy that names a
    removed region is refused, never applied to the region that took its row. Rows may lie in
    memory shared with other processes: a row's id is written last and taken first. Mutated by one
    thread at a time; resolved by any.
    """

    def __init__(self, rows: Int64s | None = None) -> None:
        """An empty table, or a view of `rows` that another table (maybe another process's) fills."""
        self._rows = empty_rows() if rows is None else rows
        self._last_id = 0

    def __iter__(self) -> Iterator[Region]:
        for row in self._rows[self._rows[:, _ID] != _FREE].tolist():
            yield Region(*row)

    def next_id(self) -> int:
        """An id that was never used here. Raises OutOfBounds if MAX_REGIONS are registered."""
        for candidate in range(self._last_id + 1, self._last_id + 1 + MAX_REGIONS):
            if self._rows[candidate % MAX_REGIONS, _ID] == _FREE:
                return candidate
        raise OutOfBounds(f"{MAX_REGIONS} regions are registered already")

    def add(self, region: Region) -> None:
        """Make `region` resolvable. Raises OutOfBounds, changing nothing, if it is no range of memory."""
        if region.num_bytes <= 0 or region.address <= 0 or region.region_id < 0:
            raise OutOfBounds(f"not a range of memory: {region}")
        row = self._rows[region.region_id % MAX_REGIONS]
        if row[_ID] != _FREE:
            raise OutOfBounds(f"region {region.region_id} is registered, or its row is taken")
        row[_ADDRESS], row[_NUM_BYTES] = region.address, region.num_bytes
        row[_ID] = region.region_id
        self._last_id = max(self._last_id, region.region_id)

    def remove(self, region_id: int) -> None:
        """Refuse copies of this region from now on. Raises OutOfBounds if it is not registered."""
        row = self._rows[region_id % MAX_REGIONS]
        if region_id < 0 or row[_ID] != region_id:
            raise OutOfBounds(f"region {region_id} is not registered")
        row[_ID], row[_NUM_BYTES] = _FREE, -1

    def resolve(self, region_ids: Int64s, offsets: Int64s, lengths: Int64s) -> Int64s:
        """The address of each copy's first byte.

        Raises OutOfBounds if any copy, an empty one included, leaves its region.
        """
        rows = self._rows[region_ids % MAX_REGIONS]
        bad = (rows[:, _ID] != region_ids) | (offsets < 0) | (lengths < 0)
        bad |= lengths > rows[:, _NUM_BYTES] - offsets
        if bad.any():
            i = int(bad.argmax())
            raise OutOfBounds(
                f"copy {i}: {lengths[i]} bytes at offset {offsets[i]} of region {region_ids[i]}, "
                f"which has {rows[i, _NUM_BYTES] if rows[i, _ID] == region_ids[i] else 'no'} bytes here"
            )
        return np.asarray(rows[:, _ADDRESS] + offsets)


class AddressMap:
    """The inverse of a RegionTable: absolute addresses of a process to (region, offset). Immutable."""

    def __init__(self, regions: list[Region]) -> None:
        """`regions` in any order, none overlapping another."""
        ordered = sorted(regions, key=lambda region: region.address)
        self.regions = tuple(ordered)
        self._ids = np.array([region.region_id for region in ordered], np.int64)
        self._starts = np.array([region.address for region in ordered], np.int64)
        self._ends = self._starts + np.array([region.num_bytes for region in ordered], np.int64)

    def at(self, address: int) -> Region | None:
        """The region that begins at `address`, or None."""
        i = int(np.searchsorted(self._starts, address))
        return self.regions[i] if i < len(self.regions) and self.regions[i].address == address else None

    def overlaps(self, address: int, num_bytes: int) -> bool:
        """Whether any byte of the range belongs to a region."""
        i = int(np.searchsorted(self._ends, address, side="right"))
        return i < len(self.regions) and self.regions[i].address < address + num_bytes

    def locate(self, addresses: Int64s, lengths: Int64s) -> tuple[Int64s, Int64s]:
        """Region ids and offsets of the ranges. Raises OutOfBounds if one is not within one region."""
        if not len(self.regions):
            raise OutOfBounds("no memory is registered")
        index = np.searchsorted(self._starts, addresses, side="right") - 1
        bad = (index < 0) | (lengths < 0) | (lengths > self._ends[index] - addresses)
        if bad.any():
            i = int(bad.argmax())
            raise OutOfBounds(f"copy {i}: {lengths[i]} bytes at {addresses[i]:#x} are not registered memory")
        return self._ids[index], addresses - self._starts[index]


def empty_rows(buffer: memoryview | None = None) -> Int64s:
    """Rows of an empty table, in new memory or in the writable `buffer`."""
    shape = (MAX_REGIONS, 3)
    if buffer is None:
        rows = np.empty(shape, np.int64)
    else:
        rows = np.frombuffer(buffer, np.int64, count=MAX_REGIONS * 3).reshape(shape)
    rows[:] = _FREE
    return rows
