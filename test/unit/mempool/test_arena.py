"""The arena: size, memory and errors."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

import numpy as np
import pytest

from memserve.core.errors import ConfigError
from memserve.mempool.arena import Arena

GIB = 1 << 30


def test_arena_slots_are_disjoint_aligned_and_reachable_by_view_address_and_file() -> None:
    arena = Arena(100, 5)
    assert arena.slot_bytes == 128
    for slot in range(5):
        arena.block(slot)[:] = bytes([slot + 1]) * 100
    for slot in range(5):
        expected = bytes([slot + 1]) * 100
        assert arena.block(slot) == expected
        assert ctypes.string_at(arena.address + arena.offset(slot), 100) == expected
        assert os.pread(arena.fd, 100, arena.offset(slot)) == expected
    neighbour = mmap.mmap(arena.fd, arena.num_bytes)
    neighbour[arena.offset(2)] = 77
    assert arena.block(2)[0] == 77
    arena.close()


@pytest.mark.parametrize("slot", [-1, 5])
def test_arena_has_no_slot_beyond_its_ends(slot: int) -> None:
    with pytest.raises(IndexError):
        Arena(64, 5).block(slot)


def test_arena_file_cannot_be_resized() -> None:
    arena = Arena(64, 64)
    for size in (0, arena.num_bytes * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_arena_memory_is_allocated_before_first_use() -> None:
    arena = Arena(4096, 16)
    assert os.fstat(arena.fd).st_blocks * 512 >= arena.num_bytes


def test_arena_resize_takes_and_returns_memory_and_moves_nothing() -> None:
    arena = Arena(4096, 16, max_slots=64)
    place = (arena.address, arena.fd, arena.num_bytes)

    def resident() -> int:
        return os.fstat(arena.fd).st_blocks * 512 // 4096

    assert resident() == 16
    arena.block(3)[:] = b"x" * 4096
    arena.block(15)[:] = b"y" * 4096
    arena.resize(48)
    assert resident() == 48
    assert arena.block(47) == bytes(4096)
    arena.resize(4)
    assert resident() == 4
    arena.resize(64)
    assert (resident(), arena.num_slots) == (64, 64)
    assert arena.block(3) == b"x" * 4096
    assert arena.block(15) == bytes(4096), "returned memory reads as zeros"
    assert (arena.address, arena.fd, arena.num_bytes) == place


def test_arena_refuses_slots_beyond_its_size() -> None:
    arena = Arena(64, 2, max_slots=4)
    with pytest.raises(IndexError):
        arena.block(2)
    arena.resize(3)
    arena.block(2)[0] = 1
    arena.resize(1)
    with pytest.raises(IndexError):
        arena.block(1)
    arena.resize(4)
    assert arena.block(2)[0] == 0, "also within a page that stays resident"


def test_arena_resize_to_an_impossible_size_changes_nothing() -> None:
    arena = Arena(4096, 2, max_slots=8)
    for num_slots in (0, 9):
        with pytest.raises(ConfigError, match="up to 8"):
            arena.resize(num_slots)
    with pytest.raises(ConfigError, match="does not fit"):
        arena.resize(8, free_bytes=4096 * 6)
    assert (arena.num_slots, os.fstat(arena.fd).st_blocks * 512) == (2, 2 * 4096)


def test_arena_that_does_not_fit_reports_the_free_memory() -> None:
    with pytest.raises(ConfigError, match=r"3\.00 GiB DRAM does not fit: 2\.00 GiB are free"):
        Arena(GIB, 3, free_bytes=2 * GIB)
    with pytest.raises(ConfigError, match=r"may take 0\.90 GiB"):
        Arena(GIB, 1, free_bytes=GIB)


@pytest.mark.parametrize(("block_bytes", "num_slots"), [(0, 1), (1, 0), (1, 1 << 33)])
def test_arena_refuses_impossible_sizes(block_bytes: int, num_slots: int) -> None:
    with pytest.raises(ConfigError, match="at least one slot"):
        Arena(block_bytes, num_slots)


def test_arena_can_be_closed_twice_and_while_a_view_exists() -> None:
    arena = Arena(64, 2)
    view = arena.block(1)
    array = np.frombuffer(arena.memory, np.uint8)
    view[0] = 5
    arena.close()
    arena.close()
    assert view[0] == array[arena.slot_bytes] == 5
