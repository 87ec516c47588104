"""The load generator: plans, parsed streams, records."""

from __future__ import annotations

import asyncio
from collections import namedtuple
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import load.run
from evaluation.grid import Grid, cells_of, done_in, estimate_s, left_of, without
from load.driver import drive
from load.plan import Plan, closed_loop, open_loop, traced
from load.records import Cell, Outcome, Run, Session, Turn, Workload, read_runs, write_run
from load.run import TRIES, run_undisturbed, stolen_between
from workloads import Settings

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def conversation(num_sessions: int = 3, num_turns: int = 4) -> Workload:
    turns = tuple(Turn((n, n, n), 2, at_s=10.0 + n) for n in range(1, num_turns + 1))
    return Workload("chat", tuple(Session(f"s{n}", turns) for n in range(num_sessions)))


def times(plan: Plan) -> list[tuple[float, ...]]:
    return [each.at_s for each in plan.sessions]


def test_open_loop_keeps_the_order_within_each_session_and_the_rate_over_all() -> None:
    plan = open_loop(conversation(50, 20), rate=4.0, active=5, seed=1)
    assert all(list(own) == sorted(own) for own in times(plan))
    assert max(max(own) for own in times(plan)) == pytest.approx(1000 / 4.0, rel=0.1)
    assert sorted(rank for each in plan.sessions for rank in each.ranks) == list(range(1000))


def test_open_loop_bounds_its_concurrent_sessions() -> None:
    spans = [(own[0], own[-1]) for own in times(open_loop(conversation(20, 10), 1.0, active=3, seed=2))]
    for begun, _ in spans:
        assert sum(begin <= begun <= end for begin, end in spans) <= 3


def test_open_loop_is_deterministic_for_a_seed() -> None:
    plans = [open_loop(conversation(), 2.0, 2, seed) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize(("rate", "active"), [(0.0, 1), (-1.0, 1), (1.0, 0)])
def test_open_loop_refuses_impossible_settings(rate: float, active: int) -> None:
    with pytest.raises(ValueError, match="open loop"):
        open_loop(conversation(), rate, active, 0)


def test_trace_load_scales_its_times_by_the_speed() -> None:
    assert times(traced(conversation(1, 3), speed=2.0)) == [(0.0, 0.5, 1.0)]


def test_trace_load_refuses_a_workload_without_times() -> None:
    timeless = Workload("chat", (Session("s", (Turn((1,), 2),)),))
    with pytest.raises(ValueError, match="give a rate"):
        traced(timeless, 1.0)


def stream(*lines: bytes, status: int = 200) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        for line in lines:
            await response.write(line)
        return response

    return answer


def asked(handler: Handler, plan: Plan) -> list[Outcome]:
    """The records of the plan's requests at a server with this handler."""

    async def run() -> list[Outcome]:
        app = web.Application()
        app.router.add_post("/generate", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        try:
            return await drive(f"http://{host}:{port}", plan)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


EVENTS = (
    b'data: {"output_ids": [7], "meta_info": {}}\n\n',
    b'data: {"output_ids": [7, 8], "meta_info": {}}\n\n',
    b': memserve {"prefill_cached_tokens": 48, '
    b'"prefill_cached_tokens_details": {"device": 16, "host": 32}}\n\n',
    b"data: [DONE]\n\n",
)


def test_client_records_a_stream_for_any_chunking() -> None:
    whole = b"".join(EVENTS)
    for chunks in (EVENTS, [whole], [whole[i : i + 7] for i in range(0, len(whole), 7)]):
        (one,) = asked(stream(*chunks), closed_loop(conversation(1, 1), 1))
        assert (one.error, one.output_tokens, one.prompt_tokens) == (None, 2, 3)
        assert (one.reused, one.reused_hbm, one.reused_dram) == (48, 16, 32)
        assert one.ttft_s is not None
        assert one.jct_s is not None
        assert one.tpot_s == pytest.approx(one.jct_s - one.ttft_s)


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (stream(b"no such model", status=404), "404: no such model"),
        (stream(EVENTS[0]), "before its end"),
        (stream(b"data: [DONE]\n\n"), "before its end"),
        (stream(b'data: {"error": {"message": "too long"}}\n\n', b"data: [DONE]\n\n"), "too long"),
        (stream(b"data: 7\n\n", b"data: [DONE]\n\n"), "no object"),
        (stream(b"data: {7\n\n", b"data: [DONE]\n\n"), "no JSON"),
        (stream(b": memserve 7}\n\n", *EVENTS), "no JSON"),
    ],
)
def test_client_records_a_malformed_answer_as_an_error_and_ends_its_session(
    handler: Handler, reason: str
) -> None:
    (one,) = asked(handler, closed_loop(conversation(1, 3), 1))
    assert one.error is not None
    assert reason in one.error
    assert one.jct_s is None


def test_client_sends_the_whole_conversation_with_each_turn() -> None:
    seen: list[list[int]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append((await request.json())["input_ids"])
        return await stream(*EVENTS)(request)

    outcomes = asked(answer, closed_loop(conversation(1, 3), 1, num_warmup=1))
    assert seen[2] == [1, 1, 1, 7, 8, 2, 2, 2, 7, 8, 3, 3, 3]
    assert [one.warmup for one in outcomes] == [True, False, False]


def test_closed_loop_keeps_its_number_of_sessions() -> None:
    now, most = 0, 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        response = await stream(*EVENTS)(request)
        now -= 1
        return response

    assert len(asked(answer, closed_loop(conversation(9, 2), 2))) == 18
    assert most <= 2


def test_records_are_read_back_without_a_truncated_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    outcome = Outcome("s", 0, 0.1, 0.2, 0.3, None, 10, 1)
    runs = [Run(Cell("steps", "a", "chat", 1.0, "below", n), 2.0, None, (outcome,)) for n in range(3)]
    for run in runs:
        write_run(path, run)
    path.write_bytes(path.read_bytes()[:-30])
    assert list(read_runs(path)) == runs[:2]
    write_run(path, runs[2])
    assert list(read_runs(path)) == runs


def test_evaluation_resumes_after_an_interruption(tmp_path: Path) -> None:
    grid = Grid("steps", ("a", "b"), {"chat": Settings(requests=10)}, repeats=2, loads=("below",))
    saturation = {"chat": 2.0}
    cells = list(cells_of(grid, saturation))
    assert [(cell.system, cell.repeat) for cell in cells] == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert {cell.rate for cell in cells} == {1.1}
    before = estimate_s(grid, saturation, done_in(tmp_path))
    for cell in cells:
        write_run(tmp_path / "runs.jsonl", Run(cell, 1.0, None, ()))
    assert before > 0 == estimate_s(grid, saturation, done_in(tmp_path))


def test_evaluation_skips_a_system_that_cannot_start() -> None:
    grid = Grid("steps", ("a", "b"), {"chat": Settings(requests=10)}, repeats=1, loads=("below",))
    left = left_of(without(grid, {"a": "no GPU"}), {"chat": 2.0}, done=())
    assert [cell.system for cell in left] == ["b"]


Times = namedtuple("Times", "user nice system idle iowait irq softirq steal guest guest_nice")


def test_stolen_time_is_a_share_of_the_wanted_time() -> None:
    before = Times(100, 0, 10, 500, 5, 0, 0, 1, 50, 0)
    after = Times(150, 0, 20, 900, 15, 0, 0, 21, 80, 0)
    assert stolen_between(before, after) == pytest.approx(20 / (50 + 10 + 20))
    assert stolen_between(before, before) == 0.0
    assert stolen_between(object(), object()) is None, "not every system tells"


@pytest.mark.parametrize(
    ("stolen", "kept", "tries"),
    [([0.0], 0.0, 1), ([None], None, 1), ([0.2, 0.01], 0.01, 2), ([0.2, 0.3, 0.1], 0.2, TRIES)],
)
def test_disturbed_run_is_repeated(
    stolen: list[float | None], kept: float | None, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell("steps", "a", "chat", 1.0, "below", 0)
    left = list(stolen)

    def run_once(*_: Any) -> Run:
        return Run(cell, 1.0, None, (), left.pop(0))

    monkeypatch.setattr(load.run, "run_once", run_once)
    target: Any = None
    assert run_undisturbed(target, cell, Plan(())).stolen == kept
    assert len(stolen) - len(left) == tries
