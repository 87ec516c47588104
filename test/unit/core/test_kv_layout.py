"""Geometry, digest and copy plans of a block."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.kv_layout import KVLayout, Part, TransferMode

numbers = st.integers(1, 5)
layouts = st.builds(
    KVLayout,
    model=st.just("m"),
    num_layers=numbers,
    page_tokens=numbers,
    parts=st.lists(st.builds(Part, numbers, numbers), min_size=1, max_size=2).map(tuple),
    dtype=st.just("bfloat16"),
    dtype_bytes=st.sampled_from([1, 2, 4]),
)

LLAMA_13B = KVLayout("llama2-13b", 40, 16, (Part(40, 128),) * 2, "float16", 2)
LATENT = KVLayout("deepseek-v3", 61, 64, (Part(1, 576),), "bfloat16", 2)


def test_layout_sizes_equal_those_of_known_models() -> None:
    assert LLAMA_13B.block_bytes == 40 * 2 * 16 * 40 * 128 * 2
    assert LATENT.block_bytes == 61 * 64 * 576 * 2
    assert KVLayout("m", 2, 16, (Part(8, 192), Part(8, 128)), "f16", 2).part_bytes == (49152, 32768)


@given(layouts, st.sampled_from(TransferMode))
def test_copy_plans_cover_the_block_exactly_once(layout: KVLayout, mode: TransferMode) -> None:
    extents = [extent for call in layout.copy_plan(mode) for extent in zip(*call, strict=True)]
    end = 0
    for offset, length in extents:
        assert offset == end
        assert length > 0
        end += length
    assert end == layout.block_bytes


@given(layouts)
def test_copy_plans_have_the_numbers_of_calls_and_copies_of_the_paper(layout: KVLayout) -> None:
    counts = {mode: [len(call.offsets) for call in layout.copy_plan(mode)] for mode in TransferMode}
    parts = len(layout.parts)
    assert counts[TransferMode.BY_LAYER] == [parts] * layout.num_layers
    assert counts[TransferMode.BY_REQUEST] == [parts * layout.num_layers]
    assert counts[TransferMode.AGGREGATED] == [1]


@given(layouts)
def test_layout_offsets_equal_those_of_an_array(layout: KVLayout) -> None:
    offset = 0
    for layer in range(layout.num_layers):
        for part, part_bytes in enumerate(layout.part_bytes):
            assert layout.offset(layer, part) == offset
            offset += part_bytes


@pytest.mark.parametrize(("layer", "part"), [(-1, 0), (40, 0), (0, 2), (0, -1)])
def test_layout_refuses_offsets_outside_the_block(layer: int, part: int) -> None:
    with pytest.raises(IndexError):
        LLAMA_13B.offset(layer, part)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "llama2-13b@2"},
        {"num_layers": 41},
        {"page_tokens": 32},
        {"parts": (Part(40, 128), Part(40, 64))},
        {"dtype": "bfloat16"},
        {"dtype_bytes": 1},
        {"num_ranks": 2},
        {"num_ranks": 2, "rank": 1},
    ],
)
def test_layout_digest_depends_on_every_field(change: dict[str, object]) -> None:
    other = dataclasses.replace(LLAMA_13B, **change)
    assert other.digest != LLAMA_13B.digest
    assert len(other.digest) == 32
    assert dataclasses.replace(LLAMA_13B).digest == LLAMA_13B.digest


@pytest.mark.parametrize(
    "change", [{"num_layers": 0}, {"parts": ()}, {"parts": (Part(0, 1),)}, {"rank": 1}, {"dtype_bytes": 0}]
)
def test_layout_refuses_impossible_values(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a layout"):
        dataclasses.replace(LATENT, **change)


def test_layout_differences_name_each_field() -> None:
    here = KVLayout("m", 2, 16, (Part(2, 8),) * 2, "float32", 4)
    there = KVLayout("m", 2, 64, (Part(2, 8),) * 2, "bfloat16", 2)
    assert here.differences(here) == []
    assert here.differences(there) == [
        "page_tokens 16 here, 64 there",
        "dtype float32 here, bfloat16 there",
        "dtype_bytes 4 here, 2 there",
    ]
