import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.errors import OutOfBounds
from memserve.transport.regions import MAX_REGIONS, AddressMap, Region, RegionTable


def int64s(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_a_region_that_was_removed_is_refused_after_its_row_is_used_again() -> None:
    table = RegionTable()
    table.add(Region(5, 1000, 10))
    table.remove(5)
    table.add(Region(5 + MAX_REGIONS, 2000, 10))
    with pytest.raises(OutOfBounds):
        table.resolve(int64s(5), int64s(0), int64s(1))
    assert table.resolve(int64s(5 + MAX_REGIONS), int64s(3), int64s(7)).tolist() == [2003]


def test_ids_are_not_given_twice() -> None:
    table = RegionTable()
    seen = set()
    for _ in range(2 * MAX_REGIONS):
        region = Region(table.next_id(), 4096, 1)
        seen.add(region.region_id)
        table.add(region)
        table.remove(region.region_id)
    assert len(seen) == 2 * MAX_REGIONS


def test_full_region_table_raises() -> None:
    table = RegionTable()
    for _ in range(MAX_REGIONS):
        table.add(Region(table.next_id(), 4096, 1))
    with pytest.raises(OutOfBounds, match="registered already"):
        table.next_id()


@pytest.mark.parametrize("region", [Region(1, 0, 5), Region(1, 4096, 0), Region(-1, 4096, 5)])
def test_region_table_refuses_ranges_that_are_no_memory(region: Region) -> None:
    with pytest.raises(OutOfBounds):
        RegionTable().add(region)


def test_removing_an_unregistered_region_raises() -> None:
    table = RegionTable()
    table.add(Region(1, 4096, 5))
    for region_id in (0, 2, -1, 1 + MAX_REGIONS):
        with pytest.raises(OutOfBounds):
            table.remove(region_id)
    assert list(table) == [Region(1, 4096, 5)]


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    gap=st.integers(0, 3),
    address=st.integers(0, 600),
    length=st.integers(0, 60),
)
def test_locate_and_resolve_undo_each_other(sizes: list[int], gap: int, address: int, length: int) -> None:
    regions, end = [], 100
    for number, size in enumerate(sizes, start=1):
        regions.append(Region(number, end, size))
        end += size + gap
    table = RegionTable()
    for region in regions:
        table.add(region)
    inside = any(
        region.address <= address and address + length <= region.address + region.num_bytes
        for region in regions
    )
    ids_and_offsets = None
    try:
        ids_and_offsets = AddressMap(regions[::-1]).locate(int64s(address), int64s(length))
    except OutOfBounds:
        # An empty range right behind a region may count as inside or as outside of it.
        assert not inside or length == 0
    if ids_and_offsets is not None:
        assert inside
        assert table.resolve(*ids_and_offsets, int64s(length)).tolist() == [address]


@pytest.mark.parametrize(
    ("address", "num_bytes", "overlaps"),
    [(90, 10, False), (90, 11, True), (105, 1, True), (110, 10, False), (119, 2, True), (130, 5, False)],
)
def test_address_map_detects_overlapping_ranges(address: int, num_bytes: int, overlaps: bool) -> None:
    memory = AddressMap([Region(1, 100, 10), Region(2, 120, 10)])
    assert memory.overlaps(address, num_bytes) is overlaps


def test_empty_address_map_locates_nothing() -> None:
    memory = AddressMap([])
    assert memory.at(1) is None
    assert not memory.overlaps(1, 10)
    with pytest.raises(OutOfBounds):
        memory.locate(int64s(1), int64s(1))
