"""The cost model of one served model, learned from the router's own timings.

Begins with given costs (a file fitted to a live instance, or a guess) and follows the observations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from memserve.core.block_addr import LOCAL_TIERS, Tier
from memserve.scheduling.cost_model.model import (
    CostModel,
    Observation,
    PathCost,
    RlsState,
    Work,
    rls_update,
    rls_update_work,
    with_prefill,
)

NEWEST = 0.2
"""Weight of the newest observation of a path between instances."""
REMEMBERED = 0.99
"""Weight of an observed load after the next one."""
MANY_BYTES = 1 << 20
"""A transfer of this size or more tells the bandwidth, a smaller one the latency."""
LEAST_LATENCY_S = 1e-4
NOISE = 0.1
"""Usual difference between a prefill and its prediction, as a share of the prefill."""
MOST_BYTES_PER_S = 1e11
BYTE_UNSURE_S = 1e-9
LATENCY_UNSURE_S = 5e-3
"""Standard deviations of the first guesses of a load's path."""


@dataclass(frozen=True, slots=True)
class _Estimate:
    """A number that is observed through noise only. May be negative for a while, so that errors cancel.

    Source: Kalman's filter of one constant, with forgetting.
    """

    value: float
    most_variance: float
    variance: float

    @classmethod
    def of(cls, value: float, unsure: float) -> _Estimate:
        """A first guess with its standard deviation."""
        return cls(value, unsure**2, unsure**2)

    def after(self, seen: float, times: float, noise: float) -> _Estimate:
        """The estimate after `times` the number was seen as `seen`, with standard deviation `noise`."""
        gain = self.variance * times / (self.variance * times**2 + noise**2)
        variance = self.variance * (1 - gain * times) / REMEMBERED
        value = self.value + gain * (seen - self.value * times)
        return replace(self, value=value, variance=min(variance, self.most_variance))


@dataclass(slots=True)
class _LoadEstimate:
    """The estimated path from one tier of an instance to its HBM."""

    byte_s: _Estimate
    latency_s: _Estimate

    @classmethod
    def of(cls, path: PathCost) -> _LoadEstimate:
        return cls(
            _Estimate.of(1 / path.bytes_per_s, BYTE_UNSURE_S), _Estimate.of(path.latency_s, LATENCY_UNSURE_S)
        )

    @property
    def path(self) -> PathCost:
        byte_s = max(self.byte_s.value, 1 / MOST_BYTES_PER_S)
        return PathCost(max(self.latency_s.value, LEAST_LATENCY_S), 1 / byte_s)


@dataclass(slots=True)
class FetchError:
    """Mean error of the predicted transfers between instances."""

    num_observed: int = 0
    error: float = 0.0
    """Moving mean of |predicted - observed| / observed."""


class OnlineCostModel:
    """`model` is the current belief. Event loop thread only."""

    def __init__(self, start: CostModel, *, certainty: float = 0.0) -> None:
        """At certainty 0 the first observations overrule `start`; at 1 they hardly change it."""
        self._rls = RlsState.of(start.prefill, certainty)
        self._model = start
        self._loads = [_LoadEstimate.of(path) for path in start.load]
        self.fetches = FetchError()

    @property
    def model(self) -> CostModel:
        """The costs as believed now. A value."""
        return self._model

    @property
    def prefills(self) -> RlsState:
        """The state of the fit of prefill costs, and its error."""
        return self._rls

    def set_kv_bytes_per_token(self, num_bytes: int) -> None:
        """Take over the size that a pool reports. 0 says nothing."""
        if num_bytes and num_bytes != self._model.kv_bytes_per_token:
            self._model = replace(self._model, kv_bytes_per_token=num_bytes)

    def prefilled(self, seen: Observation) -> None:
        """Learn from a prefill that had an instance to itself. Raises ValueError as `rls_update`."""
        self._rls = rls_update(self._rls, seen)
        self._model = with_prefill(self._model, self._rls.cost)

    def worked(self, work: Work, seconds: float) -> None:
        """Learn from an instance that was busy for `seconds`, above 0, with all of `work`."""
        self._rls = rls_update_work(self._rls, work, seconds)
        self._model = with_prefill(self._model, self._rls.cost)

    def loaded(self, num_tokens: int, seconds: float, total_s: float, tier: Tier = Tier.DRAM) -> None:
        """Learn from a prefill that moved the KV of so many tokens from the instance's own `tier` to HBM.

        `total_s` is the time of the prefill, `seconds` its excess over the prediction without the load; it
        may be negative, as predictions err both ways.
        """
        num_bytes, path, load = (
            num_tokens * self._model.kv_bytes_per_token,
            self._model.load[tier],
            self._loads[tier],
        )
        if num_bytes <= 0 or not total_s > 0:
            return
        noise_s = NOISE * total_s
        if num_bytes >= MANY_BYTES:
            load.byte_s = load.byte_s.after(seconds - path.latency_s, num_bytes, noise_s)
        else:
            load.latency_s = load.latency_s.after(seconds - num_bytes / path.bytes_per_s, 1, noise_s)
        paths = tuple(load.path if one is tier else self._model.load[one] for one in LOCAL_TIERS)
        self._model = replace(self._model, load=paths)

    def fetched(self, num_tokens: int, seconds: float) -> None:
        """Learn from a fetch of the KV of so many tokens from another instance."""
        num_bytes, path = num_tokens * self._model.kv_bytes_per_token, self._model.remote
        if num_bytes <= 0 or not seconds > 0:
            return
        found = self.fetches
        error = abs(path.seconds(num_bytes) - seconds) / seconds
        found.num_observed += 1
        found.error += max(NEWEST, 1 / found.num_observed) * (error - found.error)
        self._model = replace(self._model, remote=_after(path, num_bytes, seconds))


def _after(path: PathCost, num_bytes: int, seconds: float) -> PathCost:
    """The path after one more transfer over it."""
    if num_bytes >= MANY_BYTES:
        moving_s = max(seconds - path.latency_s, seconds / 2)
        per_byte = 1 / path.bytes_per_s
        return replace(path, bytes_per_s=1 / (per_byte + NEWEST * (moving_s / num_bytes - per_byte)))
    waiting_s = max(seconds - num_bytes / path.bytes_per_s, LEAST_LATENCY_S)
    return replace(path, latency_s=path.latency_s + NEWEST * (waiting_s - path.latency_s))
