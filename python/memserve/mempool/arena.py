"""DRAM for blocks: one sealed memfd, mapped once, cut into slots of equal size.

A neighbour may map the same file, a transport may register the one range: both stay as they are
when the arena is resized, which only moves the mark up to which the range has memory.

    [ resident: num_slots | room to grow: no memory, never touched ]     max_slots in all

Knows no keys and no states: who may touch a slot is the pool's business.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import weakref

from memserve.core.block_addr import MAX_SLOTS
from memserve.core.errors import ConfigError
from memserve.core.memory import free_memory_bytes

_ALIGNMENT = 64
_MOST_OF_FREE = 0.9
"""How much of the free memory one arena may take: the process itself has to live, too."""

_GIB = 1 << 30

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h; Python wraps only the allocating half
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)


class Arena:
    """`num_slots` slots of `slot_bytes` bytes, zeroed and resident from the start.

    Valid until `close`; views and addresses must not be used after it. Any thread; one resizes.
    """

    def __init__(
        self, block_bytes: int, num_slots: int, *, max_slots: int | None = None, free_bytes: int | None = None
    ) -> None:
        """Take the memory now, so that no later write can fail.

        `max_slots`: how far it can ever grow; by default not at all. `free_bytes`: what there is to
        take from; by default what the machine and the cgroups have.
        Raises ConfigError, with nothing taken, if that is not enough.
        """
        self.max_slots = num_slots if max_slots is None else max_slots
        if block_bytes < 1 or not 1 <= num_slots <= self.max_slots <= MAX_SLOTS:
            raise ConfigError(f"an arena has at least one slot of one byte, not {num_slots} of {block_bytes}")
        self.block_bytes = block_bytes
        self.num_slots = num_slots
        """Resident ones."""
        self.slot_bytes = -(-block_bytes // _ALIGNMENT) * _ALIGNMENT
        """From the start of one slot to that of the next: block_bytes, rounded up."""
        self.num_bytes = self.slot_bytes * self.max_slots
        """Of the file and the mapping: all slots that can ever be."""
        _check_room(self.slot_bytes * num_slots, free_bytes)
        self.fd = _sealed_file(self.num_bytes, self.slot_bytes * num_slots)
        """The memory as a file, for a neighbour to map. Size fixed by seals; owned by the arena."""
        self._close_file = weakref.finalize(self, os.close, self.fd)
        self._map = mmap.mmap(self.fd, self.num_bytes)
        self.memory = memoryview(self._map)
        """All `max_slots` slots in order; writable. Whoever keeps a view past `close` keeps the memory."""
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        """Of slot 0 in this process."""

    def resize(self, num_slots: int, *, free_bytes: int | None = None) -> None:
        """Have that many slots: take memory for more (zeroed), or give that of the last ones back.

        Nobody may use the slots that go. Address, file and mapping stay.
        Raises ConfigError, changing nothing, below 1, above `max_slots`, or if there is not enough memory.
        """
        self.check_size(num_slots)
        before, after = self.slot_bytes * self.num_slots, self.slot_bytes * num_slots
        if after > before:
            _check_room(after - before, free_bytes)
            _allocate(self.fd, before, after - before)
        elif after < before:
            _punch_hole(self.fd, after, before - after)
        self.num_slots = num_slots

    def check_size(self, num_slots: int) -> None:
        """Raises ConfigError if the arena can never have that many slots."""
        if not 1 <= num_slots <= self.max_slots:
            raise ConfigError(f"an arena of up to {self.max_slots} slots cannot have {num_slots}")

    def block(self, slot: int) -> memoryview:
        """The bytes of one block; writable. Raises IndexError if there is no such slot."""
        start = self.offset(slot)
        return self.memory[start : start + self.block_bytes]

    def offset(self, slot: int) -> int:
        """Of a slot in the file and from `address`. Raises IndexError if there is no such slot."""
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of {self.num_slots}")
        return slot * self.slot_bytes

    def close(self) -> None:
        """Give the memory back, at the latest when the last view of it is gone. Idempotent."""
        if self.fd < 0:
            return
        self._close_file()
        self.fd = -1
        try:
            self.memory.release()
            self._map.close()
        except BufferError:  # Someone still has a view: the mapping ends with it.
            del self.memory, self._map


def _check_room(num_bytes: int, free_bytes: int | None) -> None:
    free = free_memory_bytes() if free_bytes is None else free_bytes
    if num_bytes > free * _MOST_OF_FREE:
        raise ConfigError(
            f"a pool of {num_bytes / _GIB:.2f} GiB DRAM does not fit: {free / _GIB:.2f} GiB are free, "
            f"of which it may take {free * _MOST_OF_FREE / _GIB:.2f} GiB"
        )


def _sealed_file(num_bytes: int, resident_bytes: int) -> int:
    """A memfd of that size, the first part of it allocated, that nobody can grow or shrink."""
    fd = os.memfd_create("memserve-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        _allocate(fd, 0, resident_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except (OSError, ConfigError):
        os.close(fd)
        raise
    return fd


def _allocate(fd: int, start: int, num_bytes: int) -> None:
    """Raises ConfigError, with nothing allocated, if there is not that much memory."""
    try:
        os.posix_fallocate(fd, start, num_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise ConfigError(f"no memory for {num_bytes / _GIB:.2f} GiB more DRAM") from error
        raise


def _punch_hole(fd: int, start: int, num_bytes: int) -> None:
    """Give back the whole pages of a range, and zero the rest of it."""
    if _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, start, num_bytes):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
