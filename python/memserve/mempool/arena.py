"""DRAM for blocks: one sealed memfd, mapped once, cut into slots of equal size.

Another process may map the same file, and a transport may register the one range: both stay valid when
the arena is resized, which only moves the mark up to which the range has memory.

    [ resident: num_slots | room to grow: no memory, never touched ]     max_slots in all

Knows no keys and no states: the pool decides which thread may use a slot.
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
"""Share of the free memory that one arena may take: the process itself needs memory, too."""

_GIB = 1 << 30

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h; Python wraps only the allocating half
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)


class Arena:
    """`num_slots` slots of `slot_bytes` bytes, zeroed and resident from the start.

    Valid until `close`; views and addresses must not be used after it. Any thread may use it; one thread
    at a time resizes it.
    """

    def __init__(
        self, block_bytes: int, num_slots: int, *, max_slots: int | None = None, free_bytes: int | None = None
    ) -> None:
        """Take the memory now, so that no later write can fail.

        `max_slots`: the largest size of a later `resize` (default: `num_slots`). `free_bytes`: memory that
        is free (default: what the machine and the cgroups have).
        Raises ConfigError, taking nothing, if that is not enough.
        """
        self.max_slots = num_slots if max_slots is None else max_slots
        if block_bytes < 1 or not 1 <= num_slots <= self.max_slots <= MAX_SLOTS:
            raise ConfigError(f"an arena has at least one slot of one byte, not {num_slots} of {block_bytes}")
        self.block_bytes = block_bytes
        self.num_slots = num_slots
        """Resident slots."""
        self.slot_bytes = -(-block_bytes // _ALIGNMENT) * _ALIGNMENT
        """Distance between the starts of two slots: block_bytes, rounded up."""
        self.num_bytes = self.slot_bytes * self.max_slots
        """Size of the file and of the mapping: `max_slots` slots."""
        _check_room(self.slot_bytes * num_slots, free_bytes)
        self.fd = _sealed_file(self.num_bytes, self.slot_bytes * num_slots)
        """The memory as a file, for another process to map. Seals fix its size; owned by the arena."""
        self._close_file = weakref.finalize(self, os.close, self.fd)
        self._map = mmap.mmap(self.fd, self.num_bytes)
        self.memory = memoryview(self._map)
        """All `max_slots` slots in order; writable. A view that outlives `close` keeps the memory."""
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        """Address of slot 0 in this process."""

    def resize(self, num_slots: int, *, free_bytes: int | None = None) -> None:
        """Change the number of slots: take memory for new ones (zeroed), or give that of the last ones back.

        No thread may use the slots that go. Address, file and mapping stay.
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
        """Raises ConfigError if the arena can never have `num_slots` slots."""
        if not 1 <= num_slots <= self.max_slots:
            raise ConfigError(f"an arena of up to {self.max_slots} slots cannot have {num_slots}")

    def block(self, slot: int) -> memoryview:
        """The bytes of one block; writable. Raises IndexError if there is no such slot."""
        start = self.offset(slot)
        return self.memory[start : start + self.block_bytes]

    def offset(self, slot: int) -> int:
        """Offset of a slot in the file and from `address`. Raises IndexError if there is no such slot."""
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of {self.num_slots}")
        return slot * self.slot_bytes

    def close(self) -> None:
        """Give the memory back, at the latest when its last view is gone. Idempotent."""
        if self.fd < 0:
            return
        self._close_file()
        self.fd = -1
        try:
            self.memory.release()
            self._map.close()
        except BufferError:  # A view is left: the mapping ends with it.
            del self.memory, self._map


def _check_room(num_bytes: int, free_bytes: int | None) -> None:
    free = free_memory_bytes() if free_bytes is None else free_bytes
    if num_bytes > free * _MOST_OF_FREE:
        raise ConfigError(
            f"a pool of {num_bytes / _GIB:.2f} GiB DRAM does not fit: {free / _GIB:.2f} GiB are free, "
            f"of which it may take {free * _MOST_OF_FREE / _GIB:.2f} GiB"
        )


def _sealed_file(num_bytes: int, resident_bytes: int) -> int:
    """A memfd of `num_bytes` bytes that cannot grow or shrink; its first part is allocated."""
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
    """Raises ConfigError, allocating nothing, if there is too little memory."""
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
