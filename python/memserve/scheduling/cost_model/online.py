"""The cost model of one served model, as far as the router has learnt it from what it timed.

Begins where it is told to (a file fitted to a live instance, or a guess) and follows what it sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
"""What the newest observation of a path weighs."""
REMEMBERED = 0.99
"""What an observation of a load weighs after the next one."""
MANY_BYTES = 1 << 20
"""A transfer of so many tells of the bandwidth, a smaller one of the latency."""
LEAST_LATENCY_S = 1e-4


NOISE = 0.1
"""By how much of itself a prefill usually differs from what is predicted."""
MOST_BYTES_PER_S = 1e11
BYTE_UNSURE_S = 1e-9
LATENCY_UNSURE_S = 5e-3
"""By how much a guess of what loading takes may be off."""


@dataclass(frozen=True, slots=True)
class _Estimate:
    """A number that is seen through noise only. May be negative for a while, so that errors cancel.

    Source: Kalman's filter of one constant, with forgetting.
    """

    value: float
    most_variance: float
    variance: float

    @classmethod
    def of(cls, value: float, unsure: float) -> _Estimate:
        return cls(value, unsure**2, unsure**2)

    def after(self, seen: float, times: float, noise: float) -> _Estimate:
        """When `times` the number was seen as `seen`, give or take `noise`."""
        gain = self.variance * times / (self.variance * times**2 + noise**2)
        variance = self.variance * (1 - gain * times) / REMEMBERED
        value = self.value + gain * (seen - self.value * times)
        return replace(self, value=value, variance=min(variance, self.most_variance))


@dataclass(slots=True)
class FetchError:
    """How far transfers were from what was predicted."""

    num_observed: int = 0
    error: float = 0.0
    """Moving mean of |predicted - observed| / observed."""


class OnlineCostModel:
    """`model` is what is believed now. Event loop thread only."""

    def __init__(self, start: CostModel, *, certainty: float = 0.0) -> None:
        """At certainty 0 the first observations overrule `start`, at 1 hardly any does."""
        self._refined = RlsState.of(start.prefill, certainty)
        self._model = start
        self._byte_s = _Estimate.of(1 / start.dram.bytes_per_s, BYTE_UNSURE_S)
        self._latency_s = _Estimate.of(start.dram.latency_s, LATENCY_UNSURE_S)
        self.fetches = FetchError()

    @property
    def model(self) -> CostModel:
        return self._model

    @property
    def prefills(self) -> RlsState:
        """What is believed of prefills, and how well it did."""
        return self._refined

    def has_block_bytes(self, block_bytes: int, page_tokens: int) -> None:
        """A pool told the size of its blocks, which no guess beats."""
        per_token = block_bytes // page_tokens
        if per_token and per_token != self._model.kv_bytes_per_token:
            self._model = replace(self._model, kv_bytes_per_token=per_token)

    def prefilled(self, seen: Observation) -> None:
        """A prefill that had an instance to itself took so long. Raises as `observe`."""
        self._refined = rls_update(self._refined, seen)
        self._model = with_prefill(self._model, self._refined.cost)

    def worked(self, work: Work, seconds: float) -> None:
        """An instance that always had something to do took so long, above 0, for all of that."""
        self._refined = rls_update_work(self._refined, work, seconds)
        self._model = with_prefill(self._model, self._refined.cost)

    def loaded(self, num_tokens: int, seconds: float, total_s: float) -> None:
        """The KV of so many tokens came from an instance's own DRAM: its prefill took `total_s`, which is
        `seconds` more than predicted without that; or less, as predictions err both ways."""
        num_bytes, path = num_tokens * self._model.kv_bytes_per_token, self._model.dram
        if num_bytes <= 0 or not total_s > 0:
            return
        noise_s = NOISE * total_s
        if num_bytes >= MANY_BYTES:
            self._byte_s = self._byte_s.after(seconds - path.latency_s, num_bytes, noise_s)
        else:
            self._latency_s = self._latency_s.after(seconds - num_bytes / path.bytes_per_s, 1, noise_s)
        byte_s = max(self._byte_s.value, 1 / MOST_BYTES_PER_S)
        dram = PathCost(max(self._latency_s.value, LEAST_LATENCY_S), 1 / byte_s)
        self._model = replace(self._model, dram=dram)

    def fetched(self, num_tokens: int, seconds: float) -> None:
        """The KV of so many tokens came from another instance."""
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
