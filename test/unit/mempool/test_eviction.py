"""Eviction policies as tables, and the queue ordered by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.mempool.eviction import (
    EVICTION_POLICIES,
    BlockUse,
    EvictionPolicy,
    EvictionQueue,
    cost_aware,
    lfu,
    lru,
)

uses = st.builds(BlockUse, st.integers(1, 10**9), st.integers(0, 10**6), st.integers(0, 10**5))


@pytest.mark.parametrize(
    ("ordering", "first", "then"),
    [
        (lru, BlockUse(1, 99, 0), BlockUse(2, 1, 0)),
        (lfu, BlockUse(9, 1, 0), BlockUse(1, 2, 0)),
        (lfu, BlockUse(1, 2, 0), BlockUse(2, 2, 0)),
        (cost_aware(), BlockUse(5, 1, 10), BlockUse(5, 1, 1000)),
        (cost_aware(), BlockUse(5, 1, 10), BlockUse(5, 9, 10)),
        (cost_aware(), BlockUse(5, 1, 10), BlockUse(9, 1, 10)),
        # 1 + uses: 3 against 2, but a half-life older: 1.5 against 2.
        (cost_aware(half_life_ticks=100), BlockUse(100, 2, 0), BlockUse(200, 1, 0)),
        # The same, but so deep that it costs twice as much.
        (cost_aware(100, attention_blocks=64), BlockUse(200, 1, 0), BlockUse(100, 2, 64)),
    ],
)
def test_eviction_policies_order_blocks(ordering: EvictionPolicy, first: BlockUse, then: BlockUse) -> None:
    assert ordering(first) < ordering(then)


@given(use=uses, later=st.integers(1, 1000), name=st.sampled_from(sorted(EVICTION_POLICIES)))
def test_a_use_never_lowers_the_value_of_a_block(use: BlockUse, later: int, name: str) -> None:
    ordering = EVICTION_POLICIES[name]
    assert ordering(BlockUse(use.last_used + later, use.uses + 1, use.depth)) >= ordering(use)


def drain(queue: EvictionQueue, values: dict[int, float]) -> list[int]:
    taken = []
    while (slot := queue.take(values.get)) is not None:
        taken.append(slot)
        del values[slot]
    return taken


@given(
    st.dictionaries(st.integers(0, 19), st.integers(0, 5)),
    st.dictionaries(st.integers(0, 19), st.integers(0, 5)),
)
def test_eviction_queue_takes_slots_in_the_order_of_their_current_values(
    before: dict[int, float], grown: dict[int, float]
) -> None:
    queue = EvictionQueue(20)
    for slot, value in before.items():
        queue.offer(slot, value)
        queue.offer(slot, value + 1)  # is in the queue once
    values = {slot: value + grown.get(slot, 0) for slot, value in before.items()}
    taken = drain(queue, dict(values))
    assert sorted(taken) == sorted(before)
    assert [values[slot] for slot in taken] == sorted(values.values())


def test_eviction_queue_forgets_a_pinned_slot_until_it_is_offered_again() -> None:
    queue = EvictionQueue(2)
    queue.offer(0, 1)
    assert queue.take(lambda slot: None) is None
    assert queue.take(lambda slot: 1) is None
    queue.offer(0, 1)
    assert queue.take(lambda slot: 1) == 0


def test_eviction_queue_uses_the_new_value_of_a_withdrawn_and_reused_slot() -> None:
    queue = EvictionQueue(2)
    queue.offer(0, 1)
    queue.withdraw(0)
    queue.offer(0, 9)
    queue.offer(1, 5)
    assert drain(queue, {0: 9, 1: 5}) == [1, 0]


def test_eviction_queue_drops_withdrawn_entries() -> None:
    queue = EvictionQueue(4)
    for turn in range(10_000):
        queue.offer(turn % 4, turn)
        queue.withdraw(turn % 4)
    assert len(queue._heap) < 200
