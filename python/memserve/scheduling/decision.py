"""Where a request goes, and whether its history is fetched first: pure functions of a `RoutingContext`.

    Eq. 1   p* = argmin_p [ sum over p's queue of exec(x_r, y_r) + exec(x, y_p) ]
    Eq. 2   fetch from p' if transfer(y_p, y_p') <= exec(x, y_p) - exec(x, y_p') + p's queue

A transfer takes none of the time that the queue before it takes anyway: p computes others meanwhile.
Of candidates that a policy ranks alike it is the one that got the least work lately, then the next in
turn: that spreads cold prompts also where all queues are empty.
Source: MemServe, scheduling; the ties and the queue in Eq. 2, which the paper leaves out, are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from memserve.core.ids import InstanceId
from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.model import CostModel
from memserve.scheduling.policies import find_policy
from memserve.scheduling.policy import Rank
from memserve.scheduling.request_cost import Score, decode_parts, prefill_parts, scores_of


class FetchChoice(msgspec.Struct, frozen=True):
    """Blocks worth moving to the prefill first, by Eq. 2."""

    source: InstanceId
    num_blocks: int
    """How many it has of the prompt, counted from the first."""
    transfer_s: float
    saved_s: float
    """What need not be computed, less bringing it from DRAM, where it arrives, to HBM."""


class Decision(msgspec.Struct, frozen=True):
    """Where a request goes. Explains itself when asked, so that nobody else pays for the words."""

    prefill: InstanceId
    decode: InstanceId | None
    fetch: FetchChoice | None
    situation: RoutingContext
    costs: CostModel
    policies: tuple[str, str]
    """Names of the policies that chose the prefill and the decode."""
    chosen: Candidate
    """The prefill, as it was known."""

    @property
    def fetch_from(self) -> InstanceId | None:
        return self.fetch.source if self.fetch else None

    @property
    def scores(self) -> tuple[Score, ...]:
        """Every prefill candidate, in the order of the situation, whatever the policy looked at."""
        candidates = self.situation.prefills
        return scores_of(candidates, prefill_parts(self.situation, candidates, self.costs))

    @property
    def decode_scores(self) -> tuple[Score, ...]:
        candidates = self.situation.decodes
        return scores_of(candidates, decode_parts(self.situation, candidates, self.costs))

    @property
    def reason(self) -> str:
        """Why, as a sentence."""
        return explain(self)


def decide(
    situation: RoutingContext,
    costs: CostModel,
    prefill_policy: str = "prompt_tree",
    decode_policy: str = "prompt_tree",
    can_fetch: bool = True,
) -> Decision:
    """Choose a prefill and, where there are decodes, a decode; then a holder worth fetching from (Eq. 2).

    Raises ConfigError for an unknown policy; ValueError if there is no prefill, or a policy does not
    give one rank for each candidate.
    """
    if not situation.prefills:
        raise ValueError("no prefill to choose from")
    rank = find_policy(prefill_policy).rank
    prefill = _best(situation, situation.prefills, rank(situation, situation.prefills, costs))
    decode = None
    if situation.decodes:
        policy = find_policy(decode_policy)
        rank = policy.rank_decodes or policy.rank
        decode = _best(situation, situation.decodes, rank(situation, situation.decodes, costs))
    return Decision(
        prefill.instance_id,
        decode.instance_id if decode else None,
        best_fetch(situation, prefill, costs) if can_fetch else None,
        situation,
        costs,
        (prefill_policy, decode_policy),
        prefill,
    )


def fetch_gain_s(saved_s: float, transfer_s: float, queued_s: float) -> float:
    """Eq. 2: what a request gains by waiting for a transfer that saves so much; the queue hides it."""
    return saved_s - max(0.0, transfer_s - queued_s)


def best_fetch(situation: RoutingContext, prefill: Candidate, costs: CostModel) -> FetchChoice | None:
    """Eq. 2: from which other holder moving KV to `prefill` saves most, None if recomputing is as fast."""
    best: FetchChoice | None = None
    most = 0.0
    tokens, has = situation.prompt_tokens, prefill.total_blocks
    holders = [
        it
        for it in (*situation.prefills, *situation.decodes, *situation.holders)
        if it.total_blocks > has and it.offered_blocks > has and it.instance_id != prefill.instance_id
    ]
    if holders and not costs.pairs:  # then from the deepest, if any: what a token saves grows with its place
        holders = [max(holders, key=lambda it: it.offered_blocks)]
    for holder in holders:
        own, other = (situation.cached_tokens(it) for it in (prefill.total_blocks, holder.offered_blocks))
        transfer_s = costs.transfer_s(other - own, holder.instance_id, prefill.instance_id)
        saved_s = costs.exec_s(tokens, own) - costs.exec_s(tokens, other) - costs.load_s(other - own)
        gain_s = fetch_gain_s(saved_s, transfer_s, prefill.queued_s)
        if gain_s > most:
            most = gain_s
            best = FetchChoice(holder.instance_id, holder.offered_blocks, transfer_s, saved_s)
    return best


def fetching_at_most(decision: Decision, holder: InstanceId, num_blocks: int) -> Decision:
    """The same choice, knowing that only so many blocks can be had from one of those that hold more."""

    def known(candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        return tuple(
            msgspec.structs.replace(it, fetchable_blocks=num_blocks) if it.instance_id == holder else it
            for it in candidates
        )

    old = decision.situation
    situation = msgspec.structs.replace(
        old, prefills=known(old.prefills), decodes=known(old.decodes), holders=known(old.holders)
    )
    fetch = best_fetch(situation, decision.chosen, decision.costs)
    return msgspec.structs.replace(decision, situation=situation, fetch=fetch)


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


def _best(situation: RoutingContext, candidates: Sequence[Candidate], ranks: Sequence[Rank]) -> Candidate:
    """The lowest rank; of equals the one with the least recent work, then the next in turn."""
    if len(ranks) != len(candidates):
        raise ValueError(f"a policy gave {len(ranks)} ranks for {len(candidates)} candidates")
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
