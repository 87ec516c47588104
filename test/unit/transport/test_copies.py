import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.errors import OutOfBounds
from memserve.transport.copies import Copies, Copy, Vectors, merge, merge_pairs

PAIRS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 6)), max_size=12)


def replay(copies: list[tuple[int, int, int]]) -> bytes:
    source, target = bytes(range(64)), bytearray(64)
    for start, to, length in copies:
        target[to : to + length] = source[start : start + length]
    return bytes(target)


@given(PAIRS)
def test_merged_copies_do_the_same(copies: list[tuple[int, int, int]]) -> None:
    columns = np.array(copies, np.int64).reshape(-1, 3).T
    merged = merge_pairs(*np.ascontiguousarray(columns))
    rows = list(zip(*(column.tolist() for column in merged), strict=True))
    assert replay(rows) == replay(copies)
    assert all(length > 0 for _, _, length in rows)


def test_neighbours_become_one_copy() -> None:
    starts = np.array([0, 10, 20, 40, 50], np.int64)
    lengths = np.full(5, 10, np.int64)
    assert [column.tolist() for column in merge(starts, lengths)] == [[0, 40], [30, 20]]
    apart = starts + np.array([0, 0, 5, 5, 5])
    assert merge_pairs(starts, apart, lengths)[2].tolist() == [20, 10, 20]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_vectors_can_be_taken_byte_by_byte(lengths: list[int], data: st.DataObject) -> None:
    addresses = np.arange(len(lengths), dtype=np.int64) * 100
    vectors = Vectors(addresses, np.array(lengths, np.int64))
    everything = [
        100 * row + byte for row, length in enumerate(lengths) for byte in range(length)
    ]  # fmt: skip
    taken = 0
    while len(vectors):
        assert vectors.nbytes == len(everything) - taken
        address, length = (ctypes.c_int64 * 2).from_address(vectors.pointer)
        assert everything[taken] == address
        assert everything[taken : taken + length] == list(range(address, address + length))
        assert vectors.first_bytes(1) == length
        step = data.draw(st.integers(1, vectors.nbytes))
        vectors.take(step)
        taken += step
    assert taken == len(everything)


def test_columns_of_different_lengths_are_refused() -> None:
    one, two = np.zeros(1, np.int64), np.zeros(2, np.int64)
    with pytest.raises(OutOfBounds):
        Copies(one, one, one, one, two)


def test_part_of_copies_is_a_slice_of_the_batch() -> None:
    copies = Copies.of([Copy(1, i, 2, i, 1) for i in range(5)])
    assert copies.part(0, 9) is copies
    assert copies.part(1, 3).local_offsets.tolist() == [1, 2]
    assert len(Copies.of([])) == 0
