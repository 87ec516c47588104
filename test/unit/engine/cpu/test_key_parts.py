"""The plan of keys attended in place, gathered, and gathered together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memserve.engine.cpu.key_parts import (
    GATHERED_TOKENS,
    MAX_RUNS,
    MIN_RUN_TOKENS,
    KeyRun,
    find_runs,
    group_pieces,
    plan_decode,
    split_keys,
)

NO_SLOTS = torch.empty(0, dtype=torch.int64)
LONG = MIN_RUN_TOKENS

lengths_of_runs = st.lists(st.integers(1, 3 * MIN_RUN_TOKENS), max_size=8)


def slots_in_runs(lengths: Sequence[int], first: int = 0) -> Tensor:
    """Slots that lie in runs of `lengths`, backwards in the pool, from slot `first` on."""
    runs = [torch.arange(length) + first + 10_000 * at for at, length in enumerate(lengths)]
    return torch.cat([NO_SLOTS, *runs[::-1]])


def slots_of(run: KeyRun) -> Tensor:
    return torch.arange(run.slot, run.slot + run.tokens)


def test_find_runs_finds_adjacent_slots():
    slots = [
        torch.cat([torch.arange(500, 500 + LONG), torch.arange(100, 110), torch.arange(900, 901 + LONG)]),
        NO_SLOTS,
        torch.arange(901 + LONG, 900 + 2 * LONG),  # continues the first request's run, but is too short
        torch.arange(7, 7 + LONG),
    ]
    first = [KeyRun(0, 500, LONG), KeyRun(LONG + 10, 900, LONG + 1)]
    assert find_runs(slots) == [first, [], [], [KeyRun(0, 7, LONG)]]
    assert find_runs(slots[3:]) == [[KeyRun(0, 7, LONG)]]
    assert find_runs([NO_SLOTS]) == [[]]
    assert find_runs([]) == []


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of_runs, queries=st.sampled_from([1, 16, 64, 1000]))
def test_split_keys_covers_every_slot_once(lengths, queries):
    slots = slots_in_runs(lengths)
    [parts] = split_keys([slots], [queries])
    found = torch.cat([NO_SLOTS, *map(slots_of, parts.runs), *parts.pieces])
    assert torch.equal(found.sort().values, slots.sort().values)
    assert len(parts.runs) <= MAX_RUNS
    assert all(run.tokens >= max(LONG, queries) for run in parts.runs)


def test_split_keys_makes_fewer_parts_for_more_queries():
    slots = slots_in_runs([LONG] * 3 + [20] * 100)
    [few], [many] = split_keys([slots], [1]), split_keys([slots], [2000])
    assert (len(few.runs), [len(piece) for piece in few.pieces]) == (
        3,
        [GATHERED_TOKENS, 2000 - GATHERED_TOKENS],
    )
    assert (len(many.runs), [len(piece) for piece in many.pieces]) == (0, [len(slots)])


def test_group_pieces_gathers_pieces_of_similar_length_together():
    lengths = [3, GATHERED_TOKENS, 100, 2, 90]
    gathers = list(group_pieces([(at, torch.arange(n) + 5000 * at) for at, n in enumerate(lengths)]))
    assert [gather.requests.tolist() for gather in gathers] == [[1], [2, 4, 0, 3]]
    alone, together = gathers
    assert alone.mask is None
    assert torch.equal(alone.slots, torch.arange(GATHERED_TOKENS) + 5000)
    assert together.mask.shape == (4, 1, 1, 100)
    kept = together.slots.view(4, 100)[together.mask.view(4, 100) == 0]
    assert kept.tolist() == [at * 5000 + slot for at in (2, 4, 0, 3) for slot in range(lengths[at])]
    padding = together.slots.view(4, 100)[:, -1]
    assert padding.tolist() == [10_099, 20_000, 0, 15_000]  # only slots of the request itself


@settings(max_examples=60, deadline=None)
@given(batch=st.lists(lengths_of_runs.filter(len), min_size=1, max_size=5))
def test_decode_plan_covers_every_slot_of_each_request_once(batch):
    slots = [slots_in_runs(lengths, 100_000 * at) for at, lengths in enumerate(batch)]
    plan = plan_decode(slots)
    parts = [(request, slots_of(run)) for request, run in plan.runs]
    for gather in plan.gathers:
        rows = gather.slots.view(len(gather.requests), -1)
        seen = (
            torch.ones_like(rows, dtype=torch.bool) if gather.mask is None else gather.mask.view_as(rows) == 0
        )
        assert rows.numel() <= GATHERED_TOKENS
        parts += [(at, row[own]) for at, row, own in zip(gather.requests.tolist(), rows, seen, strict=True)]
    columns = [list(range(len(slots)))] if plan.columns is None else plan.columns.tolist()
    for request, own in enumerate(slots):
        mine = [parts[column[request]] for column in columns if column[request] < len(parts)]
        assert {owner for owner, _ in mine} == {request}
        assert torch.equal(torch.cat([part for _, part in mine]).sort().values, own.sort().values)


def test_decode_plan_gathers_short_requests_once():
    plan = plan_decode([slots_in_runs([length], 1000 * length) for length in (33, 15, 16)])
    assert (plan.runs, len(plan.gathers)) == ((), 1)


def test_decode_plan_of_single_parts_needs_no_merge():
    assert plan_decode([slots_in_runs([LONG]), slots_in_runs([LONG + 1])]).columns is None
    assert plan_decode([slots_in_runs([20])]).columns is None
