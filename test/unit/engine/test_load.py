"""What schedulers say of themselves, and since when they have not."""

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


def test_the_ranks_of_a_server_are_added_up_and_the_slowest_tells_the_age() -> None:
    clock, now = FakeClock(), [snapshot(0, 5.0), snapshot(1, 5.0, running=3)]
    read = LoadReader(lambda: now, clock)
    assert read() == Load(4, 4, 60, 200, 0.0)
    clock.advance(2.0)
    now[0] = snapshot(0, 7.0)
    assert read() == Load(4, 4, 60, 200, 2.0)
    now[1] = snapshot(1, 7.5, running=3)
    assert read() == Load(4, 4, 60, 200, 0.0)


def test_a_clock_that_jumps_makes_nobody_stuck() -> None:
    clock, now = FakeClock(), [snapshot(0, 5.0)]
    read = LoadReader(lambda: now, clock)
    read()
    clock.advance(1.0)
    now[0] = snapshot(0, -5000.0)
    load = read()
    assert load is not None
    assert load.step_age_s == 0.0


def test_nobody_says_anything() -> None:
    assert LoadReader(list)() is None


def test_what_cannot_be_read_is_not_said() -> None:
    def broken() -> list[object]:
        raise OSError("no such file")

    assert LoadReader(broken)() is None
