"""Who gets a request, and whether its history is fetched first: pure functions of a `Situation`.

    Eq. 1   p* = argmin_p [ sum over p's queue of exec(x_r, y_r) + exec(x, y_p) ]
    Eq. 2   fetch from p' if transfer(y_p, y_p') <= exec(x, y_p) - exec(x, y_p')

A policy gives each candidate a rank, and the lowest wins. Of equals it is the one that got the least
work lately, then the next in turn: that spreads cold prompts also where all queues are empty.
Knows no clock, socket or randomness, and not how cached depths and queues were found out.
Source: MemServe, scheduling; the weight of recent work and the ties are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from zlib import crc32

import msgspec

from memserve.core.ids import InstanceId
from memserve.router.cost_model import CostModel

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


class Candidate(msgspec.Struct, frozen=True):
    """What is known of one instance when a request has to be placed."""

    instance_id: InstanceId
    near_blocks: int = 0
    """How many of the prompt's blocks, from the first, are in its HBM."""
    total_blocks: int = 0
    """The same for HBM and DRAM together; never less."""
    queued_s: float = 0.0
    """Predicted prefill work dispatched to it and not done."""
    queued: int = 0
    """How many requests that work is of."""
    recent_s: float = 0.0
    """Predicted prefill work dispatched to it within the last minutes, done or not."""
    running: int = 0
    """Requests dispatched to it that have not ended."""
    decode_batch: int = 0
    """Requests it is to decode at the same time."""
    context_tokens: int = 0
    """The sum of their contexts."""


class Situation(msgspec.Struct, frozen=True):
    """One request, and all that could serve it."""

    prompt_tokens: int
    page_tokens: int
    prefills: tuple[Candidate, ...]
    """Prefill or colocated instances; at least one."""
    decodes: tuple[Candidate, ...] = ()
    """None where the prefill's instance decodes as well."""
    holders: tuple[Candidate, ...] = ()
    """Who else may be fetched from: memory servers, and decodes where they answer fetches."""
    session: int | None = None
    """A hash of whatever names the conversation."""
    turn: int = 0
    """How many requests were placed before."""
    seed: int = 0
    output_tokens: int = 256
    """How many tokens the answer is expected to have."""

    def cached_tokens(self, num_blocks: int) -> int:
        """Tokens that so many cached blocks save: all but the last, whose logits give the first answer."""
        return min(num_blocks * self.page_tokens, self.prompt_tokens - 1)


class Score(msgspec.Struct, frozen=True):
    """What a request would cost at one candidate."""

    candidate: Candidate
    queue_s: float
    load_s: float
    """Bringing the blocks that are only in its DRAM to HBM; for a decode, receiving what it lacks."""
    exec_s: float
    """This request's own work: prefill, or its decode steps."""
    others_s: float
    """What others will wait for it."""
    recent_s: float
    """The weighted work it got lately."""

    @property
    def total_s(self) -> float:
        return self.queue_s + self.load_s + self.exec_s + self.others_s + self.recent_s


class Fetch(msgspec.Struct, frozen=True):
    """Blocks worth moving to the prefill first, by Eq. 2."""

    source: InstanceId
    num_blocks: int
    """How many it has of the prompt, counted from the first."""
    transfer_s: float
    saved_s: float


class Decision(msgspec.Struct, frozen=True):
    """Where a request goes. Explains itself when asked, so that nobody else pays for the words."""

    prefill: InstanceId
    decode: InstanceId | None
    fetch: Fetch | None
    situation: Situation
    costs: CostModel
    policies: tuple[str, str]
    """Names of the policies that chose the prefill and the decode."""

    @property
    def fetch_from(self) -> InstanceId | None:
        return self.fetch.source if self.fetch else None

    @property
    def scores(self) -> tuple[Score, ...]:
        """Every prefill candidate, in the order of the situation, whatever the policy looked at."""
        return tuple(prefill_score(self.situation, it, self.costs) for it in self.situation.prefills)

    @property
    def decode_scores(self) -> tuple[Score, ...]:
        return tuple(decode_score(self.situation, it, self.costs) for it in self.situation.decodes)

    @property
    def reason(self) -> str:
        """Why, as a sentence."""
        return explain(self)


Rank = float | tuple[float, ...]
Policy = Callable[[Situation, Sequence[Candidate], CostModel], Sequence[Rank]]
"""A rank for each candidate, of which there is at least one. Lower is better; ties are broken outside."""


def decide(
    situation: Situation,
    costs: CostModel,
    prefill_policy: str = "prompt_tree",
    decode_policy: str = "prompt_tree",
    can_fetch: bool = True,
) -> Decision:
    """Place a request. Raises KeyError for a policy there is not, ValueError without a prefill."""
    if not situation.prefills:
        raise ValueError("nobody to choose from")
    rank = PREFILL_POLICIES[prefill_policy]
    prefill = _best(situation, situation.prefills, rank(situation, situation.prefills, costs))
    decode = None
    if situation.decodes:
        rank = DECODE_POLICIES[decode_policy]
        decode = _best(situation, situation.decodes, rank(situation, situation.decodes, costs))
    return Decision(
        prefill.instance_id,
        decode.instance_id if decode else None,
        worthwhile_fetch(situation, prefill, costs) if can_fetch else None,
        situation,
        costs,
        (prefill_policy, decode_policy),
    )


def worthwhile_fetch(situation: Situation, prefill: Candidate, costs: CostModel) -> Fetch | None:
    """Eq. 2: from which other holder moving KV to `prefill` saves most, None if recomputing is as fast."""
    best, most = None, 0.0
    tokens = situation.prompt_tokens
    holders = [
        it
        for it in (*situation.prefills, *situation.decodes, *situation.holders)
        if it.total_blocks > prefill.total_blocks and it.instance_id != prefill.instance_id
    ]
    if holders and not costs.pairs:  # then from the deepest, if any: what a token saves grows with its place
        holders = [max(holders, key=lambda it: it.total_blocks)]
    for holder in holders:
        own, other = (situation.cached_tokens(it.total_blocks) for it in (prefill, holder))
        transfer_s = costs.transfer_s(other - own, holder.instance_id, prefill.instance_id)
        saved_s = costs.exec_s(tokens, own) - costs.exec_s(tokens, other)
        if saved_s - transfer_s > most:
            most = saved_s - transfer_s
            best = Fetch(holder.instance_id, holder.total_blocks, transfer_s, saved_s)
    return best


def prefill_score(situation: Situation, candidate: Candidate, costs: CostModel) -> Score:
    """Eq. 1 for one prefill, each block at the price of the tier it is in."""
    near = situation.cached_tokens(candidate.near_blocks)
    total = situation.cached_tokens(candidate.total_blocks)
    load_s = costs.load_s(total - near)
    exec_s = costs.exec_s(situation.prompt_tokens, total)
    return Score(
        candidate,
        candidate.queued_s,
        load_s,
        exec_s,
        FOLLOWERS * candidate.queued * (load_s + exec_s),
        RECENT_WEIGHT * candidate.recent_s,
    )


def decode_score(situation: Situation, candidate: Candidate, costs: CostModel) -> Score:
    """One decode: receiving what it lacks, then this answer's steps in the batch it would join."""
    arrival_s = _arrival_s(situation, candidate, costs)
    return Score(candidate, 0.0, arrival_s, _steps_s(situation, candidate, costs), 0.0, 0.0)


def explain(decision: Decision) -> str:
    """The decision as a sentence or two."""
    situation = decision.situation
    scores = {score.candidate.instance_id: score for score in decision.scores}
    chosen = scores.pop(decision.prefill)
    blocks = -(-situation.prompt_tokens // situation.page_tokens)
    has = f"{chosen.candidate.total_blocks} of {blocks} blocks"
    text = [
        f"{decision.prefill} by {decision.policies[0]}: it has {has} "
        f"({chosen.candidate.near_blocks} in HBM), {chosen.queue_s:.3g} s queued and needs "
        f"{chosen.load_s + chosen.exec_s:.3g} s"
    ]
    if scores:
        other = min(scores.values(), key=lambda score: score.total_s)
        text.append(
            f"; best of the others is {other.candidate.instance_id} with "
            f"{other.candidate.total_blocks} blocks, "
            f"{other.queue_s:.3g} s queued and {other.load_s + other.exec_s:.3g} s needed"
        )
    if decision.fetch:
        text.append(
            f"; fetches from {decision.fetch.source}, which has {decision.fetch.num_blocks} blocks: "
            f"{decision.fetch.transfer_s:.3g} s to move, {decision.fetch.saved_s:.3g} s saved"
        )
    if decision.decode:
        text.append(f"; {decision.decode} decodes by {decision.policies[1]}")
    return "".join(text) + "."


def _best(situation: Situation, candidates: Sequence[Candidate], ranks: Sequence[Rank]) -> Candidate:
    """The lowest rank; of equals the one with the least recent work, then the next in turn."""
    lowest = min(ranks)
    if ranks.count(lowest) == 1:
        return candidates[ranks.index(lowest)]
    count = len(candidates)
    return candidates[
        min(
            (i for i in range(count) if ranks[i] == lowest),
            key=lambda i: (candidates[i].recent_s, (i - situation.turn) % count),
        )
    ]


def _prompt_tree(situation: Situation, candidates: Sequence[Candidate], costs: CostModel) -> list[Rank]:
    """The totals of `prefill_score`, without making scores: this is done for every request."""
    tokens, page_tokens = situation.prompt_tokens, situation.page_tokens
    ranks: list[Rank] = []
    for it in candidates:
        total = min(it.total_blocks * page_tokens, tokens - 1)
        own_s = costs.exec_s(tokens, total)
        if it.near_blocks != it.total_blocks:
            own_s += costs.load_s(total - min(it.near_blocks * page_tokens, tokens - 1))
        ranks.append(it.queued_s + own_s * (1 + FOLLOWERS * it.queued) + RECENT_WEIGHT * it.recent_s)
    return ranks


def _arrival_s(situation: Situation, candidate: Candidate, costs: CostModel) -> float:
    lacking = situation.prompt_tokens - situation.cached_tokens(candidate.total_blocks)
    return costs.remote.seconds(lacking * costs.kv_bytes_per_token)


def _steps_s(situation: Situation, candidate: Candidate, costs: CostModel) -> float:
    context_tokens = candidate.context_tokens + situation.prompt_tokens
    return costs.step_s(candidate.decode_batch + 1, context_tokens) * situation.output_tokens


def _prompt_tree_decode(
    situation: Situation, candidates: Sequence[Candidate], costs: CostModel
) -> list[Rank]:
    return [_arrival_s(situation, it, costs) + _steps_s(situation, it, costs) for it in candidates]


def _longest_prefix(situation: Situation, candidates: Sequence[Candidate], _: CostModel) -> list[Rank]:
    return [-it.total_blocks for it in candidates]


def _round_robin(situation: Situation, candidates: Sequence[Candidate], _: CostModel) -> list[Rank]:
    count = len(candidates)
    return [(i - situation.turn) % count for i in range(count)]


def _random(situation: Situation, candidates: Sequence[Candidate], _: CostModel) -> list[Rank]:
    drawn = _mixed(situation.seed, situation.turn) % len(candidates)
    return [float(i != drawn) for i in range(len(candidates))]


def _least_load(situation: Situation, candidates: Sequence[Candidate], _: CostModel) -> list[Rank]:
    return [_load(it) for it in candidates]


def _power_of_two(situation: Situation, candidates: Sequence[Candidate], _: CostModel) -> list[Rank]:
    """The less loaded of two that are drawn."""
    count = len(candidates)
    one = _mixed(situation.seed, situation.turn) % count
    other = (one + 1 + _mixed(situation.seed, situation.turn, 1) % max(count - 1, 1)) % count
    return [(float(i not in (one, other)), *_load(it)) for i, it in enumerate(candidates)]


def _session(situation: Situation, candidates: Sequence[Candidate], costs: CostModel) -> list[Rank]:
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
DECODE_POLICIES: Mapping[str, Policy] = MappingProxyType(_BOTH | {"prompt_tree": _prompt_tree_decode})
