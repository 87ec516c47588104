"""Allocator against a dict of states, and its refusals."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.errors import BlockStateError, InvariantViolated
from memserve.mempool.allocator import CACHED, FREE, PRIVATE, RESERVED, RETIRED, Allocator, Slots, SlotState

states = st.sampled_from([state for state in SlotState if state is not RETIRED])
moves = st.tuples(st.lists(st.integers(-1, 6), max_size=4), states, states)


def array(slots: list[int]) -> Slots:
    return np.array(slots, np.int64)


@given(st.lists(st.one_of(st.integers(0, 6), moves), max_size=20))
def test_allocator_states_equal_those_of_a_dict(
    steps: list[int | tuple[list[int], SlotState, SlotState]],
) -> None:
    allocator = Allocator(6, 6)
    model = dict.fromkeys(range(6), FREE)
    for step in steps:
        if isinstance(step, int):
            free = [slot for slot in model if model[slot] is FREE]
            if step > len(free):
                with pytest.raises(InvariantViolated):
                    allocator.take(step, PRIVATE)
                continue
            slots = allocator.take(step, PRIVATE).tolist()
            assert len(slots) == len(set(slots) & set(free)) == step
            model |= dict.fromkeys(slots, PRIVATE)
        else:
            slots, before, after = step
            if before is FREE:  # only `take` does that
                continue
            if len(set(slots)) == len(slots) and all(model.get(slot) is before for slot in slots):
                allocator.move(array(slots), before, after)
                model |= dict.fromkeys(slots, after)
            else:
                with pytest.raises(BlockStateError):
                    allocator.move(array(slots), before, after)
        assert {slot: allocator.state(slot) for slot in model} == model
        assert Counter(model.values()) == Counter({one: allocator.count(one) for one in SlotState})


@pytest.mark.parametrize(
    ("slots", "says"),
    [
        ([0, 0], "named twice"),
        ([0, 9], "another pool"),
        ([-1], "another pool"),
        ([0, 2], "FREE, not PRIVATE"),
    ],
)
def test_allocator_errors_name_the_reason(slots: list[int], says: str) -> None:
    allocator = Allocator(3, 3)
    allocator.take(2, PRIVATE)
    with pytest.raises(BlockStateError, match=says):
        allocator.move(array(slots), PRIVATE, CACHED)
    assert allocator.count(PRIVATE) == 2
    assert allocator.count(RESERVED) == 0
