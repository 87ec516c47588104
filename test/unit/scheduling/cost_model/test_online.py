"""The online cost model follows the observations."""

from __future__ import annotations

from random import Random

import pytest

from memserve.scheduling.cost_model.model import GPU_COSTS, Observation
from memserve.scheduling.cost_model.online import OnlineCostModel


def test_online_costs_begin_as_given_and_follow_observations() -> None:
    costs = OnlineCostModel(GPU_COSTS)
    assert costs.model == GPU_COSTS
    for num_tokens in (100, 1000, 4000, 200, 2000, 3000):
        costs.prefilled(Observation(num_tokens, 0, 0.01 + num_tokens * 2e-4))
    assert costs.model.exec_s(2500, 0) == pytest.approx(0.51, rel=0.1)
    assert costs.prefills.num_observed == 6


def test_certain_costs_are_not_overruled_by_one_observation() -> None:
    seen = Observation(1000, 0, 10.0)
    unsure, sure = OnlineCostModel(GPU_COSTS), OnlineCostModel(GPU_COSTS, certainty=1.0)
    for costs in (unsure, sure):
        costs.prefilled(seen)
    assert sure.model.exec_s(1000, 0) < 0.1 < unsure.model.exec_s(1000, 0)


def test_kv_bytes_per_token_are_taken_from_the_pool() -> None:
    costs = OnlineCostModel(GPU_COSTS)
    costs.set_kv_bytes_per_token(4096)
    assert costs.model.kv_bytes_per_token == 4096
    costs.set_kv_bytes_per_token(0)
    assert costs.model.kv_bytes_per_token == 4096


@pytest.mark.parametrize(("num_tokens", "seconds"), [(4096, 0.5), (16, 0.02)])
def test_fetches_refine_bandwidth_or_latency_by_their_size(num_tokens: int, seconds: float) -> None:
    costs = OnlineCostModel(GPU_COSTS)
    costs.set_kv_bytes_per_token(4096)
    for _ in range(60):
        costs.fetched(num_tokens, seconds)
    assert costs.model.remote.seconds(num_tokens * 4096) == pytest.approx(seconds, rel=0.1)
    assert costs.fetches.num_observed == 60
    assert costs.fetches.error < 1.0


def test_empty_fetches_change_nothing() -> None:
    costs = OnlineCostModel(GPU_COSTS)
    costs.fetched(0, 1.0)
    costs.fetched(100, 0.0)
    assert costs.model == GPU_COSTS


def test_load_costs_are_learned_apart_from_prefill_costs() -> None:
    costs = OnlineCostModel(GPU_COSTS)
    costs.set_kv_bytes_per_token(4096)
    for _ in range(60):
        costs.loaded(4096, 0.05, total_s=0.2)
        costs.loaded(16, 0.004, total_s=0.02)
    assert costs.model.load_s(4096) == pytest.approx(0.05, rel=0.2)
    assert costs.model.load_s(16) == pytest.approx(0.004, rel=0.2)
    for _ in range(200):
        costs.loaded(16, -0.01, total_s=0.02)
    assert costs.model.load_s(16) < 0.001
    assert costs.model.prefill == GPU_COSTS.prefill


def test_noise_of_prefills_is_not_learned_as_load_cost() -> None:
    """Prefills of 400 ms that vary by a fifth, of which the load takes 5 ms."""
    costs, draw = OnlineCostModel(GPU_COSTS), Random(0)
    costs.set_kv_bytes_per_token(4096)
    believed = []
    for _ in range(200):
        costs.loaded(4096, 0.005 + draw.gauss(0, 0.08), total_s=0.4)
        believed.append(costs.model.load_s(4096))
    assert 0 <= sum(believed) / len(believed) < 0.015
