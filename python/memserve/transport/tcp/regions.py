"""The regions of this process as `tcp` sends from and receives into them, and the rows that name them.

A row is (region id, offset, number of bytes). One alone is a tuple: the dozen array operations that
many copies share cost a single copy more than its 64 KiB. Knows no peers and no sockets.
"""

from __future__ import annotations

import ctypes

import numpy as np

from memserve.transport.copies import Memory, Vectors, merge
from memserve.transport.regions import Int64s, Region, RegionTable

Row = tuple[int, int, int]
Rows = Int64s | Row
"""[n, 3], or one row."""


def rows_of(region_ids: Int64s, offsets: Int64s, lengths: Int64s) -> Rows:
    """The rows with these columns."""
    if len(lengths) == 1:
        return region_ids.item(0), offsets.item(0), lengths.item(0)
    return np.stack((region_ids, offsets, lengths), axis=1)


def first_words(rows: Rows) -> Int64s | tuple[int]:
    """The first word of each row."""
    return (rows[0],) if isinstance(rows, tuple) else rows[:, 0]


class OwnRegions(RegionTable):
    """A table that also keeps each region as a view, for the row that comes alone."""

    def __init__(self) -> None:
        super().__init__()
        self._views: dict[int, memoryview] = {}

    def add(self, region: Region) -> None:
        super().add(region)
        memory = (ctypes.c_ubyte * region.num_bytes).from_address(region.address)
        self._views[region.region_id] = memoryview(memory).cast("B")

    def remove(self, region_id: int) -> None:
        super().remove(region_id)
        del self._views[region_id]

    def memory(self, rows: Rows) -> Memory:
        """The bytes of these rows, one after the other. Raises OutOfBounds as `resolve` does."""
        if isinstance(rows, tuple):
            region_id, start, num_bytes = rows
            view = self._views.get(region_id)
            if view is not None and start >= 0 and 0 <= num_bytes <= len(view) - start:
                return view[start : start + num_bytes]
            rows = np.array([rows], np.int64)
        region_ids, offsets, lengths = rows.T
        return Vectors(*merge(self.resolve(region_ids, offsets, lengths), lengths))
