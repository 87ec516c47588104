"""The selector alone: a prompt tree, names of instances and a time. No router."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest

from memserve.core.block_addr import Tier
from memserve.core.block_keys import page_keys
from memserve.core.cache_events import Stored
from memserve.core.ids import Epoch, InstanceId
from memserve.scheduling.assignment import Assignment
from memserve.scheduling.context import Prompt
from memserve.scheduling.cost_model.model import GPU_COSTS
from memserve.scheduling.explain import explained
from memserve.scheduling.fetch_planner import FetchOutcome
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree
from memserve.scheduling.selector import InstanceSelector, SelectorConfig, Targets

PAGE = 16
KEYS = page_keys(list(range(4096)), PAGE)
PROMPT = Prompt(4100, (KEYS,))
A, B, D, M = (InstanceId(name) for name in "abdm")


@dataclass(frozen=True)
class Named:
    instance_id: InstanceId


TARGETS = Targets((Named(A), Named(B)), (Named(D),), [(M, M)], "model", False, PAGE, 1024, True)


class Setup:
    """Prefills a and b, decode d, memory m, and the blocks that each holds in HBM and in DRAM."""

    def __init__(self, policy: str = "prompt_tree", fetch: str = "auto", **held: tuple[int, int]) -> None:
        self.tree = GlobalPromptTree(clock=lambda: 0.0)
        config = SelectorConfig(policy, policy, GPU_COSTS, 0.0, fetch)
        self.selector = InstanceSelector(config, lambda: self.tree)
        for name in (A, B, D, M):
            self.tree.join(name, Epoch(1))
            for number, tier in enumerate((Tier.HBM, Tier.DRAM), 1):
                keys = tuple(KEYS[: held.get(name, (0, 0))[tier]])
                self.tree.apply(name, Epoch(1), [Stored(number, tier, None, keys)])

    def assign(self, targets: Targets = TARGETS, prompt: Prompt = PROMPT) -> Assignment:
        decision = self.selector.decide(targets, prompt, now_s=0.0)
        assert decision is not None
        return self.selector.assign(decision, targets, prompt, now_s=0.0)


def test_assign_counts_load_and_expects_the_blocks_until_the_request_ends() -> None:
    it = Setup()
    assignment = it.assign()
    prefill, decode = assignment.prefill, assignment.decode
    load = it.selector.load(prefill, 0.0)
    assert (load.queued, load.running, load.queued_s) == (1, 1, pytest.approx(assignment.work_s))
    assert it.selector.num_running(decode) == 1
    assert {name: one.cached for name, one in it.tree.overlaps(KEYS).items()} == {prefill: 256, decode: 256}
    it.selector.sent(assignment, 0.0)
    report = it.selector.prefilled(assignment, 0, 2.0)
    assert report is not None
    assert report.seconds == 2.0
    assert it.selector.prefilled(assignment, 0, 3.0) is None, "said twice"
    it.selector.ended(assignment, 3.0)
    assert [it.selector.num_running(name) for name in (prefill, decode)] == [0, 0]


def test_tokens_of_a_placed_prompt_are_told_apart_by_tier() -> None:
    by_tier, remote = Setup(a=(100, 200), b=(0, 0)).assign().tokens_by_tier()
    assert by_tier[: Tier.DRAM + 1] == (100 * PAGE, 100 * PAGE)
    assert (sum(by_tier), remote) == (200 * PAGE, 0)
    by_tier, remote = Setup(m=(0, 256)).assign().tokens_by_tier()
    assert (sum(by_tier), remote) == (0, 256 * PAGE)
    assert Setup().assign().tokens_by_tier() == ((0,) * len(by_tier), 0)


def test_decode_that_is_no_prefill_is_fetched_from() -> None:
    plan = Setup(d=(10, 240)).assign().plan
    assert plan is not None
    assert (plan.source, len(plan.keys), plan.num_there) == (D, 240, 0)


def test_fetch_that_cannot_be_carried_out_leaves_the_whole_prompt_to_compute() -> None:
    it = Setup(m=(0, 256))
    decision = it.selector.decide(TARGETS, PROMPT, 0.0)
    assert decision is not None
    assert decision.fetch is not None
    without = it.selector.assign(decision, TARGETS, PROMPT, 0.0, can_fetch=False)
    assert without.plan is None
    assert without.work_s == pytest.approx(GPU_COSTS.exec_s(4100, 0))


@pytest.mark.parametrize(("num_blocks", "num_new"), [(256, 256), (100, 100), (0, 0)])
def test_fetched_counts_the_blocks_and_only_a_whole_fetch_refines_the_costs(
    num_blocks: int, num_new: int
) -> None:
    it = Setup(m=(0, 256))
    assignment = it.assign()
    before = it.selector.costs["model"].model.remote
    assert it.selector.fetched(assignment, FetchOutcome(num_blocks, 0.5, "")) == num_new
    assert (it.selector.costs["model"].model.remote != before) is (num_blocks == 256)


def test_prefill_that_loads_blocks_from_dram_refines_the_load_costs() -> None:
    it = Setup(a=(0, 256))
    assignment = it.assign()
    it.selector.sent(assignment, 0.0)
    before = it.selector.costs["model"].model
    it.selector.prefilled(assignment, 256 * PAGE, 5.0)
    after = it.selector.costs["model"].model
    assert after.load[Tier.DRAM] != before.load[Tier.DRAM]
    assert after.prefill == before.prefill


def test_policy_that_needs_tokens_gives_way_to_the_session_where_tokens_are_unknown() -> None:
    unknown = Prompt(4100, session=7, unknown="multimodal input")
    decision = Setup().selector.decide(TARGETS, unknown, 0.0)
    assert decision is not None
    assert decision.policies == ("session", "session")
    decision = Setup("round_robin").selector.decide(TARGETS, unknown, 0.0)
    assert decision is not None
    assert decision.policies == ("round_robin", "round_robin")
    by_text = Prompt(4100, (KEYS,), by_text=True, session=7)
    for knows_blocks, policy in ((True, "prompt_tree"), (False, "session")):
        targets = msgspec.structs.replace(TARGETS, knows_blocks=knows_blocks)
        decision = Setup().selector.decide(targets, by_text, 0.0)
        assert decision is not None
        assert decision.policies[0] == policy
        assert decision.fetch is None


def test_explanation_shows_blocks_by_tier_and_the_parts_that_the_policy_summed() -> None:
    assignment = Setup(a=(100, 200), b=(50, 50)).assign()
    shown = explained(assignment.decision, None)
    candidates = shown["prefill_candidates"]
    assert isinstance(candidates, list)
    first = candidates[0]
    assert (first["instance"], first["hbm_blocks"], first["dram_blocks"], first["blocks"]) == (
        A,
        100,
        100,
        200,
    )
    parts = ("queue_s", "load_s", "exec_s", "others_s", "recent_s")
    assert first["total_s"] == pytest.approx(sum(first[part] for part in parts), abs=1e-5)
    assert len(explained(assignment.decision, None, max_listed=1)["prefill_candidates"]) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "held_by_memory", "blocks"),
    [("never", 60, None), ("auto", 60, 60), ("auto", 1, None), ("always", 1, 1), ("always", 0, None)],
)
def test_fetch_rule_decides_which_blocks_are_fetched(
    rule: str, held_by_memory: int, blocks: int | None
) -> None:
    it = Setup(fetch=rule, m=(0, held_by_memory))
    plan = it.assign().plan
    assert (None if plan is None else len(plan.keys)) == blocks


def test_fetch_rule_always_waits_up_to_the_limit_of_a_fetch() -> None:
    plan = Setup(fetch="always", m=(0, 1)).assign().plan
    assert plan is not None
    assert plan.timeout_s == 2.0
