"""Policies and decisions, as tables of contexts and expected choices."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.block_addr import LOCAL_TIERS
from memserve.core.errors import ConfigError
from memserve.core.ids import InstanceId
from memserve.router.command_line import parse_args
from memserve.scheduling import policies
from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.model import GPU_COSTS, CostModel, PathCost
from memserve.scheduling.decision import Decision, decide
from memserve.scheduling.fetch_planner import FETCH_RULES
from memserve.scheduling.load_tracker import LoadTracker
from memserve.scheduling.policies import all_policies, describe_policies, find_policy
from memserve.scheduling.prompt_tree.records import NO_OVERLAP, Overlap, TierCounts

SLOW_NETWORK = replace(GPU_COSTS, remote=PathCost(2e-3, 1e8))


def depths_of(in_hbm: int, cached: int) -> TierCounts:
    """All blocks that are not in HBM are in DRAM."""
    return (in_hbm, *(cached for _ in LOCAL_TIERS[1:]))


def candidate(name: str, total: int = 0, near: int | None = None, **load: float) -> Candidate:
    """All blocks are readable for others."""
    depths = depths_of(total if near is None else near, total)
    return Candidate(InstanceId(name), depths, total, **load)  # type: ignore[arg-type]


def context(*prefills: Candidate, **fields: object) -> RoutingContext:
    """A prompt of 10 blocks of 512 tokens."""
    return RoutingContext(5120, 512, prefills, **fields)  # type: ignore[arg-type]


def source_of(decision: Decision) -> str | None:
    return decision.fetch.source if decision.fetch else None


def chosen(policy: str, *prefills: Candidate, **fields: object) -> str:
    return decide(context(*prefills, **fields), GPU_COSTS, policy).prefill


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        pytest.param([candidate("a"), candidate("b", 8)], "b", id="history wins where nothing is queued"),
        pytest.param([candidate("a"), candidate("b", 8, queued_s=9.0)], "a", id="a long queue loses it"),
        pytest.param(
            [candidate("a"), candidate("b", 8, queued_s=0.05)], "b", id="a queue shorter than the work saved"
        ),
        pytest.param([candidate("a", 8, near=0), candidate("b", 8)], "b", id="near blocks before DRAM's"),
        pytest.param([candidate("a", 6), candidate("b", 8, near=0)], "b", id="DRAM before computing"),
        pytest.param([candidate("a", recent_s=1.0), candidate("b")], "b", id="idle: the least recent work"),
        pytest.param(
            [candidate("a", 1, recent_s=90.0), candidate("b")],
            "b",
            id="one shared block does not win for ever",
        ),
        pytest.param([candidate("a", 9, recent_s=3.0), candidate("b")], "a", id="recent work counts little"),
        pytest.param(
            [candidate("a", 0, queued_s=0.3, queued=9), candidate("b", 9, queued_s=0.5, queued=9)],
            "b",
            id="much work behind many keeps others waiting",
        ),
    ],
)
def test_prompt_tree_weighs_load_and_locality_in_one_sum(candidates: list[Candidate], expected: str) -> None:
    assert chosen("prompt_tree", *candidates) == expected
    assert chosen("prompt_tree", *reversed(candidates), turn=1) == expected


@pytest.mark.parametrize(
    ("policy", "candidates", "expected"),
    [
        ("longest_prefix", [candidate("a"), candidate("b", 1, queued_s=99.0)], "b"),
        ("least_load", [candidate("a", 9, queued_s=1.0), candidate("b", queued_s=0.9)], "b"),
        ("least_load", [candidate("a", decode_batch=2), candidate("b", decode_batch=1)], "b"),
        ("power_of_two", [candidate("a", queued_s=1.0), candidate("b")], "b"),
        ("round_robin", [candidate("a"), candidate("b", 9)], "a"),
    ],
)
def test_other_policies_rank_by_their_single_criterion(
    policy: str, candidates: list[Candidate], expected: str
) -> None:
    assert chosen(policy, *candidates) == expected


def test_round_robin_and_random_reach_every_candidate() -> None:
    names = [candidate(name) for name in "abcd"]
    turns = [chosen("round_robin", *names, turn=turn) for turn in range(8)]
    assert turns == list("abcd") * 2
    drawn = Counter(chosen("random", *names, turn=turn) for turn in range(1000))
    assert min(drawn.values()) > 200
    assert drawn != Counter(chosen("random", *names, turn=turn, seed=1) for turn in range(1000))


def test_power_of_two_never_chooses_the_most_loaded() -> None:
    names = [candidate(name, queued_s=load) for name, load in zip("abc", (3.0, 2.0, 1.0), strict=True)]
    drawn = Counter(chosen("power_of_two", *names, turn=turn) for turn in range(300))
    assert set(drawn) == {"b", "c"}


def test_session_moves_only_when_its_instance_leaves() -> None:
    names = [candidate(name) for name in "abcd"]
    homes = {session: chosen("session", *names, session=session) for session in range(200)}
    assert min(Counter(homes.values()).values()) > 30
    for session, home in homes.items():
        assert chosen("session", *reversed(names), session=session, turn=7) == home
        left = chosen("session", *names[1:], session=session)
        assert left == home or home == "a"


@pytest.mark.parametrize(
    ("own", "other", "costs", "source"),
    [
        pytest.param(2, 9, GPU_COSTS, "b", id="moving beats computing"),
        pytest.param(2, 9, SLOW_NETWORK, None, id="a slow network does not"),
        pytest.param(9, 2, GPU_COSTS, None, id="no candidate has more"),
        pytest.param(10, 10, GPU_COSTS, None, id="as much is not more"),
    ],
)
def test_fetch_happens_only_where_moving_beats_computing(
    own: int, other: int, costs: CostModel, source: str | None
) -> None:
    decision = decide(context(candidate("a", own), candidate("b", other, queued_s=60.0)), costs)
    if own < other:
        assert decision.prefill == "a"
    assert source_of(decision) == source


def test_transfer_hidden_by_the_queue_costs_nothing() -> None:
    prefills = [candidate("a", 2), candidate("b", 9, queued_s=600.0)]
    slow_s = SLOW_NETWORK.transfer_s(7 * 512)
    for queued_s, source in ((0.0, None), (0.5 * slow_s, None), (slow_s, "b")):
        prefills[0] = candidate("a", 2, queued_s=queued_s)
        decision = decide(context(*prefills), SLOW_NETWORK)
        assert (decision.prefill, source_of(decision)) == ("a", source)


def test_fetch_takes_the_holder_that_saves_most() -> None:
    holders = (candidate("memory0", 7), candidate("memory1", 9))
    decodes = (candidate("d", 8),)
    prefills = (candidate("a"), candidate("b", 3, queued_s=60.0))
    decision = decide(context(*prefills, decodes=decodes, holders=holders), GPU_COSTS)
    assert source_of(decision) == "memory1"
    assert decision.fetch is not None
    assert decision.fetch.num_blocks == 9
    assert decision.fetch.transfer_s <= decision.fetch.saved_s


def test_fetch_takes_the_readable_blocks_of_a_holder_only() -> None:
    in_hbm = Candidate(InstanceId("a"), depths_of(9, 10), readable_blocks=3, queued_s=60.0)
    partly = Candidate(InstanceId("b"), depths_of(8, 8), readable_blocks=7, queued_s=60.0)
    fetch = decide(context(candidate("c"), in_hbm, partly), GPU_COSTS).fetch
    assert fetch is not None
    assert (fetch.source, fetch.num_blocks) == ("b", 7)
    assert decide(context(candidate("c", 7), in_hbm, partly), GPU_COSTS).fetch is None


@pytest.mark.parametrize(
    ("decodes", "expected"),
    [
        ([candidate("a"), candidate("b", 8)], "b"),
        ([candidate("a"), candidate("b", 8, decode_batch=64, context_tokens=500_000)], "a"),
        ([candidate("a", decode_batch=9), candidate("b", decode_batch=8)], "b"),
    ],
)
def test_decode_is_chosen_by_its_blocks_and_its_load(decodes: list[Candidate], expected: str) -> None:
    decision = decide(context(candidate("p"), decodes=tuple(decodes)), GPU_COSTS)
    assert (decision.prefill, decision.decode) == ("p", expected)


def test_decision_scores_every_candidate_and_gives_a_reason() -> None:
    prefills = (candidate("a", 8, near=3, queued_s=0.01), candidate("b", 2), candidate("c"))
    decision = decide(context(*prefills, decodes=(candidate("d"),)), GPU_COSTS)
    assert [score.candidate for score in decision.scores] == list(prefills)
    assert decision.scores[0].total_s == min(score.total_s for score in decision.scores)
    assert decision.scores[0].load_s > 0
    assert decision.reason.startswith("a by prompt_tree: it has 8 of 10 blocks (3 in HBM), 0.01 s queued")
    assert "best of the others is b with 2 blocks" in decision.reason
    assert decision.reason.endswith("d decodes by prompt_tree.")


def test_decide_without_a_prefill_raises() -> None:
    with pytest.raises(ValueError, match="no prefill to choose from"):
        decide(context(), GPU_COSTS)


CANDIDATES = st.lists(
    st.builds(
        lambda name, near, far, queued_s, queued, recent_s: candidate(
            f"i{name}", near + far, near, queued_s=queued_s, queued=queued, recent_s=recent_s
        ),
        st.integers(0, 99),
        st.integers(0, 5),
        st.integers(0, 5),
        st.floats(0, 100),
        st.integers(0, 9),
        st.floats(0, 100),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda it: it.instance_id,
)


@given(CANDIDATES, st.sampled_from(list(all_policies())), st.integers(0, 99), st.none() | st.integers(0))
def test_every_policy_chooses_a_candidate_and_repeats_its_choice(
    candidates: list[Candidate], policy: str, turn: int, session: int | None
) -> None:
    given_ = context(*candidates, decodes=tuple(candidates), turn=turn, session=session)
    decision = decide(given_, GPU_COSTS, policy, policy)
    assert decision == decide(given_, GPU_COSTS, policy, policy)
    names = {it.instance_id for it in candidates}
    assert decision.prefill in names
    assert decision.decode in names
    assert source_of(decision) in names | {None}
    assert source_of(decision) != decision.prefill
    assert decision.reason


@given(CANDIDATES, st.integers(0, 99))
def test_prompt_tree_chooses_the_lowest_of_the_scores_it_shows(
    candidates: list[Candidate], turn: int
) -> None:
    given_ = context(*candidates, decodes=tuple(candidates), turn=turn)
    decision = decide(given_, GPU_COSTS)
    for name, scores in ((decision.prefill, decision.scores), (decision.decode, decision.decode_scores)):
        totals = {score.candidate.instance_id: score.total_s for score in scores}
        assert name is not None
        assert totals[name] == pytest.approx(min(totals.values()))


def test_registry_finds_every_policy_module_and_help_describes_each() -> None:
    folder = Path(policies.__file__).parent
    assert len(all_policies()) == len(list(folder.glob("[!_]*.py")))
    for name, policy in all_policies().items():
        assert policy.name == name
        assert find_policy(name) is policy
        assert f"{name}: {policy.help}" in describe_policies()


MINE = """
from memserve.scheduling.policy import Policy
def last(context, candidates, costs):
    "The last one."
    return [-i for i in range(len(candidates))]
def short(context, candidates, costs): return [0.0]
def other(context): return []
RECORD = Policy("mine", "help", last, frozenset({"tokens"}))
NUMBER = 7
"""


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_policies.py").write_text(MINE)
    (tmp_path / "broken_policies.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("my_module")
def test_policy_is_loaded_from_a_module_outside_the_package() -> None:
    names = [candidate(name) for name in "abc"]
    assert chosen("my_policies:last", *names) == "c"
    assert chosen("my_policies:RECORD", *names) == "c"
    assert find_policy("my_policies:last").help == "The last one."
    assert find_policy("my_policies:RECORD").needs == {"tokens"}
    with pytest.raises(ValueError, match="1 ranks for 3 candidates"):
        chosen("my_policies:short", *names)


@pytest.mark.usefixtures("my_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "prompt_tre",
            r"unknown policy prompt_tre: choose from (\w+, )*least_load, .*, or give MODULE:FUNCTION",
        ),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("broken_policies:f", "cannot import 'broken_policies': division by zero"),
        (":f", "cannot import ''"),
        ("my_policies:", "no function or Policy called ''"),
        ("my_policies:nothing", "no function or Policy called 'nothing'"),
        ("my_policies:NUMBER", "no function or Policy called 'NUMBER'"),
        ("my_policies:other", "has to take .context, candidates, costs."),
    ],
)
def test_policy_that_cannot_be_loaded_is_a_config_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_policy(name)
    with pytest.raises(ConfigError, match=message):
        parse_args(["--decode-policy", name])


@pytest.mark.parametrize("shared_blocks", [0, 1])
@pytest.mark.parametrize("warm_share", [0.0, 0.5])
@pytest.mark.parametrize("connections", [1, 2, 4, 8, 16, 32])
def test_cold_prompts_spread_at_any_concurrency(
    connections: int, warm_share: float, shared_blocks: int
) -> None:
    """Closed loop of `connections` over 4 instances; prompts share a prefix of `shared_blocks`."""
    names = [InstanceId(f"i{i}") for i in range(4)]
    load, random = LoadTracker(180.0), Random(connections)
    busy_until = dict.fromkeys(names, 0.0)
    seen: set[str] = set()
    cold: Counter[str] = Counter()
    free = [(0.0, i) for i in range(connections)]
    ends: list[tuple[float, int, str]] = []
    for turn in range(600):
        now_s, connection = heapq.heappop(free)
        while ends and ends[0][0] <= now_s:
            end_s, number, name = heapq.heappop(ends)
            load.prefill_done(InstanceId(name), number, end_s)
        is_warm, home = random.random() < warm_share, random.choice(names)
        candidates = []
        for name in names:
            blocks = 9 if is_warm and name == home else shared_blocks * (name in seen)
            candidates.append(load.candidate(name, Overlap(depths_of(blocks, blocks), 0), now_s))
        asked = RoutingContext(5120, 512, tuple(candidates), turn=turn)
        name = decide(asked, GPU_COSTS, fetch_rule=FETCH_RULES["never"]).prefill
        blocks = next(it.cached_blocks for it in candidates if it.instance_id == name)
        work_s = GPU_COSTS.exec_s(5120, asked.cached_tokens(blocks))
        load.prefill_dispatched(name, turn, work_s, now_s)
        busy_until[name] = max(busy_until[name], now_s) + work_s
        heapq.heappush(ends, (busy_until[name], turn, name))
        heapq.heappush(free, (busy_until[name], connection))
        seen.add(name)
        cold[name] += not is_warm
    shares = [cold[name] for name in names]
    assert max(shares) <= 1.3 * min(shares), shares


@pytest.mark.parametrize("num_before", [0, 1])
def test_new_instance_gets_an_equal_share_of_the_work(num_before: int) -> None:
    """Also if it got a request before `retain` named it."""
    old, new = InstanceId("old"), InstanceId("new")
    load, work_s, now_s = LoadTracker(180.0), GPU_COSTS.exec_s(5120, 0), 0.0
    load.retain({old, new}, now_s)
    load.retain({old}, now_s)
    for number in range(100):
        load.prefill_dispatched(old, number, work_s, now_s)
        now_s += work_s
        load.prefill_done(old, number, now_s)
    for number in range(100, 100 + num_before):
        load.prefill_dispatched(new, number, work_s, now_s)
        load.prefill_done(new, number, now_s)
    load.retain({old, new}, now_s)
    got = Counter[InstanceId]()
    for number in range(100, 200):
        candidates = tuple(load.candidate(name, NO_OVERLAP, now_s) for name in (old, new))
        name = decide(
            RoutingContext(5120, 512, candidates, turn=number), GPU_COSTS, fetch_rule=FETCH_RULES["never"]
        ).prefill
        load.prefill_dispatched(name, number, work_s, now_s)
        now_s += work_s
        load.prefill_done(name, number, now_s)
        got[name] += 1
    assert 40 <= got[new] <= 60
