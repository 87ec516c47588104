"""Workloads: deterministic per seed, as published at full size, within the context, sharing as intended."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import show_workloads
from load.records import Session, Turn, Workload
from memserve.core.errors import ConfigError
from memserve.simulation.make_trace import main as make_trace
from workloads import NAMES, Settings, make, published
from workloads.draws import Draws
from workloads.sharegpt import fitted, num_turns
from workloads.statistics import compared, statistics_of, table

MADE = [name for name in NAMES if name != "trace"]
LINES = (
    '{"timestamp": 500, "input_length": 1000, "output_length": 40, "hash_ids": [7, 8]}',
    '{"timestamp": 1500, "input_length": 1100, "output_length": 8, "hash_ids": [7, 9, 10]}',
)
WriteTrace = Callable[..., Path]


@pytest.fixture
def trace(tmp_path: Path) -> WriteTrace:
    def write(*lines: str) -> Path:
        path = tmp_path / "trace.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def figures(name: str, settings: Settings) -> dict[str, float]:
    return statistics_of(make(name, settings))


@pytest.mark.parametrize("name", MADE)
def test_workload_depends_on_its_seed_and_shares_nothing_across_seeds(name: str) -> None:
    settings = Settings(requests=12, scale=0.1)
    one, other = make(name, settings), make(name, replace(settings, seed=1))
    assert one == make(name, settings)
    assert not {session.name for session in one.sessions} & {session.name for session in other.sessions}
    alone = [statistics_of(workload) for workload in (one, other)]
    both = statistics_of(Workload(name, one.sessions + other.sessions))
    reusable = [of["reusable"] * of["prompt_mean"] * of["requests"] for of in (*alone, both)]
    assert reusable[2] == pytest.approx(reusable[0] + reusable[1])


def test_workload_does_not_depend_on_the_hash_seed() -> None:
    made = "repr(make('loogle', Settings(requests=6, scale=0.01)))"
    root = Path(show_workloads.__file__).parent
    there = subprocess.run(
        [sys.executable, "-c", f"from workloads import Settings, make; print({made})"],
        env={"PYTHONPATH": f"{root}:{root.parent / 'python'}", "PYTHONHASHSEED": "5"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert there.stdout.strip() == repr(make("loogle", Settings(requests=6, scale=0.01)))


def test_workload_bytes_are_stable_across_versions() -> None:
    made = repr([make(name, Settings(requests=5, scale=0.05)) for name in MADE])
    assert hashlib.sha256(made.encode()).hexdigest()[:16] == "45b2208d626f6a68"


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("requests", [1, 2, 41])
def test_workload_has_the_requested_number_of_requests(name: str, requests: int) -> None:
    workload = make(name, Settings(requests=requests, scale=0.05))
    assert workload.num_requests == requests
    assert all(session.turns for session in workload.sessions)
    assert len({session.name for session in workload.sessions}) == len(workload.sessions)


def test_sharegpt_conversations_have_the_published_turns_and_lengths() -> None:
    draws = Draws("turns")
    turns = [num_turns(draws) for _ in range(20_000)]
    assert sum(turns) / len(turns) == pytest.approx(5.75, rel=0.02)
    assert sum(count > 1 for count in turns) / len(turns) == pytest.approx(0.73, abs=0.01)
    of = figures("sharegpt", Settings(requests=1000))
    assert of["turns_mean"] == pytest.approx(5.75, rel=0.12)
    assert of["multi_turn"] == pytest.approx(0.73, abs=0.06)
    assert 4 <= of["prompt_min"] < 20
    assert of["prompt_max"] == pytest.approx(2300, rel=0.02)


def test_sharegpt_short_conversations_have_the_published_sizes_and_long_ones_fit() -> None:
    assert fitted([(94.5, 348.2)]) == [(94.5, 348.2)]
    long = fitted([(100.0, 400.0)] * 10)
    assert sum(new + answer for new, answer in long) - long[-1][1] == pytest.approx(2300)
    draws = Draws("sizes")
    sizes = [draws.lognormal(94.5, 1.1) for _ in range(20_000)]
    assert sum(sizes) / len(sizes) == pytest.approx(94.5, rel=0.05)


def test_loogle_documents_have_the_published_sizes_and_sharing() -> None:
    of = figures("loogle", Settings(requests=240, questions=2, scale=0.2))
    assert of["prompt_mean"] == pytest.approx(23_500 * 0.2, rel=0.06)
    assert of["prompt_sd"] == pytest.approx(6_100 * 0.2, rel=0.15)
    assert of["output_mean"] == 3
    assert of["shared"] == pytest.approx(0.91, abs=0.005)
    assert of["reusable"] == pytest.approx(0.91 / 2, abs=0.02)


def test_loogle_document_has_three_sessions_that_share_it() -> None:
    workload = make("loogle", Settings(requests=40, scale=0.02, questions=8))
    documents: dict[tuple[int, ...], list[Session]] = {}
    for session in workload.sessions:
        documents.setdefault(session.turns[0].new_tokens[:64], []).append(session)
    assert [len(sessions) for sessions in documents.values()] == [3] * 5
    assert {sum(len(one.turns) for one in sessions) for sessions in documents.values()} == {8}
    assert not any(session.grows for session in workload.sessions)
    numbers = [session.name.split("-")[2] for session in workload.sessions]
    assert numbers != sorted(numbers)


def test_react_agents_share_their_examples_and_take_the_published_steps() -> None:
    workload = make("react", Settings(requests=600))
    of = statistics_of(workload)
    assert of["turns_mean"] == pytest.approx(20 / 6, rel=0.05)
    assert of["output_mean"] == pytest.approx(25.5 * 1.3, rel=0.03)
    firsts = [session.turns[0].new_tokens for session in workload.sessions]
    assert len({first[: round(940 * 1.3)] for first in firsts}) == 1
    assert len({first[round(940 * 1.3) :] for first in firsts}) == len(firsts)
    assert all(session.grows for session in workload.sessions)


def test_random_workload_shares_no_prefix() -> None:
    of = figures("random", Settings(requests=50, scale=0.5))
    assert (of["shared"], of["reusable"], of["multi_turn"]) == (0, 0, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("max_context", "min_output"), [(3, 2), (64, 2), (200, 150), (700, 2)])
def test_workload_never_exceeds_the_context(
    name: str, max_context: int, min_output: int, trace: WriteTrace
) -> None:
    settings = Settings(60, max_context=max_context, min_output=min_output, trace=trace(*LINES))
    for session in make(name, settings).sessions:
        history = 0
        for turn in session.turns:
            assert turn.new_tokens
            assert turn.num_output >= min_output
            assert history + len(turn.new_tokens) + turn.num_output <= max_context
            if session.grows:
                history += len(turn.new_tokens) + turn.num_output


@pytest.mark.parametrize("name", NAMES)
def test_workload_tokens_are_in_the_vocabulary(name: str, trace: WriteTrace) -> None:
    settings = Settings(10, scale=0.1, vocabulary=(3, 6), trace=trace(*LINES))
    turns = [turn for session in make(name, settings).sessions for turn in session.turns]
    assert {token for turn in turns for token in turn.new_tokens} == {3, 4, 5}


@pytest.mark.parametrize("name", MADE)
def test_workload_scales_answers_separately(name: str) -> None:
    settings = Settings(requests=30, scale=0.2)
    same, longer = (figures(name, replace(settings, output_scale=scale)) for scale in (None, 0.8))
    assert longer["output_mean"] == pytest.approx(4 * same["output_mean"], rel=0.25)
    assert longer["new_mean"] == same["new_mean"]


def test_trace_workload_keeps_times_sizes_and_sharing(trace: WriteTrace) -> None:
    settings = Settings(scale=0.25, trace=trace(*LINES))
    turns = [session.turns[0] for session in make("trace", settings).sessions]
    assert [turn.at_s for turn in turns] == [0.0, 1.0]
    assert [len(turn.new_tokens) for turn in turns] == [250, 275]
    assert [turn.num_output for turn in turns] == [10, 2]
    assert turns[0].new_tokens[:128] == turns[1].new_tokens[:128]
    assert turns[0].new_tokens[128:144] != turns[1].new_tokens[128:144]
    assert make("trace", replace(settings, requests=1)).num_requests == 1


def test_generated_trace_has_the_reuse_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "made.jsonl"
    assert make_trace(["loogle", "--requests", "60", "--sessions", "9", "-o", str(path)]) == 0
    settings = Settings(requests=60, scale=0.0625, trace=path)
    of = figures("trace", settings)
    beside = {one.statistic: one.value for one in published("trace", settings)}
    assert of["reusable"] == pytest.approx(beside["reusable"], abs=0.03)
    assert of["prompt_mean"] == pytest.approx(beside["prompt_mean"], rel=0.01)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ((LINES[0], "{"), "line 2"),
        ((LINES[0].replace("[7, 8]", "[7]"),), "1 hash_ids, but 1000 tokens are 2 blocks"),
        ((LINES[1], LINES[0]), "before the timestamp of the line above"),
        ((), "no request"),
    ],
)
def test_trace_workload_refuses_a_bad_line_with_its_number(
    lines: tuple[str, ...], says: str, trace: WriteTrace
) -> None:
    with pytest.raises(ConfigError, match=says):
        make("trace", Settings(trace=trace(*lines)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"requests": 0}, "requests is 0: give at least 1"),
        ({"scale": 0.0}, "scale is 0: give more than 0"),
        ({"output_scale": -1.0}, "output_scale is -1"),
        ({"max_context": 2}, "no room for a prompt"),
        ({"vocabulary": (10, 11)}, "vocabulary 10 to 11"),
    ],
)
def test_workload_settings_errors_name_the_remedy(change: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        replace(Settings(), **change)  # type: ignore[arg-type]


def test_workloads_refuse_unknown_names_and_a_trace_without_file() -> None:
    with pytest.raises(ConfigError, match="choose one of sharegpt, loogle"):
        make("chat", Settings())
    with pytest.raises(ConfigError, match=r"make_trace conversation -o FILE"):
        make("trace", Settings())


def test_workload_reuse_counts_whole_pages_of_history_and_answers() -> None:
    grown = Session("a", (Turn(tuple(range(20)), 30), Turn(tuple(range(100, 110)), 2)))
    of = statistics_of(Workload("w", (grown,)))
    # The second prompt has 20 + 30 + 10 tokens; of the first 50, no cache has the last: 3 pages.
    assert of["reusable"] == pytest.approx(48 / 80)
    assert of["shared"] == pytest.approx(2 * 16 / 80)
    twice = Session("b", (Turn(tuple(range(32)), 2),) * 2, grows=False)
    # The last token of a prompt is computed though its page is known.
    assert statistics_of(Workload("w", (twice,)))["reusable"] == pytest.approx(16 / 64)
    with pytest.raises(ValueError, match="without requests"):
        statistics_of(Workload("w", ()))


def test_workload_statistics_show_the_deviation_of_each_figure() -> None:
    settings = Settings(requests=20, scale=0.1, questions=5)
    of, beside = figures("loogle", settings), published("loogle", settings)
    lines = {line.split()[0]: line for line in table("loogle", of, beside).splitlines()}
    assert lines["shared"].split()[2:4] == ["91.0%", f"{of['shared'] / 0.91 - 1:+.0%}"]
    rows = compared(of, beside)
    assert rows["prompt_mean"]["deviation"] == pytest.approx(of["prompt_mean"] / 2350 - 1)
    assert "published" not in rows["sessions"]


def test_show_workloads_prints_tables_json_and_errors(
    capsys: pytest.CaptureFixture[str], trace: WriteTrace
) -> None:
    path = str(trace(*LINES))
    assert show_workloads.main(["react", "trace", "--scale", "0.1", "--trace", path]) == 0
    assert "react " in (printed := capsys.readouterr().out)
    assert "trace " in printed
    assert show_workloads.main(["--requests", "5", "--scale", "0.02", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == MADE
    assert show_workloads.main(["chat"]) == 2
    assert "error: there is no workload 'chat'" in capsys.readouterr().err
