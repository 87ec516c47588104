"""The cost of a request at each candidate: Eq. 1 in its parts, which `prompt_tree` sums and `explain` shows.

    Eq. 1   cost(p) = sum over p's queue of exec(x_r, y_r) + exec(x, y_p)

with `load`, the time that bringing cached blocks to HBM takes, and two penalties that the paper lacks.
Source: MemServe, scheduling (Eq. 1); the weights of recent work and of waiting requests are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from memserve.core.block_addr import LOCAL_TIERS
from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.model import CostModel
from memserve.scheduling.prompt_tree.records import TierCounts

RECENT_WEIGHT = 0.02
"""Weight of the prefill work that an instance got recently; queued work has weight 1.

Empty queues do not tell instances apart: with a prefix that all prompts share, the instance that has it
would win each time. The weight also stands for the cache that the work took, and will push out.
"""

FOLLOWERS = 0.3
"""How many later requests a new request delays, for each request that is already queued.

Eq. 1 alone counts only the request's own wait. Of two equal sums, the candidate with more own work (fewer
cached blocks) delays every request behind it. On Mooncake's conversation trace, simulated over 8
instances, this saves a third of the mean time to first token at load 0.9 and over half past the knee,
where it keeps conversations at their history; a higher weight costs the tail.
"""

WORK_WEIGHT = 1.25
"""Weight of the request's own work; waiting for queued work has weight 1.

To wait for an instance that is computing a prefix takes as long as to compute it at another one; but
waiting is idle time, and computing is work. Without this weight, every instance computes the new prefix of a
burst. On the same trace it saves 7% of the mean at load 0.9 and nothing past the knee; 1.5 costs the tail.
"""

_LOWER_TIERS = LOCAL_TIERS[1:]

Parts = tuple[float, float, float, float, float]
"""Seconds, in the order of the fields of `Score`: queue, load, exec, others, recent."""


class Score(msgspec.Struct, frozen=True):
    """The cost of a request at one candidate. All parts are predicted seconds."""

    candidate: Candidate
    queue_s: float
    load_s: float
    """Moving blocks to the candidate's HBM: from its own DRAM; for a decode, from the prefill."""
    exec_s: float
    """The request's own work: its prefill, or its decode steps."""
    others_s: float
    """Penalty for delaying queued requests (`FOLLOWERS`) and for redundant work (`WORK_WEIGHT`)."""
    recent_s: float
    """Weighted work that the candidate got recently."""

    @property
    def total_s(self) -> float:
        """The rank of the candidate under `prompt_tree`."""
        return self.queue_s + self.load_s + self.exec_s + self.others_s + self.recent_s


def prefill_parts(context: RoutingContext, candidates: Sequence[Candidate], costs: CostModel) -> list[Parts]:
    """Eq. 1 for each prefill, each block at the price of the tier it is in. Runs once per request."""
    tokens, page_tokens, exec_of = context.prompt_tokens, context.page_tokens, costs.exec_s
    most, extra = tokens - 1, WORK_WEIGHT - 1
    parts: list[Parts] = []
    for it in candidates:
        depths = it.depths
        cached = depths[-1] * page_tokens
        if cached > most:  # not min(), which takes a fifth of this loop's time
            cached = most
        own_s = exec_s = exec_of(tokens, cached)
        moved_s = 0.0
        if depths[0] != depths[-1]:
            moved_s = load_s(context, depths, costs)
            own_s += moved_s
        others_s = own_s * (extra + FOLLOWERS * it.queued)
        parts.append((it.queued_s, moved_s, exec_s, others_s, RECENT_WEIGHT * it.recent_s))
    return parts


def load_s(context: RoutingContext, depths: TierCounts, costs: CostModel) -> float:
    """Moving to HBM the blocks of an instance that are in its other tiers; `depths` as in `Candidate`."""
    page_tokens, most = context.page_tokens, context.prompt_tokens - 1
    seconds, above = 0.0, depths[0] * page_tokens
    for tier in _LOWER_TIERS:
        tokens = depths[tier] * page_tokens
        if tokens > most:
            tokens = most
        if tokens > above:
            seconds += costs.load_s(tokens - above, tier)
        above = tokens
    return seconds


def decode_parts(context: RoutingContext, candidates: Sequence[Candidate], costs: CostModel) -> list[Parts]:
    """For each decode: receiving the blocks it lacks, then the answer's steps in the batch it would join."""
    parts: list[Parts] = []
    for it in candidates:
        lacking = context.prompt_tokens - context.cached_tokens(it.depths[-1])
        load_s = costs.remote.seconds(lacking * costs.kv_bytes_per_token)
        step_s = costs.step_s(it.decode_batch + 1, it.context_tokens + context.prompt_tokens)
        parts.append((0.0, load_s, step_s * context.output_tokens, 0.0, 0.0))
    return parts


def scores_of(candidates: Sequence[Candidate], parts: Sequence[Parts]) -> tuple[Score, ...]:
    """The parts with the candidates they belong to, in the same order."""
    return tuple(Score(it, *costs) for it, costs in zip(candidates, parts, strict=True))
