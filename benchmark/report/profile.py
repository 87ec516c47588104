"""The parts of the time to the first token: computation of tokens that were not reused, and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from load.records import Run

ROUNDS = 50
LEAST_S = 1e-3
"""Deviations below this count alike, so that no request is weighed without bound."""
K = TypeVar("K")
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Profile:
    """A request of one cell, in the mean."""

    prompt_tokens: float
    computed_tokens: float
    """Those of them that were not reused."""
    ttft_s: float
    computing_s: float
    """What the computed tokens take by themselves."""

    @property
    def rest_s(self) -> float:
        """HTTP, the handoff, and waiting: for other prompts, and for a decode step to end."""
        return self.ttft_s - self.computing_s


def profiles_of(cells: Mapping[K, Iterable[Run]]) -> dict[K, Profile]:
    """A profile of every cell whose servers tell what was reused; the cells share machine and model.

    So they share what computing a token takes, too: the slope of TTFT over tokens computed, with a constant
    for each cell. Least absolute deviations, as what a few requests waited should move neither.
    """
    found = {cell: rows for cell, runs in cells.items() if (rows := _rows(runs))}
    if not found:
        return {}
    prompts, computed, times = np.array([row for rows in found.values() for row in rows], float).T
    if len(set(computed)) < 2:
        return {}
    own = np.repeat(np.eye(len(found)), [len(rows) for rows in found.values()], axis=0)
    per_token_s = _least_deviations(np.column_stack([computed, own]), times)[0]
    profiles = {}
    for nth, cell in enumerate(found):
        its = own[:, nth] > 0
        tokens = float(computed[its].mean())
        profiles[cell] = Profile(
            float(prompts[its].mean()), tokens, float(times[its].mean()), float(per_token_s) * tokens
        )
    return profiles


def _rows(runs: Iterable[Run]) -> list[tuple[int, int, float]]:
    """Of each request that counts: tokens of its prompt, those computed, and the time to its first token."""
    return [
        (one.prompt_tokens, one.prompt_tokens - one.reused, one.ttft_s)
        for run in runs
        for one in run.answered
        if one.ttft_s is not None and one.reused is not None
    ]


def _least_deviations(columns: Floats, values: Floats) -> Floats:
    """Factors of `columns` that come nearest to `values`, by least squares weighed anew in each round."""
    weights = np.ones_like(values)
    for _ in range(ROUNDS):
        weights = 1 / np.maximum(LEAST_S, np.abs(columns @ _weighed(columns, values, weights) - values))
    return _weighed(columns, values, weights)


def _weighed(columns: Floats, values: Floats, weights: Floats) -> Floats:
    root = np.sqrt(weights)
    factors: Floats = np.linalg.lstsq(columns * root[:, None], values * root, rcond=None)[0]
    return factors
