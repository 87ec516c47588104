"""The profile of first tokens: the fit finds the slope despite waiting times, from measured values only."""

from __future__ import annotations

from typing import Any

import pytest
from evaluation_stage import outcome, run_of

from load.records import Outcome
from report.profile import profiles_of

REST_S = {"quick": 0.02, "slow": 0.06}
PER_TOKEN_S = 0.0005
COMPUTED = range(100, 1000, 50)


def asked(computed: int, rest_s: float = 0.1, **others: Any) -> Outcome:
    ttft_s = rest_s + PER_TOKEN_S * computed
    return outcome(ttft_s, **({"prompt_tokens": 1000, "reused": 1000 - computed} | others))


def test_profile_fits_one_slope_and_an_offset_per_cell() -> None:
    """Cells that compute little and much, with requests that waited for seconds."""
    quick = [asked(computed, REST_S["quick"]) for computed in COMPUTED[:6]]
    slow = [asked(computed, REST_S["slow"]) for computed in COMPUTED[6:]]
    waited = [asked(computed, 2.0) for computed in (500, 900)]
    found = profiles_of(
        {"quick": [run_of(quick[:3]), run_of(quick[3:], repeat=1)], "slow": [run_of(slow + waited)]}
    )
    assert found["quick"].rest_s == pytest.approx(REST_S["quick"], rel=0.02)
    assert found["quick"].computing_s == pytest.approx(PER_TOKEN_S * found["quick"].computed_tokens, rel=0.02)
    assert (found["quick"].prompt_tokens, found["quick"].computed_tokens) == (1000, 225)
    mean_rest_s = (12 * REST_S["slow"] + 2 * 2.0) / 14
    assert found["slow"].rest_s == pytest.approx(mean_rest_s, rel=0.02), "waiting is in the rest"


def test_profile_leaves_out_missing_figures() -> None:
    measured = [asked(100), asked(200), asked(300)]
    others = [asked(900, warmup=True), asked(900, error="gone"), asked(900, reused=None)]
    assert profiles_of({0: [run_of([*measured, *others])]}) == profiles_of({0: [run_of(measured)]})


@pytest.mark.parametrize(
    "outcomes", [[], [asked(100), asked(100)], [asked(1, reused=None), asked(2, reused=None)]]
)
def test_profile_is_empty_without_variation_or_reports(outcomes: list[Outcome]) -> None:
    assert profiles_of({0: [run_of(outcomes)]}) == {}
