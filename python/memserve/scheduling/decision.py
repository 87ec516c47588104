"""Chooses a prefill, a decode and a fetch for one request: pure functions of a `RoutingContext`.

A policy ranks the candidates. Of candidates with equal ranks, the one with the least recent work wins,
then the next in turn: that spreads cold prompts also where all queues are empty.
Source: MemServe, scheduling; the rule for ties is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from memserve.core.ids import InstanceId
from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.model import CostModel
from memserve.scheduling.fetch_planner import FetchChoice, FetchRule, best_fetch
from memserve.scheduling.policies import find_policy
from memserve.scheduling.policy import Rank
from memserve.scheduling.request_cost import Score, decode_parts, prefill_parts, scores_of


class Decision(msgspec.Struct, frozen=True):
    """Where a request goes. Scores and reason are computed when they are read."""

    prefill: InstanceId
    decode: InstanceId | None
    fetch: FetchChoice | None
    context: RoutingContext
    costs: CostModel
    policies: tuple[str, str]
    """Names of the policies that chose the prefill and the decode."""
    chosen: Candidate
    """The prefill, as it was known."""

    @property
    def scores(self) -> tuple[Score, ...]:
        """The cost at every prefill candidate, in the order of the context, under any policy."""
        candidates = self.context.prefills
        return scores_of(candidates, prefill_parts(self.context, candidates, self.costs))

    @property
    def decode_scores(self) -> tuple[Score, ...]:
        """The cost at every decode candidate, in the order of the context, under any policy."""
        candidates = self.context.decodes
        return scores_of(candidates, decode_parts(self.context, candidates, self.costs))

    @property
    def reason(self) -> str:
        """The decision as a sentence."""
        scores = {score.candidate.instance_id: score for score in self.scores}
        chosen = scores.pop(self.prefill)
        blocks = -(-self.context.prompt_tokens // self.context.page_tokens)
        has = f"{chosen.candidate.cached_blocks} of {blocks} blocks"
        text = [
            f"{self.prefill} by {self.policies[0]}: it has {has} "
            f"({chosen.candidate.hbm_blocks} in HBM), {chosen.queue_s:.3g} s queued and needs "
            f"{chosen.load_s + chosen.exec_s:.3g} s"
        ]
        if scores:
            other = min(scores.values(), key=lambda score: score.total_s)
            text.append(
                f"; best of the others is {other.candidate.instance_id} with "
                f"{other.candidate.cached_blocks} blocks, "
                f"{other.queue_s:.3g} s queued and {other.load_s + other.exec_s:.3g} s needed"
            )
        if self.fetch:
            text.append(
                f"; fetches from {self.fetch.source}, which has {self.fetch.num_blocks} blocks: "
                f"{self.fetch.transfer_s:.3g} s to move, {self.fetch.saved_s:.3g} s saved"
            )
        if self.decode:
            text.append(f"; {self.decode} decodes by {self.policies[1]}")
        return "".join(text) + "."


def decide(
    context: RoutingContext,
    costs: CostModel,
    prefill_policy: str = "prompt_tree",
    decode_policy: str = "prompt_tree",
    fetch_rule: FetchRule = best_fetch,
) -> Decision:
    """Choose a prefill and, where there are decodes, a decode; then a holder worth fetching from (Eq. 2).

    Raises ConfigError for an unknown policy; ValueError if there is no prefill, or a policy does not
    give one rank for each candidate.
    """
    if not context.prefills:
        raise ValueError("no prefill to choose from")
    rank = find_policy(prefill_policy).rank
    prefill = _best(context, context.prefills, rank(context, context.prefills, costs))
    decode = None
    if context.decodes:
        policy = find_policy(decode_policy)
        rank = policy.rank_decodes or policy.rank
        decode = _best(context, context.decodes, rank(context, context.decodes, costs))
    return Decision(
        prefill.instance_id,
        decode.instance_id if decode else None,
        fetch_rule(context, prefill, costs),
        context,
        costs,
        (prefill_policy, decode_policy),
        prefill,
    )


def _best(context: RoutingContext, candidates: Sequence[Candidate], ranks: Sequence[Rank]) -> Candidate:
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
            key=lambda i: (candidates[i].recent_s, (i - context.turn) % count),
        )
    ]
