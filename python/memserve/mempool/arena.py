"""DRAM for blocks: one sealed memfd, mapped once, cut into slots of equal size.

A neighbour may map the same file, a transport may register the one range. Knows no keys and no
states: who may touch a slot is the pool's business.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os

from memserve.core.block_addr import MAX_SLOTS
from memserve.core.errors import ConfigError
from memserve.mempool.free_memory import free_memory_bytes

_ALIGNMENT = 64
_MOST_OF_FREE = 0.9
"""How much of the free memory one arena may take: the process itself has to live, too."""

_GIB = 1 << 30


class Arena:
    """`num_slots` slots of `slot_bytes` bytes, zeroed and resident from the start.

    Valid until `close`; views and addresses must not be used after it. Any thread.
    """

    def __init__(self, block_bytes: int, num_slots: int, *, free_bytes: int | None = None) -> None:
        """Take the memory now, so that no later write can fail.

        `free_bytes`: what there is to take from; by default what the machine and the cgroups have.
        Raises ConfigError, with nothing taken, if that is not enough.
        """
        if block_bytes < 1 or not 1 <= num_slots <= MAX_SLOTS:
            raise ConfigError(f"an arena has at least one slot of one byte, not {num_slots} of {block_bytes}")
        self.block_bytes = block_bytes
        self.num_slots = num_slots
        self.slot_bytes = -(-block_bytes // _ALIGNMENT) * _ALIGNMENT
        """From the start of one slot to that of the next: block_bytes, rounded up."""
        self.num_bytes = self.slot_bytes * num_slots
        _check_room(self.num_bytes, free_memory_bytes() if free_bytes is None else free_bytes)
        self.fd = _sealed_file(self.num_bytes)
        """The memory as a file, for a neighbour to map. Size fixed by seals; owned by the arena."""
        self._map = mmap.mmap(self.fd, self.num_bytes)
        self.memory = memoryview(self._map)
        """All slots in order; writable. Whoever keeps a view past `close` keeps the memory."""
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        """Of slot 0 in this process."""

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
        os.close(self.fd)
        self.fd = -1
        try:
            self.memory.release()
            self._map.close()
        except BufferError:  # Someone still has a view: the mapping ends with it.
            del self.memory, self._map


def _check_room(num_bytes: int, free_bytes: int) -> None:
    if num_bytes > free_bytes * _MOST_OF_FREE:
        raise ConfigError(
            f"a pool of {num_bytes / _GIB:.2f} GiB DRAM does not fit: {free_bytes / _GIB:.2f} GiB are free, "
            f"of which it may take {free_bytes * _MOST_OF_FREE / _GIB:.2f} GiB"
        )


def _sealed_file(num_bytes: int) -> int:
    """A memfd of that size, all of it allocated, that nobody can grow or shrink."""
    fd = os.memfd_create("memserve-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise ConfigError(f"no memory for a pool of {num_bytes / _GIB:.2f} GiB DRAM") from error
        raise
    return fd
