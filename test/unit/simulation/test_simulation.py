"""The simulator, its traces and its trace generators."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.block_keys import BlockKey
from memserve.core.errors import ConfigError
from memserve.scheduling.cost_model.model import GPU_COSTS
from memserve.scheduling.policies import all_policies
from memserve.simulation import __main__ as simulate
from memserve.simulation import make_trace
from memserve.simulation.instance import PromptCache
from memserve.simulation.make_trace import SHAPES
from memserve.simulation.report import Figures, figures, imbalance, percentile
from memserve.simulation.simulation import Outcome, SimulationConfig
from memserve.simulation.simulation import simulate as run
from memserve.simulation.traces import Trace, parse_trace


def trace_of(shape: str, **fields: int) -> Trace:
    make, usual = SHAPES[shape]
    wanted = replace(usual, **fields)
    return parse_trace(map(msgspec.json.encode, make(wanted)), shape, wanted.block_tokens)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return trace_of("conversation", requests=1200, seed=3)


def line(**changes: object) -> bytes:
    usual = {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
    return json.dumps(usual | changes).encode()


def summed(outcome: Outcome) -> Figures:
    return figures(outcome, GPU_COSTS)


# ---- traces


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b"{", "JSON|truncated"),
        (b"[1]", "Expected `object`"),
        (b'{"timestamp": 3}', "missing required field `input_length`"),
        (line(input_length="7"), "Expected `int`, got `str` - at `\\$.input_length`"),
        (line(hash_ids=[0, 1]), "2 hash_ids, but 1100 tokens are 3 blocks of 512"),
        (line(hash_ids=[0, 1, 1]), "a hash id is repeated"),
        (line(hash_ids=[0, 1, -2]), "hash ids have to be from 0"),
        (line(hash_ids=[0, 9, 2]), "block 2 follows 9 here and 1 in an earlier line"),
        (line(hash_ids=[1, 0, 2]), "block 1 follows None here and 0 in an earlier line"),
        (line(timestamp=999), "timestamp 999 is before the timestamp of the line above"),
        (line(timestamp=-1), "timestamp -1 is negative"),
        (line(input_length=0, hash_ids=[]), "a prompt has to have at least one token"),
        (line(output_length=-1), "output_length -1 is negative"),
    ],
)
def test_parse_trace_names_a_bad_line_and_its_error(bad: bytes, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^somewhere, line 3: .*({problem})"):
        parse_trace([line(), b"\n", bad], "somewhere")


def test_parse_trace_refuses_a_trace_without_requests() -> None:
    with pytest.raises(ConfigError, match="no request"):
        parse_trace([b"\n"], "somewhere")


def test_conversations_are_inferred_from_blocks_after_the_shared_first() -> None:
    lines = [[0, 1, 2], [0, 3, 4], [0, 1, 5], [0, 6, 7], [0, 3, 8]]
    trace = parse_trace([line(hash_ids=ids) for ids in lines], "t")
    assert [request.session for request in trace.requests] == [0, 1, 0, 2, 1]
    assert parse_trace([line(session_id=7)], "t").requests[0].session == 7


def test_ideal_hits_are_counted_from_the_first_block() -> None:
    trace = parse_trace([line(), line(hash_ids=[0, 1, 3]), line(hash_ids=[4, 5, 6])], "t")
    assert list(trace.ideal_depths()) == [0, 2, 0]
    assert trace.ideal_hit_ratio() == pytest.approx(2 / 9)


# ---- generated traces


@pytest.mark.parametrize("shape", SHAPES)
def test_generated_trace_is_valid_seeded_and_of_the_given_length(shape: str) -> None:
    once, again, other = (trace_of(shape, requests=200, seed=seed) for seed in (1, 1, 2))
    assert len(once.requests) == 200
    assert once == again != other


def test_conversation_shape_matches_the_quantiles_of_mooncakes_trace() -> None:
    trace = trace_of("conversation")
    prompts = [request.prompt_tokens for request in trace.requests]
    answers = [request.output_tokens for request in trace.requests]
    assert sum(prompts) / len(prompts) == pytest.approx(12_035, rel=0.1)
    for share, tokens in ((0.5, 6909), (0.9, 27_367), (0.99, 85_401)):
        assert percentile(prompts, share) == pytest.approx(tokens, rel=0.15)
    assert sum(answers) / len(answers) == pytest.approx(343, rel=0.1)
    assert trace.ideal_hit_ratio() == pytest.approx(0.366, abs=0.03)
    assert len({request.keys[0] for request in trace.requests}) == 1


def test_loogle_shape_matches_the_reuse_in_the_paper() -> None:
    trace = trace_of("loogle")
    prompts = [request.prompt_tokens for request in trace.requests]
    assert sum(prompts) / len(prompts) == pytest.approx(23_500, rel=0.15)
    assert len({request.session for request in trace.requests}) == 80
    assert len({request.keys[0] for request in trace.requests}) == 27
    assert trace.ideal_hit_ratio() == pytest.approx(0.91 * (1 - 27 / 250), abs=0.05)


def test_react_requests_share_their_shots_and_grow() -> None:
    trace = trace_of("react", block_tokens=64, requests=400)
    assert len({request.keys[:19] for request in trace.requests}) == 1
    assert trace.ideal_hit_ratio() > 0.8


# ---- the cache of an instance


def keys(*names: int) -> list[BlockKey]:
    return [BlockKey(bytes([name])) for name in names]


def test_prompt_cache_evicts_the_oldest_leaf_before_its_parent() -> None:
    cache = PromptCache(5)
    assert cache.insert(keys(1, 2, 3)) == (0, [])
    assert cache.insert(keys(1, 4)) == (1, [])
    assert cache.insert(keys(5, 6)) == (0, keys(3))
    assert cache.insert(keys(1, 2)) == (2, [])
    assert cache.insert(keys(7)) == (0, keys(4))
    assert cache.insert(keys(8)) == (0, keys(6))
    assert cache.depth(keys(1, 2, 3)) == 2
    assert cache.depth(keys(5, 6)) == 1


def test_prompt_cache_keeps_the_first_blocks_of_a_prompt_larger_than_itself() -> None:
    cache = PromptCache(2)
    assert cache.insert(keys(1, 2, 3, 4)) == (0, keys(4, 3))
    assert cache.depth(keys(1, 2, 3, 4)) == 2


CHAINS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=40)


@given(CHAINS, st.integers(1, 12))
def test_prompt_cache_is_prefix_closed_and_reports_every_change(
    chains: list[list[int]], capacity: int
) -> None:
    cache, told = PromptCache(capacity), set()
    for chain in chains:
        prompt = [BlockKey(bytes(chain[: i + 1])) for i in range(len(chain))]
        before, evicted = cache.insert(prompt)
        told |= set(prompt[before:])
        told -= set(evicted)
        held = [key for _, (key,) in cache.chains()]
        assert set(held) == told
        assert len(held) <= capacity
        for place, (parent, _) in enumerate(cache.chains()):
            assert parent is None or parent in held[:place]


# ---- simulations


@pytest.mark.parametrize("policy", all_policies())
@pytest.mark.parametrize("decodes", [0, 2])
def test_simulation_ends_every_request_once(trace: Trace, policy: str, decodes: int) -> None:
    part = Trace(trace.requests[:300], trace.block_tokens)
    config = SimulationConfig(3, decodes, 400_000, policy, policy, timed=True, speed=3.0)
    outcome = run(part, config)
    assert [job.request for job in outcome.jobs] == list(part.requests)
    for job in outcome.jobs:
        arrival_s = job.request.arrival_s / 3.0
        cached = min(job.hit_blocks * 512, job.request.prompt_tokens - 1)
        assert job.work_tokens == job.request.prompt_tokens - cached
        least_s = GPU_COSTS.exec_s(job.request.prompt_tokens, cached)
        assert job.first_token_s >= arrival_s + least_s - 1e-6
        steps = max(job.request.output_tokens - 1, 0)
        assert job.end_s >= job.first_token_s + steps * GPU_COSTS.decode.fixed_s - 1e-6


@pytest.mark.parametrize("timed", [False, True])
def test_simulation_repeats_with_the_same_seed(trace: Trace, timed: bool) -> None:
    part = Trace(trace.requests[:300], trace.block_tokens)
    config = SimulationConfig(4, 0, 200_000, "random", timed=timed, staleness_s=2.0, event_loss=0.05, seed=5)
    once, again = run(part, config), run(part, config)
    assert summed(once) == summed(again)
    assert once.jobs == again.jobs
    assert once.num_resyncs > 0


def test_one_unlimited_instance_reaches_the_ideal_hit_ratio(trace: Trace) -> None:
    for policy in all_policies():
        result = summed(run(trace, SimulationConfig(1, policy=policy)))
        assert result.block_hit_ratio == result.ideal_hit_ratio
        assert result.work_imbalance == 1


def test_prompt_tree_nears_the_ideal_in_balance_and_longest_prefix_collapses(trace: Trace) -> None:
    tree, longest, turns = (
        summed(run(trace, SimulationConfig(4, policy=policy)))
        for policy in ("prompt_tree", "longest_prefix", "round_robin")
    )
    assert tree.block_hit_ratio >= 0.97 * tree.ideal_hit_ratio
    assert tree.work_imbalance <= 1.05
    assert longest.work_imbalance > 3.9
    assert turns.block_hit_ratio < 0.7 * tree.block_hit_ratio


def test_late_and_lost_events_cost_few_hits(trace: Trace) -> None:
    exact = summed(run(trace, SimulationConfig(4, 0, 1_000_000)))
    stale = summed(run(trace, SimulationConfig(4, 0, 1_000_000, staleness_s=2.0, event_loss=0.01)))
    assert stale.resyncs > 0
    assert stale.block_hit_ratio >= 0.97 * exact.block_hit_ratio


def test_fetching_moves_blocks_and_saves_time(trace: Trace) -> None:
    with_fetch, without = (
        summed(run(trace, SimulationConfig(4, 0, 1_000_000, timed=True, can_fetch=can, speed=1.5)))
        for can in (True, False)
    )
    assert with_fetch.fetched_ratio > 0 == without.fetched_ratio
    assert with_fetch.block_hit_ratio > without.block_hit_ratio
    assert with_fetch.ttft_mean_s is not None
    assert without.ttft_mean_s is not None
    assert with_fetch.ttft_mean_s < without.ttft_mean_s


@pytest.mark.parametrize("cost_error", [0.2, 5.0])
def test_simulated_router_learns_costs_from_a_wrong_start(trace: Trace, cost_error: float) -> None:
    right, wrong = (
        summed(run(trace, SimulationConfig(4, timed=True, speed=1.5, cost_error=error)))
        for error in (1.0, cost_error)
    )
    assert right.prediction_error is None
    assert wrong.prediction_error is not None
    assert wrong.prediction_error < 0.01
    assert right.ttft_mean_s is not None
    assert wrong.ttft_mean_s == pytest.approx(right.ttft_mean_s, rel=0.25)


def test_single_request_takes_the_time_of_the_cost_model() -> None:
    trace = parse_trace([line(output_length=11)], "t")
    (job,) = run(trace, SimulationConfig(1, timed=True)).jobs
    assert job.first_token_s - 1 == pytest.approx(GPU_COSTS.exec_s(1100, 0))
    assert job.end_s - job.first_token_s == pytest.approx(10 * GPU_COSTS.step_s(1, 1100))
    (job,) = run(trace, SimulationConfig(1, 1, timed=True)).jobs
    moved_s = GPU_COSTS.remote.seconds(1100 * GPU_COSTS.kv_bytes_per_token)
    assert job.first_token_s - 1 == pytest.approx(GPU_COSTS.exec_s(1100, 0) + moved_s)


def test_requests_in_one_decode_batch_share_its_steps() -> None:
    lines = [line(output_length=101), line(output_length=51, hash_ids=[3, 4, 5])]
    first, second = run(parse_trace(lines, "t"), SimulationConfig(1, timed=True)).jobs
    alone_s = GPU_COSTS.step_s(1, 1100)
    assert second.end_s < first.end_s
    assert second.end_s - second.first_token_s == pytest.approx(50 * GPU_COSTS.step_s(2, 2200), rel=0.05)
    assert first.end_s - first.first_token_s > 100 * alone_s


@pytest.mark.parametrize(
    ("work", "expected"), [([1, 1, 1], 1.0), ([3, 0, 0], 3.0), ([2, 1], 4 / 3), ([0, 0], 1.0)]
)
def test_imbalance_is_maximum_over_mean(work: list[int], expected: float) -> None:
    assert imbalance(work) == pytest.approx(expected)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2), (0.51, 3), (0.99, 4), (1.0, 4), (0.0, 1)])
def test_percentile_is_one_of_the_values(share: float, expected: float) -> None:
    assert percentile([4, 1, 3, 2], share) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"instances": 0},
        {"decodes": -1},
        {"policy": "best"},
        {"capacity_tokens": 0},
        {"speed": 0.0},
        {"cost_error": 0.0},
        {"event_loss": 1.5},
        {"staleness_s": -1.0},
    ],
)
def test_simulation_config_refuses_impossible_values(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SimulationConfig(**wrong)  # type: ignore[arg-type]


# ---- the commands


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    assert make_trace.main(["conversation", "--requests", "200", "-o", str(path)]) == 0
    return path


def test_simulation_command_ends_with_one_json_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trace", str(file), "--instances", "2", "--capacity", "100000", "--policy", "session"]
    assert simulate.main([*flags, "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["policy"], result["instances"], result["ttft_p99_s"]) == ("session", 2, None)
    assert 0 < result["block_hit_ratio"] <= result["ideal_hit_ratio"]
    assert simulate.main([*flags, "--timed", "--load", "0.5"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["load"] == pytest.approx(0.5)
    assert 0 < result["ttft_p50_s"] <= result["ttft_p99_s"] <= result["latency_p99_s"]
    assert "200/200" in printed.err


def test_simulation_command_draws_plots(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an optional extra: memserve[plots]")
    folder = tmp_path / "new" / "plots"
    assert simulate.main(["--trace", str(file), "--timed", "--quiet", "--plots", str(folder)]) == 0
    drawn = {path.name: path.read_bytes()[:4] for path in folder.iterdir()}
    assert drawn == dict.fromkeys(["hit_ratio.png", "imbalance.png", "ttft.png", "fetches.png"], b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--instances", "0"], "at least one instance"),
        (["--load", "0.5"], "--load needs --timed"),
        (["--load", "-1", "--timed"], "--load has to be above 0"),
        (["--costs", "nowhere.json"], "No such file or directory; the built-in costs are gpu and cpu"),
        (["--block-tokens", "16"], "line 1: .* hash_ids, but"),
    ],
)
def test_bad_flag_ends_the_command_with_one_error_line(
    file: Path, flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate.main(["--trace", str(file), "--quiet", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (text,) = captured.err.splitlines()
    assert text.startswith("error: ")
    assert re.search(problem, text)
    assert make_trace.main(["conversation", "--requests", "0"]) == 2


def test_simulation_command_reads_a_fitted_cost_file(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = {
        "prefill": {"fixed_s": 0.0, "token_s": 1e-3, "token_pair_s": 0.0},
        "decode": {"fixed_s": 1e-3, "sequence_s": 0.0, "context_token_s": 0.0},
        "kv_bytes_per_token": 1000,
        "dram": {"latency_s": 0.0, "bytes_per_s": 1e9},
        "remote": {"latency_s": 0.0, "bytes_per_s": 1e9},
    }
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(costs))
    flags = ["--trace", str(file), "--timed", "--quiet", "--costs", str(path)]
    assert simulate.main(flags) == 0
    assert json.loads(capsys.readouterr().out)["token_mean_s"] == pytest.approx(1e-3)
    path.write_text(json.dumps(costs | {"decode": {}}))
    assert simulate.main(flags) == 2
    assert "missing required field `fixed_s` - at `$.decode`" in capsys.readouterr().err


@pytest.mark.parametrize("command", [simulate.main, make_trace.main])
def test_help_shows_examples(
    command: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(["--help"])
    assert "examples:" in capsys.readouterr().out
