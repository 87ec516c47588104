"""BoundedExecutor: order, bounds, errors, and what closing does to calls that run or wait."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from memserve.core.errors import PeerDeclined
from memserve.core.executor import BoundedExecutor, ExecutorStats


@pytest.fixture
def executor() -> Iterator[BoundedExecutor]:
    executor = BoundedExecutor("test", capacity=3)
    yield executor
    executor.close()


@pytest.fixture
def gate(executor: BoundedExecutor) -> Iterator[threading.Event]:
    """Keeps the only thread of `executor` busy until it is set."""
    gate, started = threading.Event(), threading.Event()
    executor.execute(lambda: (started.set(), gate.wait(10)))
    assert started.wait(10)
    yield gate
    gate.set()


def test_calls_run_in_order_of_submission(executor: BoundedExecutor, gate: threading.Event) -> None:
    seen: list[int] = []
    executor.execute(lambda: seen.append(1))
    future = executor.submit(lambda: [*seen, 2])
    gate.set()
    assert future is not None
    assert future.result(10) == [1, 2]


def test_executor_refuses_calls_beyond_its_capacity(executor: BoundedExecutor, gate: threading.Event) -> None:
    assert executor.execute(int)
    assert executor.submit(int) is not None
    assert not executor.execute(int)
    assert executor.submit(int) is None
    assert executor.stats() == ExecutorStats(running=1, waiting=2, refused=2)
    gate.set()
    executor.drain()
    assert executor.execute(int)


def test_submit_passes_memserve_errors_to_the_future(executor: BoundedExecutor) -> None:
    def decline() -> None:
        raise PeerDeclined("p", "no room")

    future = executor.submit(decline)
    assert future is not None
    with pytest.raises(PeerDeclined):
        future.result(10)
    assert executor.submit(int) is not None


def test_drop_waiting_cancels_calls_that_have_not_started(
    executor: BoundedExecutor, gate: threading.Event
) -> None:
    ran: list[int] = []
    executor.execute(lambda: ran.append(1))
    future = executor.submit(lambda: ran.append(2))
    executor.drop_waiting()
    assert future is not None
    assert future.cancelled()
    gate.set()
    executor.drain()
    assert not ran


def test_close_waits_for_the_running_call_and_drops_the_others(executor: BoundedExecutor) -> None:
    started, ran = threading.Event(), list[int]()

    def slow() -> None:
        started.set()
        time.sleep(0.05)
        ran.append(1)

    executor.execute(slow)
    executor.execute(lambda: ran.append(2))
    assert started.wait(10)
    executor.close()
    assert ran == [1]
    assert not executor.execute(int)
    executor.close()


def test_workers_run_calls_at_the_same_time() -> None:
    executor = BoundedExecutor("test", capacity=8, workers=2)
    both = threading.Barrier(2)
    futures = [executor.submit(lambda: both.wait(10)) for _ in range(2)]
    assert {future.result(10) for future in futures if future is not None} == {0, 1}
    executor.close()


@pytest.mark.parametrize(
    "call", ["execute(lambda: 1 / 0)", "submit(lambda: 1 / 0)", "execute(raise_declined)"]
)
def test_uncaught_exception_ends_the_process(call: str) -> None:
    program = (
        "import time\n"
        "from memserve.core.errors import PeerDeclined\n"
        "from memserve.core.executor import BoundedExecutor\n"
        "def raise_declined(): raise PeerDeclined('p', 'no room')\n"
        f"BoundedExecutor('test', capacity=1).{call}\n"
        "time.sleep(30)\n"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 1
    assert "cannot go on" in ended.stderr
