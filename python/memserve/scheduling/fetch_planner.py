"""Eq. 2: whether blocks of a prompt are worth moving to the chosen prefill first, and from which holder.

    Eq. 2   fetch from p' if transfer(y_p, y_p') <= exec(x, y_p) - exec(x, y_p') + p's queue

p computes other requests during a transfer, so the queue before it hides that much of the transfer.
Source: MemServe, scheduling (Eq. 2); the queue, which the paper leaves out, is ours.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import msgspec

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.ids import InstanceId
from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.model import CostModel


class FetchChoice(msgspec.Struct, frozen=True):
    """A fetch that pays."""

    source: InstanceId
    num_blocks: int
    """The prompt's blocks that the source offers, counted from the first."""
    transfer_s: float
    saved_s: float
    """The computation saved, less moving the blocks to HBM from the DRAM where they arrive."""
    limit_s: float
    """The longest fetch that is still worth waiting for."""


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """Blocks to move before a request is sent."""

    target: InstanceId
    source: InstanceId
    keys: Sequence[BlockKey]
    """From the prompt's first block on."""
    num_there: int
    """How many of the keys, from the first, the target has."""
    transfer_s: float
    """Predicted time for the other keys."""
    timeout_s: float

    @classmethod
    def of(
        cls, choice: FetchChoice, target: Candidate, chain: Sequence[BlockKey], *, max_s: float
    ) -> FetchPlan:
        """The plan that carries out `choice` for a prompt with the keys `chain`, in at most `max_s`."""
        return cls(
            target=target.instance_id,
            source=choice.source,
            keys=chain[: choice.num_blocks],
            num_there=target.cached_blocks,
            transfer_s=choice.transfer_s,
            timeout_s=min(choice.limit_s, max_s),
        )

    def num_shared(self, chain: Sequence[BlockKey]) -> int:
        """How many keys of `chain`, from the first, the plan moves too. O(log n): a key names its prefix."""
        shorter = range(min(len(self.keys), len(chain)))
        return bisect_left(shorter, True, key=lambda place: self.keys[place] != chain[place])


@dataclass(frozen=True, slots=True)
class FetchOutcome:
    """The result of a plan."""

    num_blocks: int
    """How many of the plan's keys, from the first, the target has now on every rank."""
    seconds: float
    reason: str
    """Why it does not have all of them; "" if it has."""


def fetch_gain_s(saved_s: float, transfer_s: float, queued_s: float) -> float:
    """Eq. 2: the gain of waiting for a transfer that saves `saved_s`, part of which the queue hides."""
    return saved_s - max(0.0, transfer_s - queued_s)


def best_fetch(context: RoutingContext, prefill: Candidate, costs: CostModel) -> FetchChoice | None:
    """The fetch to `prefill` from the holder that offers most blocks; None if it gains nothing by Eq. 2.

    All transfers cost the same for each token, and a token saves more the later its place in the prompt.
    """
    choice = largest_fetch(context, prefill, costs)
    if choice is None or fetch_gain_s(choice.saved_s, choice.transfer_s, prefill.queued_s) <= 0:
        return None
    return msgspec.structs.replace(choice, limit_s=choice.saved_s + prefill.queued_s)


def largest_fetch(context: RoutingContext, prefill: Candidate, costs: CostModel) -> FetchChoice | None:
    """The fetch to `prefill` from the holder that offers most blocks, whatever it costs; None without one."""
    most = prefill.cached_blocks
    holder: Candidate | None = None
    for candidates in (context.prefills, context.decodes, context.holders):
        for it in candidates:
            if it.readable_blocks > most and it is not prefill:
                most, holder = it.readable_blocks, it
    if holder is None:
        return None
    tokens, own, other = context.prompt_tokens, *map(context.cached_tokens, (prefill.cached_blocks, most))
    transfer_s = costs.transfer_s(other - own)
    saved_s = costs.exec_s(tokens, own) - costs.exec_s(tokens, other) - costs.load_s(other - own, Tier.DRAM)
    return FetchChoice(holder.instance_id, most, transfer_s, saved_s, inf)


FetchRule = Callable[[RoutingContext, Candidate, CostModel], FetchChoice | None]
FETCH_RULES: Mapping[str, FetchRule] = {
    "auto": best_fetch,
    "always": largest_fetch,
    "never": lambda context, prefill, costs: None,
}
"""The rules that `--fetch` chooses from."""
