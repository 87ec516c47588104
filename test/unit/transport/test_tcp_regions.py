from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.errors import OutOfBounds
from memserve.transport.copies import Vectors
from memserve.transport.regions import Region
from memserve.transport.tcp.regions import OwnRegions, rows_of

NUM_BYTES = 8
EDGES = st.one_of(st.integers(-2, NUM_BYTES + 2), st.sampled_from([-(2**63), 2**63 - 1]))


def column(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def refusal(find: Callable[[], object]) -> str:
    try:
        find()
    except OutOfBounds as error:
        return str(error)
    return ""


@given(st.sampled_from([-1, 0, 1, 2, 4097]), EDGES, EDGES)
def test_regions_of_one_copy_resolve_as_by_the_table(region_id: int, offset: int, num_bytes: int) -> None:
    memory = np.arange(NUM_BYTES, dtype=np.uint8)
    regions = OwnRegions()
    regions.add(Region(1, memory.ctypes.data, NUM_BYTES))
    columns = column(region_id), column(offset), column(num_bytes)
    refused = refusal(lambda: regions.resolve(*columns))
    assert refusal(lambda: regions.memory(rows_of(*columns))) == refused
    if not refused:
        found = regions.memory(rows_of(*columns))
        assert isinstance(found, memoryview)
        assert found == memory[offset : offset + num_bytes].data


def test_tcp_regions_find_a_region_until_it_is_removed() -> None:
    memory = np.zeros(NUM_BYTES, np.uint8)
    regions = OwnRegions()
    regions.add(Region(1, memory.ctypes.data, NUM_BYTES))
    found = regions.memory((1, 2, 3))
    assert isinstance(found, memoryview)
    found[:] = b"abc"
    assert memory.tobytes() == b"\0\0abc\0\0\0"
    regions.remove(1)
    with pytest.raises(OutOfBounds):
        regions.memory((1, 2, 3))


def test_many_copies_are_vectors() -> None:
    memory = np.zeros(NUM_BYTES, np.uint8)
    regions = OwnRegions()
    regions.add(Region(1, memory.ctypes.data, NUM_BYTES))
    found = regions.memory(rows_of(column(1, 1), column(0, 5), column(2, 1)))
    assert isinstance(found, Vectors)
    assert (len(found), found.nbytes) == (2, 3)
