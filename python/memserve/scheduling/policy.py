"""Who comes first: a policy gives each candidate a rank, and the lowest wins. Pure.

Knows no clock, socket or randomness, and not how cached depths and queues were found out.
Source: MemServe, scheduling (Eq. 1); the weight of recent work and of those who wait is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from zlib import crc32

from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.model import CostModel

RECENT_WEIGHT = 0.02
"""What work that an instance got lately counts against it, where queued work counts 1.

Queues alone say nothing while they are empty: with a prefix that all prompts share, whoever has it
would win each time. It also stands for the cache that the work took, and will push out.
"""


FOLLOWERS = 0.3
"""How many requests a new one will keep waiting, for each that waits already.

Eq. 1 alone counts only what the request itself waits for. Of two equal sums, the one with more work
of its own (fewer cached blocks) holds up everyone behind it. On Mooncake's conversation trace, in
simulation over 8 instances, this saves a third of the mean time to first token at load 0.9 and over
half past the knee, where it keeps conversations at their history; a higher weight costs the tail.
"""

WORK_WEIGHT = 1.25
"""What a request's own work counts, where waiting for others' counts 1.

To wait for an instance that is computing a prefix takes as long as to compute it next door; but the
one is idle and the other is work. Without this, a burst on one new prefix is computed by everybody.
On the same trace it saves 7% of the mean at load 0.9 and nothing past the knee; 1.5 costs the tail there.
"""

Rank = float | tuple[float, ...]
Policy = Callable[[RoutingContext, Sequence[Candidate], CostModel], Sequence[Rank]]
"""A rank for each candidate, of which there is at least one. Lower is better; ties are broken outside."""


def _prompt_tree(situation: RoutingContext, candidates: Sequence[Candidate], costs: CostModel) -> list[Rank]:
    """The totals of `prefill_score`, without making scores: this is done for every request."""
    tokens, page_tokens = situation.prompt_tokens, situation.page_tokens
    ranks: list[Rank] = []
    for it in candidates:
        total = min(it.total_blocks * page_tokens, tokens - 1)
        own_s = costs.exec_s(tokens, total)
        if it.near_blocks != it.total_blocks:
            own_s += costs.load_s(total - min(it.near_blocks * page_tokens, tokens - 1))
        ranks.append(
            it.queued_s + own_s * (WORK_WEIGHT + FOLLOWERS * it.queued) + RECENT_WEIGHT * it.recent_s
        )
    return ranks


def arrival_s(situation: RoutingContext, candidate: Candidate, costs: CostModel) -> float:
    """Receiving at a decode what it lacks of the prompt."""
    lacking = situation.prompt_tokens - situation.cached_tokens(candidate.total_blocks)
    return costs.remote.seconds(lacking * costs.kv_bytes_per_token)


def steps_s(situation: RoutingContext, candidate: Candidate, costs: CostModel) -> float:
    """This answer's steps in the batch it would join."""
    context_tokens = candidate.context_tokens + situation.prompt_tokens
    return costs.step_s(candidate.decode_batch + 1, context_tokens) * situation.output_tokens


def _prompt_tree_decode(
    situation: RoutingContext, candidates: Sequence[Candidate], costs: CostModel
) -> list[Rank]:
    return [arrival_s(situation, it, costs) + steps_s(situation, it, costs) for it in candidates]


def _longest_prefix(situation: RoutingContext, candidates: Sequence[Candidate], _: CostModel) -> list[Rank]:
    return [-it.total_blocks for it in candidates]


def _round_robin(situation: RoutingContext, candidates: Sequence[Candidate], _: CostModel) -> list[Rank]:
    count = len(candidates)
    return [(i - situation.turn) % count for i in range(count)]


def _round_robin_decode(
    situation: RoutingContext, candidates: Sequence[Candidate], _: CostModel
) -> list[Rank]:
    """Shifts by one with each round: as many prefills would else always meet the same decodes."""
    count = len(candidates)
    return [(i - situation.turn - situation.turn // count) % count for i in range(count)]


def _random(situation: RoutingContext, candidates: Sequence[Candidate], _: CostModel) -> list[Rank]:
    drawn = _mixed(situation.seed, situation.turn) % len(candidates)
    return [float(i != drawn) for i in range(len(candidates))]


def _least_load(situation: RoutingContext, candidates: Sequence[Candidate], _: CostModel) -> list[Rank]:
    return [_load(it) for it in candidates]


def _power_of_two(situation: RoutingContext, candidates: Sequence[Candidate], _: CostModel) -> list[Rank]:
    """The less loaded of two that are drawn."""
    count = len(candidates)
    one = _mixed(situation.seed, situation.turn) % count
    other = (one + 1 + _mixed(situation.seed, situation.turn, 1) % max(count - 1, 1)) % count
    return [(float(i not in (one, other)), *_load(it)) for i, it in enumerate(candidates)]


def _session(situation: RoutingContext, candidates: Sequence[Candidate], costs: CostModel) -> list[Rank]:
    """Rendezvous hashing: a session stays where it is as long as that instance is there."""
    if situation.session is None:
        return _least_load(situation, candidates, costs)
    return [_mixed(situation.session, crc32(it.instance_id.encode())) for it in candidates]


def _load(candidate: Candidate) -> tuple[float, ...]:
    """Work at hand, whichever of the two kinds the instance does."""
    return candidate.queued_s, candidate.decode_batch, candidate.running


def _mixed(*numbers: int) -> int:
    """64 well mixed bits of some numbers. Source: splitmix64."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


_MASK = (1 << 64) - 1

_BOTH: dict[str, Policy] = {
    "round_robin": _round_robin,
    "random": _random,
    "least_load": _least_load,
    "power_of_two": _power_of_two,
    "session": _session,
    "longest_prefix": _longest_prefix,
}
PREFILL_POLICIES: Mapping[str, Policy] = MappingProxyType(_BOTH | {"prompt_tree": _prompt_tree})
DECODE_POLICIES: Mapping[str, Policy] = MappingProxyType(
    _BOTH | {"round_robin": _round_robin_decode, "prompt_tree": _prompt_tree_decode}
)
