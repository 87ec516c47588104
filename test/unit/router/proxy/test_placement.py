"""The global scheduler over a real tree, load tracker and pools: placement, load and learned costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.cache_events import Stored
from memserve.core.caching import CachingMode
from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.config import ClusterConfig
from memserve.router.cluster.instance import ClusterSnapshot, Instance, Pair, Single
from memserve.router.cluster.pools import Pools
from memserve.router.kv_events.synchronizer import TreeSynchronizer
from memserve.router.observability.metrics import RouterMetrics
from memserve.router.proxy.placement import GlobalScheduler, Placement
from memserve.router.server_info import ServerInfo
from memserve.scheduling.context import Prompt
from memserve.scheduling.cost_model.model import CPU_COSTS, GPU_COSTS, CostModel
from memserve.scheduling.fetch_planner import FetchOutcome
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree
from memserve.scheduling.selector import SelectorConfig
from memserve.testing.fake_clock import FakeClock
from memserve.wire.messages import PoolEvents, PoolInfo, Role

PAGE = 16
FACTS = ServerInfo("model", "/model", page_size=PAGE)
EPOCH = Epoch(7)
TOKENS = list(range(4096))
KEYS = page_keys(TOKENS, PAGE)
MEMORY = 4
"""The epoch of the memory instance."""


def instance(name: str, role: Role) -> Instance:
    return Instance(InstanceId(name), EPOCH, role, f"http://{name}:1", 8998, FACTS)


def pool(name: str, role: Role, epoch: int, layout: str = "aa", rank: int = 0) -> PoolInfo:
    return PoolInfo(
        InstanceId(name),
        Epoch(epoch),
        role,
        CachingMode.FULL,
        f"{name}:{epoch}",
        layout,
        "",
        PAGE * 1024,
        rank,
    )


@dataclass
class Observer:
    """Records the instances whose answers it is told."""

    answers: list[InstanceId] = field(default_factory=list)

    def record_prompt(self, keys: Sequence[BlockKey]) -> None:
        pass

    def record_answer(self, instance: InstanceId, keys: Sequence[BlockKey]) -> None:
        self.answers.append(instance)


class Stage:
    """Prefills a, b and decode d, their pools, and memory instance m."""

    def __init__(
        self,
        policy: str = "prompt_tree",
        fetch: str = "auto",
        start_costs: CostModel | None = GPU_COSTS,
    ) -> None:
        self.clock = FakeClock()
        self.pools = Pools(ClusterConfig(heartbeat_secs=1), self.clock)
        self.feed = TreeSynchronizer(GlobalPromptTree(clock=self.clock), self.pools, clock=self.clock)
        self.metrics = RouterMetrics()
        self.observer = Observer()
        settings = SelectorConfig(policy, policy, start_costs, 0.0, fetch)
        self.scheduler = GlobalScheduler(
            settings, self.feed, self.pools, self.observer, self.metrics, self.clock
        )
        self.snapshot = ClusterSnapshot.of(
            [instance("a", Role.PREFILL), instance("b", Role.PREFILL), instance("d", Role.DECODE)]
        )
        for epoch, (name, role) in enumerate(
            [("a", Role.PREFILL), ("b", Role.PREFILL), ("d", Role.DECODE), ("m", Role.MEMORY)], start=1
        ):
            self.pools.register(pool(name, role, epoch))

    def holds(self, epoch: int, num_blocks: int, tier: Tier = Tier.DRAM, sequence: int = 1) -> None:
        stored = Stored(sequence, tier, None, tuple(KEYS[:num_blocks]))
        layout = "aa" if epoch == MEMORY else ""
        self.feed.events(PoolEvents(Epoch(epoch), (stored,), layout))

    def place(self, prompt: Prompt) -> Placement:
        placement = self.scheduler.place(self.snapshot, prompt)
        assert placement is not None
        return placement

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"memserve_router_{name}", labels) or 0.0


def prompt(num_blocks: int = 256, extra: int = 10, **fields: object) -> Prompt:
    return Prompt(num_blocks * PAGE + extra, (KEYS[:num_blocks],), **fields)  # type: ignore[arg-type]


def test_prompt_goes_to_the_instance_that_holds_it() -> None:
    stage = Stage()
    stage.holds(2, 200)
    placement = stage.place(prompt())
    assert isinstance(placement.route, Pair)
    assert (str(placement.route), placement.assignment.plan) == ("b+d", None)


def test_queued_holder_loses_the_prompt_and_its_blocks_are_fetched() -> None:
    stage = Stage()
    stage.holds(2, 256)
    for _ in range(30):
        stage.scheduler._selector._load.prefill_dispatched(InstanceId("b"), -1 - _, 1.0, stage.clock())
    placement = stage.place(prompt())
    assert placement.assignment.prefill == "a"
    assert placement.assignment.plan is not None
    assert (placement.assignment.plan.source, len(placement.assignment.plan.keys)) == ("b", 256)
    assert [(own.address, other.address) for own, other in placement.links] == [("a:1", "b:2")]
    assert 0 < placement.assignment.plan.timeout_s <= 2.0
    assert placement.assignment.work_s < GPU_COSTS.exec_s(4106, 0) / 2, "fetched blocks need not be computed"


def test_blocks_of_a_memory_instance_are_fetched() -> None:
    stage = Stage()
    stage.holds(4, 256)
    plan = stage.place(prompt()).assignment.plan
    assert plan is not None
    assert plan.source == "m"


def test_short_history_is_recomputed_instead_of_fetched() -> None:
    stage = Stage()
    stage.holds(4, 2)
    assert stage.place(prompt(2)).assignment.plan is None


def test_blocks_only_in_hbm_are_not_fetched() -> None:
    stage = Stage()
    stage.holds(3, 256, Tier.HBM)
    stage.holds(3, 100, Tier.DRAM, sequence=2)
    stage.holds(4, 180)
    decision = stage.scheduler.decide(stage.snapshot, prompt())
    assert decision is not None
    assert decision.fetch is not None
    assert (decision.fetch.source, decision.fetch.num_blocks) == ("m", 180)


def test_pools_with_different_layouts_do_not_fetch() -> None:
    stage = Stage()
    stage.feed.events(PoolEvents(Epoch(MEMORY), (Stored(1, Tier.DRAM, None, tuple(KEYS)),), "bb"))
    assert stage.place(prompt()).assignment.plan is None, "the blocks are of another layout"
    stage = Stage()
    stage.pools.deregister(Epoch(3))
    stage.pools.register(pool("d", Role.DECODE, 9, layout="bb"))
    stage.holds(9, 256)
    assert stage.place(prompt()).assignment.plan is None
    assert stage.value("fetches_total", outcome="impossible") == 1


def test_every_rank_fetches_from_the_pool_of_its_layout() -> None:
    stage = Stage()
    for name, role, epoch in (("a", Role.PREFILL, 11), ("b", Role.PREFILL, 12), ("m", Role.MEMORY, 14)):
        stage.pools.register(pool(name, role, epoch, layout="cc", rank=1))
    stage.holds(4, 256)
    placement = stage.place(prompt())
    assert placement.assignment.plan is not None
    assert len(placement.links) == 2
    assert all(own.layout == other.layout for own, other in placement.links)


def test_burst_on_a_new_prompt_stays_on_one_instance() -> None:
    stage = Stage()
    first = stage.place(prompt()).assignment.prefill
    assert {stage.place(prompt()).assignment.prefill for _ in range(3)} == {first}


def test_expected_blocks_that_are_never_reported_expire() -> None:
    stage = Stage()
    stage.place(prompt())
    stage.clock.advance(60)
    decision = stage.scheduler.decide(stage.snapshot, prompt())
    assert decision is not None
    assert {it.cached_blocks for it in decision.context.prefills} == {0}


def test_decide_changes_nothing() -> None:
    stage = Stage()
    decisions = [stage.scheduler.decide(stage.snapshot, prompt()) for _ in range(3)]
    assert decisions[0] is not None
    assert all(one is not None and one.context == decisions[0].context for one in decisions)


@pytest.mark.parametrize("is_answered", [True, False])
def test_load_returns_to_zero_when_a_request_ends(is_answered: bool) -> None:
    stage = Stage()
    placement = stage.place(prompt())
    stage.clock.advance(0.01)
    stage.scheduler.ended(placement, is_answered=is_answered)
    stage.scheduler.ended(placement, is_answered=is_answered)
    decision = stage.scheduler.decide(stage.snapshot, prompt())
    assert decision is not None
    assert {(it.queued, it.running, it.queued_s) for it in decision.context.prefills} == {(0, 0, 0.0)}
    assert {it.decode_batch for it in decision.context.decodes} == {0}
    assert bool(stage.observer.answers) is is_answered


def test_prefill_alone_on_its_instance_refines_the_costs() -> None:
    stage = Stage()
    for _ in range(40):
        for num_blocks, seconds in ((16, 0.1), (64, 0.4), (256, 1.6)):
            placement = stage.place(prompt(num_blocks, extra=0))
            stage.clock.advance(seconds)
            stage.scheduler.prefilled(placement, 0)
            stage.scheduler.ended(placement, is_answered=True)
    costs = stage.scheduler.costs["model"]
    assert costs.model.exec_s(4096, 0) == pytest.approx(1.6, rel=0.05)
    assert costs.prefills.error < 0.2
    assert costs.model.kv_bytes_per_token == 1024, "as the pools say"


@pytest.mark.parametrize("is_on_cpu", [False, True])
def test_start_costs_follow_the_device_of_the_instance(is_on_cpu: bool) -> None:
    stage = Stage(start_costs=None)
    instances = stage.snapshot.all()
    stage.snapshot = ClusterSnapshot.of(
        replace(one, server_info=replace(one.server_info, is_on_cpu=is_on_cpu)) for one in instances
    )
    stage.place(prompt())
    begun = CPU_COSTS if is_on_cpu else GPU_COSTS
    assert stage.scheduler.costs["model"].model.prefill == begun.prefill


def test_overlapping_prefills_refine_the_costs_as_one_busy_period() -> None:
    stage = Stage()
    first, second = stage.place(prompt()), stage.place(prompt())
    assert first.assignment.prefill == second.assignment.prefill
    for placement in (first, second):
        stage.scheduler.sent(placement)
    stage.clock.advance(5.0)
    stage.scheduler.prefilled(first, 0)
    assert stage.scheduler.costs["model"].prefills.num_observed == 0
    stage.clock.advance(5.0)
    stage.scheduler.prefilled(second, 0)
    costs = stage.scheduler.costs["model"]
    assert costs.prefills.num_observed == 1
    assert costs.model.exec_s(first.prompt.num_tokens, 0) == pytest.approx(5.0, rel=0.02)


@pytest.mark.parametrize("end", ["fails", "says nothing"])
def test_busy_period_with_an_unknown_prefill_refines_nothing(end: str) -> None:
    stage = Stage()
    first, second = stage.place(prompt()), stage.place(prompt())
    for placement in (first, second):
        stage.scheduler.sent(placement)
    stage.clock.advance(5.0)
    if end == "fails":
        stage.scheduler.ended(first, is_answered=False)
    else:
        stage.scheduler.prefilled(first, None)
    stage.scheduler.prefilled(second, 0)
    assert stage.scheduler.costs["model"].prefills.num_observed == 0


def test_whole_fetch_is_counted_and_refines_the_remote_path() -> None:
    stage = Stage()
    stage.holds(4, 256)
    placement = stage.place(prompt())
    stage.clock.advance(0.5)
    before = stage.scheduler.costs["model"].model.remote
    stage.scheduler.fetched(placement, FetchOutcome(256, 0.5, ""))
    assert stage.value("fetches_total", outcome="whole") == 1
    assert stage.value("fetched_blocks_total") == 256
    assert stage.scheduler.costs["model"].model.remote != before
    stage.scheduler.sent(placement)
    assert placement.assignment.begun_s == stage.clock()


def test_requests_that_share_a_fetched_prefix_wait_for_the_fetch() -> None:
    stage = Stage("random")
    stage.holds(4, 256)
    first = stage.place(prompt())
    plan = first.assignment.plan
    assert plan is not None
    assert (plan.num_there, plan.target) in ((0, "a"), (0, "b"))
    others = [stage.place(prompt()) for _ in range(8)]
    by_target = {it.assignment.prefill == plan.target: it for it in others}
    assert by_target[True].assignment.benefits_from(plan)
    assert not by_target[False].assignment.benefits_from(plan)
    foreign = page_keys([9] * len(KEYS) * PAGE, PAGE)
    strangers = [stage.place(Prompt(256 * PAGE, (foreign,))) for _ in range(8)]
    assert any(it.assignment.prefill == plan.target for it in strangers)
    assert not any(it.assignment.benefits_from(plan) for it in strangers), "no block of it is theirs"
    for it in (first, *others, *strangers):
        stage.scheduler.ended(it, is_answered=False)
    other = page_keys([7] * len(KEYS) * PAGE, PAGE)
    for _ in range(8):
        unlike = stage.place(Prompt(256 * PAGE, ((*KEYS[:1], *other[1:]),)))
        assert not unlike.assignment.benefits_from(plan), "one block is not worth the wait for 256"
        stage.scheduler.ended(unlike, is_answered=False)
    stage.clock.advance(0.5)
    stage.scheduler.waited(0.5)
    stage.scheduler.sent(by_target[True])
    assert by_target[True].assignment.begun_s == stage.clock()
    assert stage.value("fetches_total", outcome="shared") == 1


@pytest.mark.parametrize(("num_blocks", "outcome"), [(0, "none"), (100, "part")])
def test_partial_fetch_is_counted_as_none_or_part(num_blocks: int, outcome: str) -> None:
    stage = Stage()
    stage.holds(4, 256)
    placement = stage.place(prompt())
    stage.scheduler.fetched(placement, FetchOutcome(num_blocks, 0.5, "gone"))
    assert stage.value("fetches_total", outcome=outcome) == 1


def test_worse_choice_is_observed_as_regret() -> None:
    stage = Stage("random", fetch="never")
    stage.holds(1, 250)
    stage.holds(2, 250)
    placement = stage.place(prompt())
    stage.clock.advance(9.0)
    stage.scheduler.prefilled(placement, 0)
    assert stage.value("regret_seconds_sum") > 8.0
    assert stage.value("prefill_seconds_error") > 0.5


def test_prompt_with_unknown_tokens_goes_by_its_session() -> None:
    stage = Stage()
    blind = Prompt(1000, (), session=12345, unknown="multimodal input")
    assert len({stage.place(blind).assignment.prefill for _ in range(8)}) == 1
    stage = Stage()
    nameless = Prompt(1000, (), unknown="multimodal input")
    assert len({stage.place(nameless).assignment.prefill for _ in range(8)}) == 2
    assert stage.value("unknown_tokens_total", reason="multimodal input") == 8


def test_overlap_of_a_batch_sums_its_prompts() -> None:
    stage = Stage()
    stage.holds(1, 10)
    others = page_keys([9] * 512, PAGE)
    stage.feed.events(PoolEvents(Epoch(2), (Stored(1, Tier.DRAM, None, tuple(others)),)))
    batch = Prompt(4096 + 512, (KEYS, others))
    decision = stage.scheduler.decide(stage.snapshot, batch)
    assert decision is not None
    assert [it.cached_blocks for it in decision.context.prefills] == [10, 32]
    assert (decision.prefill, decision.fetch) == ("b", None)


def test_data_parallel_rank_counts_as_its_server() -> None:
    stage = Stage()
    stage.pools.register(pool("b/dp1", Role.PREFILL, 21))
    stage.holds(21, 99)
    decision = stage.scheduler.decide(stage.snapshot, prompt())
    assert decision is not None
    assert [it.cached_blocks for it in decision.context.prefills] == [0, 99]


def snapshot_of(num_prefills: int, num_decodes: int, num_colocated: int) -> ClusterSnapshot:
    counts = {Role.PREFILL: num_prefills, Role.DECODE: num_decodes, Role.COLOCATED: num_colocated}
    return ClusterSnapshot.of(
        instance(f"{role}{i}", role) for role, count in counts.items() for i in range(count)
    )


@pytest.mark.parametrize("policy", ["round_robin", "prompt_tree", "least_load"])
@pytest.mark.parametrize(
    "counts", [(1, 1, 0), (2, 1, 0), (1, 2, 0), (2, 2, 0), (3, 2, 0), (0, 0, 3), (1, 1, 1)]
)
def test_cold_prompts_spread_evenly(policy: str, counts: tuple[int, int, int]) -> None:
    stage, snapshot = Stage(policy), snapshot_of(*counts)
    prefills: Counter[str] = Counter()
    decodes: Counter[str] = Counter()
    pairings: set[str] = set()
    for turn in range(60):
        cold = Prompt(1000, (page_keys([turn] * 992, PAGE),))
        placement = stage.scheduler.place(snapshot, cold)
        assert placement is not None
        prefills[placement.assignment.prefill] += 1
        if isinstance(placement.route, Single):
            assert placement.route.worker.role is Role.COLOCATED
        else:
            decodes[placement.assignment.decode] += 1
            pairings.add(str(placement.route))
        stage.clock.advance(0.5)
        stage.scheduler.prefilled(placement, 0)
        stage.scheduler.ended(placement, is_answered=True)
    assert len(prefills) == counts[0] + counts[2]
    assert len(decodes) == counts[1]
    for shares in (prefills, decodes):
        assert not shares or max(shares.values()) <= 1.3 * min(shares.values())
    if policy == "round_robin" and counts == (2, 2, 0):
        assert len(pairings) == 4


@pytest.mark.parametrize("counts", [(0, 0, 0), (3, 0, 0), (0, 3, 0)])
def test_place_returns_none_without_a_whole_pair(counts: tuple[int, int, int]) -> None:
    assert Stage().scheduler.place(snapshot_of(*counts), prompt()) is None
