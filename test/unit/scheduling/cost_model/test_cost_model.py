"""The cost model, and its fit to observed prefills."""

from __future__ import annotations

from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.block_addr import LOCAL_TIERS, Tier
from memserve.scheduling.cost_model.file import read_costs, write_costs
from memserve.scheduling.cost_model.model import (
    CPU_COSTS,
    GPU_COSTS,
    CostModel,
    Observation,
    PrefillCost,
    RlsState,
    rls_update,
    with_prefill,
)

TRUE = PrefillCost(fixed_s=0.02, token_s=8e-5, token_pair_s=3e-9)


def seen(random: Random, noise: float = 0.0, cost: PrefillCost = TRUE) -> Observation:
    tokens = int(10 ** random.uniform(1.5, 4.7))
    cached = random.choice([0, 0, random.randrange(tokens)])
    exact = with_prefill(GPU_COSTS, cost).exec_s(tokens, cached)
    return Observation(tokens, cached, exact * random.lognormvariate(0, noise))


@pytest.mark.parametrize("costs", [GPU_COSTS, CPU_COSTS])
def test_exec_cost_has_the_two_terms_of_the_paper(costs: CostModel) -> None:
    x, y = 4096, 0.25
    cost = costs.prefill
    expected = cost.fixed_s + cost.token_s * x * (1 - y) + cost.token_pair_s * x**2 * (1 - y**2)
    assert costs.exec_s(x, int(x * y)) == pytest.approx(expected)


@given(st.integers(1, 100_000), st.data())
def test_cached_token_never_increases_the_exec_cost(tokens: int, data: st.DataObject) -> None:
    less = data.draw(st.integers(0, tokens - 1))
    more = data.draw(st.integers(less, tokens - 1))
    assert GPU_COSTS.exec_s(tokens, more) <= GPU_COSTS.exec_s(tokens, less)


def test_transfer_takes_latency_and_bytes_over_bandwidth() -> None:
    assert GPU_COSTS.transfer_s(512) == pytest.approx(2e-3 + 512 * 131072 / 12e9)
    assert GPU_COSTS.transfer_s(0) == 0


def test_load_costs_depend_on_the_tier() -> None:
    assert GPU_COSTS.load_s(512, Tier.HBM) == 0
    assert GPU_COSTS.load_s(512, Tier.DRAM) == pytest.approx(2e-4 + 512 * 131072 / 25e9)
    assert [GPU_COSTS.load_s(0, tier) for tier in LOCAL_TIERS] == [0.0] * len(LOCAL_TIERS)


def test_written_costs_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_bytes(msgspec.json.encode(write_costs(CPU_COSTS)))
    assert read_costs(str(path)) == CPU_COSTS


@pytest.mark.parametrize("begin", [GPU_COSTS.prefill, CPU_COSTS.prefill])
def test_observations_converge_to_the_true_coefficients(begin: PrefillCost) -> None:
    random, refined = Random(1), RlsState.of(begin)
    for _ in range(300):
        refined = rls_update(refined, seen(random, noise=0.05))
    assert refined.cost.fixed_s == pytest.approx(TRUE.fixed_s, rel=0.1)
    assert refined.cost.token_s == pytest.approx(TRUE.token_s, rel=0.1)
    assert refined.cost.token_pair_s == pytest.approx(TRUE.token_pair_s, rel=0.1)
    assert refined.error < 0.08
    assert refined.num_observed == 300


def test_first_observation_overrules_only_an_uncertain_start() -> None:
    odd = Observation(1000, 0, 1.0)
    unsure, sure = (
        rls_update(RlsState.of(GPU_COSTS.prefill, certainty), odd).cost for certainty in (0.0, 1.0)
    )
    assert with_prefill(GPU_COSTS, unsure).exec_s(1000, 0) == pytest.approx(1.0, rel=0.1)
    assert with_prefill(GPU_COSTS, sure).exec_s(1000, 0) < 0.2


def test_fit_follows_a_machine_that_changes() -> None:
    random, refined = Random(2), RlsState.of(GPU_COSTS.prefill)
    slower = PrefillCost(TRUE.fixed_s * 2, TRUE.token_s * 2, TRUE.token_pair_s * 2)
    for cost in (TRUE, slower):
        for _ in range(1500):
            refined = rls_update(refined, seen(random, 0.05, cost))
    assert refined.cost.token_s == pytest.approx(slower.token_s, rel=0.15)


def test_single_outlier_changes_the_fit_little() -> None:
    random, refined = Random(3), RlsState.of(TRUE, 0.5)
    for _ in range(200):
        refined = rls_update(refined, seen(random, 0.05))
    before = with_prefill(GPU_COSTS, refined.cost).exec_s(5000, 0)
    refined = rls_update(refined, Observation(5000, 0, before * 50))
    assert with_prefill(GPU_COSTS, refined.cost).exec_s(5000, 0) == pytest.approx(before, rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 200_000), st.floats(0, 0.999), st.floats(1e-6, 1e4)), max_size=60))
def test_fitted_coefficients_are_never_negative(
    observations: list[tuple[int, float, float]],
) -> None:
    refined = RlsState.of(GPU_COSTS.prefill)
    for tokens, share, seconds in observations:
        refined = rls_update(refined, Observation(tokens, int(tokens * share), seconds))
        assert min(refined.cost.fixed_s, refined.cost.token_s, refined.cost.token_pair_s) >= 0
        assert max(refined.cost.fixed_s, refined.cost.token_s, refined.cost.token_pair_s) < 1e6


@pytest.mark.parametrize("wrong", [(0, 0, 1.0), (5, 5, 1.0), (5, -1, 1.0), (5, 0, 0.0)])
def test_impossible_observation_is_refused(wrong: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="not a prefill"):
        rls_update(RlsState.of(TRUE), Observation(*wrong))
