"""The load that schedulers report, and the age of the report."""

from __future__ import annotations

from types import SimpleNamespace

from memserve.engine.load import LoadReader
from memserve.testing.fake_clock import FakeClock
from memserve.wire.messages import Load


def snapshot(rank: int, stamp: float, running: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        dp_rank=rank,
        timestamp=stamp,
        num_running_reqs=running,
        num_waiting_reqs=2,
        num_used_tokens=30,
        max_total_num_tokens=100,
    )


def test_load_sums_the_ranks_and_takes_the_age_of_the_slowest() -> None:
    clock, now = FakeClock(), [snapshot(0, 5.0), snapshot(1, 5.0, running=3)]
    read = LoadReader(lambda: now, clock)
    assert read() == Load(4, 4, 60, 200, 0.0)
    clock.advance(2.0)
    now[0] = snapshot(0, 7.0)
    assert read() == Load(4, 4, 60, 200, 2.0)
    now[1] = snapshot(1, 7.5, running=3)
    assert read() == Load(4, 4, 60, 200, 0.0)


def test_load_age_ignores_jumps_of_the_wall_clock() -> None:
    clock, now = FakeClock(), [snapshot(0, 5.0)]
    read = LoadReader(lambda: now, clock)
    read()
    clock.advance(1.0)
    now[0] = snapshot(0, -5000.0)
    load = read()
    assert load is not None
    assert load.step_age_s == 0.0


def test_load_is_none_when_schedulers_report_nothing() -> None:
    assert LoadReader(list)() is None


def test_load_is_none_when_shared_memory_cannot_be_read() -> None:
    def broken() -> list[object]:
        raise OSError("no such file")

    assert LoadReader(broken)() is None
