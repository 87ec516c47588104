"""A batch of copies between two processes, as arrays, and the I/O vectors made of it.

A batch of 10,000 copies is five arrays, never 10,000 objects. Knows no transport.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from memserve.core.errors import OutOfBounds
from memserve.transport.regions import Int64s


class Copy(NamedTuple):
    """`num_bytes` bytes between an offset of a local region and an offset of a peer's region."""

    local_region: int
    local_offset: int
    remote_region: int
    remote_offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Copies:
    """Copies in order: where two overlap, the later one's bytes stay. int64 arrays of one length."""

    local_regions: Int64s
    local_offsets: Int64s
    remote_regions: Int64s
    remote_offsets: Int64s
    num_bytes: Int64s

    def __post_init__(self) -> None:
        shape = self.num_bytes.shape
        if len(shape) != 1 or any(column.shape != shape for column in self._columns()):
            shapes = {column.shape for column in self._columns()}
            raise OutOfBounds(f"a batch of copies needs five columns of one length, not {shapes}")

    @classmethod
    def of(cls, copies: Iterable[Copy]) -> Copies:
        """The batch of these copies; for few copies, and tests."""
        table = np.array(list(copies), np.int64).reshape(-1, 5)
        return cls(*np.ascontiguousarray(table.T))

    def __len__(self) -> int:
        return len(self.num_bytes)

    def part(self, start: int, stop: int) -> Copies:
        """Copies `start` to `stop` of this batch, without copying the arrays."""
        if start == 0 and stop >= len(self):
            return self
        return Copies(*(column[start:stop] for column in self._columns()))

    def _columns(self) -> tuple[Int64s, ...]:
        return (
            self.local_regions,
            self.local_offsets,
            self.remote_regions,
            self.remote_offsets,
            self.num_bytes,
        )


class Vectors:
    """The argument of scatter/gather system calls: [n, 2] int64 rows of (address, length), none empty.

    Consumed from the front: `take` moves past the bytes that a call has moved.
    """

    def __init__(self, addresses: Int64s, lengths: Int64s) -> None:
        self._rows = np.empty((len(lengths), 2), np.int64)
        self._rows[:, 0] = addresses
        self._rows[:, 1] = lengths
        self._pointer: int = self._rows.__array_interface__["data"][0]
        self._next = 0
        self.nbytes = int(lengths.sum())
        """Remaining bytes; named as in memoryview."""

    def __len__(self) -> int:
        return len(self._rows) - self._next

    @property
    def pointer(self) -> int:
        """Address of the first remaining row: a `struct iovec *`, valid while this object lives."""
        return self._pointer + 16 * self._next

    def first_bytes(self, count: int) -> int:
        """Bytes in the first `count` rows that are left."""
        if count == len(self):
            return self.nbytes
        return int(self._rows[self._next : self._next + count, 1].sum())

    def take(self, num_bytes: int) -> None:
        """Move past the first `num_bytes` bytes."""
        self.nbytes -= num_bytes
        if not self.nbytes:
            self._next = len(self._rows)
            return
        ends = np.cumsum(self._rows[self._next :, 1])
        done = int(np.searchsorted(ends, num_bytes, side="right"))
        into = num_bytes - (int(ends[done - 1]) if done else 0)
        self._next += done
        if into:
            self._rows[self._next, 0] += into
            self._rows[self._next, 1] -= into


Memory = Vectors | memoryview
"""Bytes to send or to fill: many ranges, or one."""


def merge_pairs(local: Int64s, remote: Int64s, lengths: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """The same copies; copies adjacent at both ends are joined, empty ones left out."""
    if not lengths.all():
        kept = lengths != 0
        local, remote, lengths = local[kept], remote[kept], lengths[kept]
    if len(lengths) < 2:
        return local, remote, lengths
    ends = lengths[:-1]
    starts_anew = (local[1:] != local[:-1] + ends) | (remote[1:] != remote[:-1] + ends)
    if starts_anew.all():
        return local, remote, lengths
    first = np.flatnonzero(np.concatenate(([True], starts_anew)))
    return local[first], remote[first], np.add.reduceat(lengths, first)


def merge(addresses: Int64s, lengths: Int64s) -> tuple[Int64s, Int64s]:
    """One end of a stream of copies; adjacent ranges are joined, empty ones left out."""
    merged, _, merged_lengths = merge_pairs(addresses, addresses, lengths)
    return merged, merged_lengths
