"""The computations of the micro, scale and overhead programs on their measurements."""

from __future__ import annotations

import numpy as np
import pytest

from bench_dram_hit import crossing
from bench_peers import MODES, PAGES, TOKENS, calls_of, layout_of
from bench_routing import Prompt
from memserve.core.kv_layout import TransferMode
from scale_check import trace_of
from scale_router import BUSY, largest_cluster


def test_dram_hit_crossing_is_the_share_from_which_all_pay() -> None:
    assert crossing({0.1: True, 0.5: True, 0.9: True}) == 0.1
    assert crossing({0.1: True, 0.5: False, 0.9: True}) == 0.9
    assert crossing({0.1: True, 0.5: True, 0.9: False}) == 1.0


@pytest.mark.parametrize("rate", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("each_us", [0.0, 2.5])
def test_largest_cluster_uses_the_allowed_share_of_a_core(rate: float, each_us: float) -> None:
    count = largest_cluster(rate, 900.0, each_us)

    def busy(instances: int) -> float:
        return instances * rate * (900.0 + each_us * instances) / 1e6

    assert busy(count) <= BUSY < busy(count + 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("page", PAGES)
def test_transfer_modes_move_each_byte_once(mode: TransferMode, page: int) -> None:
    layout = layout_of(page)
    calls = calls_of(layout, mode)
    num_bytes = TOKENS // page * layout.block_bytes
    assert len(calls) == (layout.num_layers if mode is TransferMode.BY_LAYER else 1)
    for offsets in ("local_offsets", "remote_offsets"):
        starts = np.concatenate([getattr(call, offsets) for call in calls])
        ends = starts + np.concatenate([call.num_bytes for call in calls])
        assert starts.min() == 0
        assert sorted(ends)[-1] == num_bytes
        assert (np.sort(starts)[1:] == np.sort(ends)[:-1]).all()


def test_simulated_request_shares_the_same_pages_as_the_real_request() -> None:
    document = list(range(40))
    one, other = (Prompt(at_s, [*document, 77 + number], 5) for number, at_s in enumerate((0.0, 2.0)))
    first, second = trace_of([one, other], clock=0.5).requests
    assert first.keys[:2] == second.keys[:2]
    assert first.keys[2] != second.keys[2]
    assert (first.arrival_s, second.arrival_s) == (0.0, 1.0)
    assert first.session == second.session
