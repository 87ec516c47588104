"""Costs in seconds of prefills, decode steps and moved bytes. Knows no clock and no queue.

    exec(x, y) = fixed + linear * x(1 - y) + quadratic * x^2(1 - y^2)      y: the cached share of x

The time of the products with the weights grows with the computed tokens, x(1 - y); the time of their
attention over all tokens before them with x^2(1 - y^2). Observed prefills refine the coefficients by
recursive least squares: `RlsState` is a value, `rls_update` a pure function of it.
Source: MemServe, cost model of exec(x, y) and transfer() = bytes / bandwidth; the fit is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from memserve.core.block_addr import LOCAL_TIERS, Tier

Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]

FORGETTING = 0.998
"""Weight of an observation after the next one: about the last 500 of them count."""

ERROR_MEMORY = 0.98
"""The same for the mean prediction error."""

_SCALE: Vector = (1e-2, 1e-5, 1e-9)
"""Usual sizes of the coefficients. The fit works on multiples of them."""

_UNSURE = 1e6
"""Variance of a coefficient that was never measured, where an observation has variance 1."""


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Coefficients of exec(x, y), all of them at least 0."""

    fixed_s: float
    """For each prefill, however short: launching kernels, sampling."""
    token_s: float
    """For each computed token, x(1 - y)."""
    token_pair_s: float
    """For each unit of x^2(1 - y^2), which is twice the number of attended pairs."""


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """Coefficients of one step of a running batch."""

    fixed_s: float
    """Reading the weights once."""
    sequence_s: float
    context_token_s: float
    """Reading the KV of one token of the batch's contexts."""


@dataclass(frozen=True, slots=True)
class PathCost:
    """A path that bytes move over."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: int) -> float:
        """The time for that many bytes; 0 for no bytes."""
        return self.latency_s + num_bytes / self.bytes_per_s if num_bytes else 0.0


FREE = PathCost(0.0, float("inf"))


def load_paths(dram: PathCost) -> tuple[PathCost, ...]:
    """By tier of an instance, the path from there to its HBM; tiers below DRAM begin with DRAM's path."""
    return tuple(FREE if tier is Tier.HBM else dram for tier in LOCAL_TIERS)


@dataclass(frozen=True, slots=True)
class CostModel:
    """The costs of one model on one kind of instance, as the router believes them."""

    prefill: PrefillCost
    decode: DecodeCost
    kv_bytes_per_token: int
    load: tuple[PathCost, ...]
    """By tier: the path from an instance's own tier to its HBM."""
    remote: PathCost
    """The path from another instance's memory."""

    def exec_s(self, num_tokens: int, num_cached: int) -> float:
        """Prefill of a prompt whose first `num_cached` tokens are cached: exec(x, y), y = num_cached / x."""
        cost = self.prefill
        return (
            cost.fixed_s
            + cost.token_s * (num_tokens - num_cached)
            + cost.token_pair_s * (num_tokens * num_tokens - num_cached * num_cached)
        )

    def step_s(self, num_sequences: int, context_tokens: int) -> float:
        """One decode step of a batch with so many tokens of context in all."""
        cost = self.decode
        return cost.fixed_s + cost.sequence_s * num_sequences + cost.context_token_s * context_tokens

    def load_s(self, num_tokens: int, tier: Tier = Tier.DRAM) -> float:
        """Moving the KV of so many tokens from the instance's own `tier` to its HBM."""
        return self.load[tier].seconds(num_tokens * self.kv_bytes_per_token)

    def transfer_s(self, num_tokens: int) -> float:
        """Moving the KV of so many tokens from another instance."""
        return self.remote.seconds(num_tokens * self.kv_bytes_per_token)


GPU_COSTS = CostModel(
    PrefillCost(fixed_s=8e-3, token_s=3.6e-5, token_pair_s=8.7e-10),
    DecodeCost(fixed_s=8e-3, sequence_s=3e-5, context_token_s=5e-8),
    kv_bytes_per_token=131072,
    load=load_paths(PathCost(2e-4, 25e9)),
    remote=PathCost(2e-3, 12e9),
)
"""An 8B model with grouped-query attention on one H100-class GPU, computed from its FLOPs and bytes
at 45% of the peak, PCIe 5 and a 100 Gb/s network. A first guess: not measured."""

CPU_COSTS = CostModel(
    PrefillCost(fixed_s=2e-2, token_s=2e-4, token_pair_s=2e-9),
    DecodeCost(fixed_s=1.5e-2, sequence_s=1e-3, context_token_s=2e-7),
    kv_bytes_per_token=4096,
    load=load_paths(PathCost(1e-4, 5e9)),
    remote=PathCost(1e-3, 2e9),
)
"""A model of a few million parameters on two CPU cores, as in the tests. A first guess: not measured."""

TOKEN_COSTS = CostModel(
    PrefillCost(fixed_s=0.0, token_s=1.0, token_pair_s=0.0),
    DecodeCost(fixed_s=0.0, sequence_s=1.0, context_token_s=0.0),
    kv_bytes_per_token=1,
    load=load_paths(FREE),
    remote=FREE,
)
"""For simulations without time: a computed token costs 1, and everything else nothing."""


@dataclass(frozen=True, slots=True)
class Work:
    """The computation of one prefill or the sum over several, in the terms of `PrefillCost`."""

    num_prefills: int = 0
    num_tokens: int = 0
    """x(1 - y)"""
    num_pairs: int = 0
    """x^2(1 - y^2)"""

    @classmethod
    def of(cls, num_tokens: int, num_cached: int) -> Work:
        """The prefill of a prompt whose first `num_cached` tokens are cached."""
        return cls(1, num_tokens - num_cached, num_tokens**2 - num_cached**2)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.num_prefills + other.num_prefills,
            self.num_tokens + other.num_tokens,
            self.num_pairs + other.num_pairs,
        )

    def seconds(self, cost: PrefillCost) -> float:
        """The time of all prefills, one after another."""
        return (
            cost.fixed_s * self.num_prefills
            + cost.token_s * self.num_tokens
            + cost.token_pair_s * self.num_pairs
        )


@dataclass(frozen=True, slots=True)
class Observation:
    """A timed prefill, from its start to its first token."""

    num_tokens: int
    num_cached: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RlsState:
    """The fitted coefficients and their covariance. A value: `rls_update` makes the next one."""

    cost: PrefillCost
    estimate: Vector
    """The coefficients as fitted, in multiples of `_SCALE`; they may be negative for a while."""
    covariance: Matrix
    num_observed: int = 0
    error: float = 0.0
    """Moving mean of |predicted - observed| / observed; each prefill is predicted before it is learned."""

    @classmethod
    def of(cls, cost: PrefillCost, certainty: float = 0.0) -> RlsState:
        """Begin at `cost`. At certainty 0 the first observations overrule it; at 1 they hardly change it."""
        if not 0 <= certainty <= 1:
            raise ValueError(f"a certainty is between 0 and 1, not {certainty}")
        variance = _UNSURE ** (1 - 2 * certainty)
        estimate = (
            cost.fixed_s / _SCALE[0],
            cost.token_s / _SCALE[1],
            cost.token_pair_s / _SCALE[2],
        )
        return cls(cost, estimate, ((variance, 0.0, 0.0), (0.0, variance, 0.0), (0.0, 0.0, variance)))


def rls_update(state: RlsState, seen: Observation) -> RlsState:
    """The state after one more prefill. Raises ValueError for an impossible observation."""
    if not 0 <= seen.num_cached < seen.num_tokens or not seen.seconds > 0:
        raise ValueError(f"not a prefill: {seen}")
    return rls_update_work(state, Work.of(seen.num_tokens, seen.num_cached), seen.seconds)


def rls_update_work(state: RlsState, work: Work, seconds: float) -> RlsState:
    """The state after `work` took `seconds`, above 0.

    The fit minimizes *relative* errors, so that long prompts do not outweigh short ones. An observation
    far slower than predicted is scaled by its own time, not by its prediction, so that a hiccup of the
    machine changes little.
    """
    predicted = work.seconds(state.cost)
    error = abs(predicted - seconds) / seconds
    num_observed = state.num_observed + 1
    memory = min(ERROR_MEMORY, 1 - 1 / num_observed)
    estimate, covariance = _least_squares_step(state, work, seconds, max(predicted, seconds))
    cost = PrefillCost(*(max(0.0, value * scale) for value, scale in zip(estimate, _SCALE, strict=True)))
    return RlsState(cost, estimate, covariance, num_observed, memory * state.error + (1 - memory) * error)


def with_prefill(costs: CostModel, cost: PrefillCost) -> CostModel:
    """The same model with other prefill coefficients."""
    return replace(costs, prefill=cost)


def _least_squares_step(
    state: RlsState, work: Work, seconds: float, weigh_by: float
) -> tuple[Vector, Matrix]:
    """One step of recursive least squares with forgetting; features and target are divided by `weigh_by`."""
    features = (
        _SCALE[0] * work.num_prefills / weigh_by,
        _SCALE[1] * work.num_tokens / weigh_by,
        _SCALE[2] * work.num_pairs / weigh_by,
    )
    old, before = state.covariance, state.estimate
    spread = [_dot(row, features) for row in old]
    gain = [value / (FORGETTING + _dot(tuple(spread), features)) for value in spread]
    surprise = seconds / weigh_by - _dot(before, features)
    after = [value + step * surprise for value, step in zip(before, gain, strict=True)]
    # Forgetting lets the variance of a coefficient that is never observed grow: it stops at _UNSURE.
    new = [[(old[i][j] - gain[i] * spread[j]) / FORGETTING for j in range(3)] for i in range(3)]
    if max(new[i][i] for i in range(3)) > _UNSURE:
        new = [[value * FORGETTING for value in row] for row in new]
    return (after[0], after[1], after[2]), (
        (new[0][0], new[0][1], new[0][2]),
        (new[1][0], new[1][1], new[1][2]),
        (new[2][0], new[2][1], new[2][2]),
    )


def _dot(left: tuple[float, ...], right: tuple[float, ...]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
