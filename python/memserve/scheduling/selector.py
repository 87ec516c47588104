"""Chooses the instances for each request, and learns from how its prefill went.

    decide   prompt tree + load + costs ──> RoutingContext ──> Decision       changes nothing
    assign   a decision, counted as load and expected in the tree ──> Assignment
    fetched, sent, prefilled, ended     settle the load and refine the costs

Knows no clock (the time is given), no metrics and no network. One thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Protocol

import msgspec

from memserve.core.ids import InstanceId
from memserve.scheduling.assignment import Assignment, work_s_of
from memserve.scheduling.context import Candidate, Prompt, RoutingContext
from memserve.scheduling.cost_model.busy_periods import BusyPeriods
from memserve.scheduling.cost_model.model import CPU_COSTS, GPU_COSTS, CostModel
from memserve.scheduling.cost_model.online import OnlineCostModel
from memserve.scheduling.decision import Decision, decide
from memserve.scheduling.fetch_planner import FETCH_RULES, FetchOutcome, FetchPlan
from memserve.scheduling.load_tracker import LoadTracker
from memserve.scheduling.policies import find_policy
from memserve.scheduling.prediction_error import PredictionError, PrefillReport, update_costs, work_of
from memserve.scheduling.prompt_tree.records import NO_OVERLAP, Overlap, by_server
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree


@dataclass(frozen=True, slots=True)
class SelectorConfig:
    """How instances are chosen."""

    prefill_policy: str
    decode_policy: str
    start_costs: CostModel | None
    """None: the usual costs of the device that serves a model."""
    certainty: float
    """Trust in the start costs, 0 to 1."""
    fetch: str
    """Which blocks are fetched before a request is sent: a name of FETCH_RULES."""
    max_fetch_s: float = 2.0
    """Limit of a fetch, whatever it saves: the holder of the blocks may be gone."""
    recent_s: float = 180.0
    """How long work counts as recent."""
    expect_s: float = 30.0
    """How much later than predicted an instance may report a prompt that it is expected to cache."""


class Server(Protocol):
    """Anything with an instance id."""

    @property
    def instance_id(self) -> InstanceId: ...


class Targets(msgspec.Struct, frozen=True):
    """The instances that can serve one request. They serve one model, with blocks of one size."""

    prefills: Sequence[Server]
    """Prefill and colocated instances."""
    decodes: Sequence[Server]
    holders: Sequence[tuple[InstanceId, InstanceId]]
    """Memory instances: the name of each, and the name of its pool in the tree."""
    model: str
    is_on_cpu: bool
    block_tokens: int
    """Tokens for each key of the prompt."""
    kv_bytes_per_token: int | None
    """None: not known."""
    knows_blocks: bool
    """The cached blocks of the instances are known by the prompt's kind of keys."""


class InstanceSelector:
    """See the module."""

    def __init__(self, config: SelectorConfig, tree: Callable[[], GlobalPromptTree]) -> None:
        """`tree` gives the prompt tree of the instances that are members now."""
        self._config = config
        self._tree = tree
        self._load = LoadTracker(config.recent_s)
        self._costs: dict[str, OnlineCostModel] = {}
        self._turn = 0
        self._last: dict[InstanceId, int] = {}
        """The request that each prefill got last."""
        self._prediction_error = PredictionError()
        self._busy = BusyPeriods()

    @property
    def costs(self) -> Mapping[str, OnlineCostModel]:
        """The costs learned so far, by model."""
        return self._costs

    def decide(self, targets: Targets, prompt: Prompt, now_s: float) -> Decision | None:
        """Where a request would go now; None if there is no prefill."""
        if not targets.prefills:
            return None
        return decide(
            self._context(targets, prompt, now_s),
            self._costs_of(targets).model,
            *self._policies(targets, prompt),
            FETCH_RULES[self._config.fetch if len(prompt.chains) == 1 and not prompt.by_text else "never"],
        )

    def assign(
        self, decision: Decision, targets: Targets, prompt: Prompt, now_s: float, *, can_fetch: bool = True
    ) -> Assignment:
        """Carry out a decision: count it as load, and expect the prompt's blocks at its instances.

        `can_fetch`: whether the target can reach the source of the decision's fetch.
        """
        plan = None
        if decision.fetch is not None and can_fetch:
            plan = FetchPlan.of(
                decision.fetch, decision.chosen, prompt.chains[0], max_s=self._config.max_fetch_s
            )
        assignment = Assignment(
            number=self._turn,
            decision=decision,
            prompt=prompt,
            costs=self._costs_of(targets),
            plan=plan,
            begun_s=now_s,
            work_s=work_s_of(decision, plan),
            had_queue=self._load.num_queued(decision.prefill) > 0,
        )
        self._turn += 1
        self._enter(assignment)
        return assignment

    def fetched(self, assignment: Assignment, outcome: FetchOutcome) -> int:
        """The assignment's fetch is over; the number of blocks that it brought."""
        plan = assignment.plan
        assert plan is not None
        assignment.fetched = outcome
        num_new = max(outcome.num_blocks - plan.num_there, 0)
        if num_new and outcome.num_blocks >= len(plan.keys):
            assignment.costs.fetched(num_new * assignment.decision.context.page_tokens, outcome.seconds)
        return num_new

    def sent(self, assignment: Assignment, now_s: float) -> None:
        """The request is sent to its instances now."""
        assignment.begun_s = now_s
        self._busy.sent(assignment.prefill, assignment.number, now_s)

    def prefilled(
        self, assignment: Assignment, cached_tokens: int | None, now_s: float, *, is_timely: bool = True
    ) -> PrefillReport | None:
        """The first token has come; the prefill had `cached_tokens` of the prompt, if it reports that.

        `is_timely`: it came just now, not some time ago; only then there is a report. Idempotent.
        """
        if assignment.is_prefilled:
            return None
        assignment.is_prefilled = True
        assignment.cached_tokens = cached_tokens
        prefill, number = assignment.prefill, assignment.number
        self._load.prefill_done(prefill, number, now_s)
        work = work_of(assignment, cached_tokens) if is_timely else None
        if (busy := self._busy.done(prefill, number, work, now_s)) is not None:
            assignment.costs.worked(*busy)
        if not is_timely:
            return None
        assignment.prefilled_s = now_s
        seconds = now_s - assignment.begun_s
        is_alone = not assignment.had_queue and self._last.get(prefill) == number
        if is_alone:
            update_costs(assignment, seconds, cached_tokens)
        return self._prediction_error.record(assignment, seconds)

    def ended(self, assignment: Assignment, now_s: float) -> None:
        """No instance works on the request any more. Idempotent."""
        self._load.prefill_done(assignment.prefill, assignment.number, now_s)
        self._busy.done(assignment.prefill, assignment.number, None, now_s)
        self._load.decode_done(assignment.decode, assignment.number)

    def num_running(self, instance: InstanceId) -> int:
        """Number of requests that were assigned to the instance and have not ended."""
        return self._load.num_running(instance)

    def load(self, instance: InstanceId, now_s: float) -> Candidate:
        """The instance's load as a policy sees it."""
        return self._load.candidate(instance, NO_OVERLAP, now_s)

    def retain(self, instances: Collection[InstanceId], now_s: float) -> None:
        """Forget the load of all other instances."""
        kept = frozenset(instances)
        self._load.retain(kept, now_s)
        self._busy.retain(kept)
        for gone in self._last.keys() - kept:
            del self._last[gone]

    def _policies(self, targets: Targets, prompt: Prompt) -> tuple[str, str]:
        """The policies for prefill and decode.

        If the cached blocks of a prompt cannot be known and it names its session, "session" takes the
        place of a policy that needs tokens.
        """
        chosen = self._config.prefill_policy, self._config.decode_policy
        if prompt.session is None or (prompt.chains and targets.knows_blocks):
            return chosen
        if prompt.unknown is None and not prompt.by_text:
            return chosen
        prefill_policy, decode_policy = (
            "session" if "tokens" in find_policy(name).needs else name for name in chosen
        )
        return prefill_policy, decode_policy

    def _context(self, targets: Targets, prompt: Prompt, now_s: float) -> RoutingContext:
        overlaps = self._overlaps(prompt)

        def candidates(servers: Sequence[Server]) -> tuple[Candidate, ...]:
            candidate, get, no = self._load.candidate, overlaps.get, NO_OVERLAP
            return tuple(candidate(it.instance_id, get(it.instance_id, no), now_s) for it in servers)

        holders = (
            Candidate(name, overlap.depths, overlap.readable)
            for name, pool in targets.holders
            if (overlap := overlaps.get(pool)) is not None
        )
        return RoutingContext(
            prompt.num_tokens,
            targets.block_tokens,
            candidates(targets.prefills),
            candidates(targets.decodes),
            holders=tuple(holders),
            session=prompt.session,
            turn=self._turn,
            output_tokens=prompt.output_tokens,
        )

    def _overlaps(self, prompt: Prompt) -> Mapping[InstanceId, Overlap]:
        """The cached blocks by instance; for a batch, the sum over its prompts."""
        tree = self._tree()
        if len(prompt.chains) == 1:
            return by_server(tree.overlaps(prompt.chains[0]))
        sums: dict[InstanceId, Overlap] = {}
        for chain in prompt.chains:
            for instance, overlap in by_server(tree.overlaps(chain)).items():
                known = sums.get(instance, NO_OVERLAP)
                sums[instance] = Overlap(
                    tuple(map(add, known.depths, overlap.depths)), known.readable + overlap.readable
                )
        return sums

    def _enter(self, assignment: Assignment) -> None:
        prompt, prefill, decode = assignment.prompt, assignment.prefill, assignment.decode
        self._load.prefill_dispatched(prefill, assignment.number, assignment.work_s, assignment.begun_s)
        self._load.decode_dispatched(decode, assignment.number, prompt.num_tokens)
        self._last[prefill] = assignment.number
        queued_s = assignment.decision.chosen.queued_s
        until_s = assignment.begun_s + queued_s + assignment.work_s + self._config.expect_s
        tree = self._tree()
        for instance in (prefill, decode) if decode != prefill else (prefill,):
            if instance in tree:
                for chain in prompt.chains:
                    tree.expect(instance, chain, until_s)

    def _costs_of(self, targets: Targets) -> OnlineCostModel:
        costs = self._costs.get(targets.model)
        if costs is None:
            usual = CPU_COSTS if targets.is_on_cpu else GPU_COSTS
            costs = OnlineCostModel(self._config.start_costs or usual, certainty=self._config.certainty)
            self._costs[targets.model] = costs
        if targets.kv_bytes_per_token is not None:
            costs.set_kv_bytes_per_token(targets.kv_bytes_per_token)
        return costs
