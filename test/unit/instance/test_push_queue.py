"""What the outbox sends, drops, and counts."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from memserve.core.block_keys import page_keys
from memserve.core.caching import CachingMode
from memserve.core.errors import PeerDeclined
from memserve.core.ids import Epoch, InstanceId
from memserve.instance.push_queue import PushQueue, PushTask
from memserve.testing.cluster import wait_for
from memserve.wire.messages import PoolInfo, Role

PREFILL = PoolInfo(
    InstanceId("p"), Epoch(1), Role.PREFILL, CachingMode.FULL, "127.0.0.1:1", "", "127.0.0.1:2"
)


def errand(num_blocks: int) -> PushTask:
    return PushTask(PREFILL, page_keys([1] * num_blocks, 1), None)


class Postman:
    """Runs errands when it is let go, and fails those of three blocks."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.ran: list[int] = []

    def __call__(self, errand: PushTask) -> int:
        assert self.may_go.wait(10)
        self.ran.append(len(errand.keys))
        if len(errand.keys) == 3:
            raise PeerDeclined("p", "no room")
        return len(errand.keys) - 1


@pytest.fixture
def postman() -> Postman:
    return Postman()


@pytest.fixture
def outbox(postman: Postman) -> Iterator[PushQueue]:
    outbox = PushQueue(postman, capacity=2)
    yield outbox
    postman.may_go.set()
    outbox.close()


def wait_idle(outbox: PushQueue) -> None:
    wait_for(lambda: outbox.stats().waiting == 0, what="the outbox to be empty", timeout_s=10)


def test_push_tasks_run_in_order_and_are_counted(outbox: PushQueue, postman: Postman) -> None:
    postman.may_go.set()
    for num_blocks in (2, 3, 5):
        while not outbox.offer(errand(num_blocks)):
            wait_idle(outbox)
    wait_idle(outbox)
    stats = outbox.stats()
    assert [num for num in postman.ran if num != 3] == [2, 5]
    assert (stats.sent, stats.blocks, stats.failed) == (2, 1 + 4, 1)


def test_full_push_queue_drops_and_counts_tasks(outbox: PushQueue, postman: Postman) -> None:
    taken = [outbox.offer(errand(1)) for _ in range(10)]
    # One may have left the queue for the thread that is stuck with it.
    assert taken.count(True) in (2, 3)
    assert outbox.stats().dropped == taken.count(False)
    postman.may_go.set()
    wait_idle(outbox)
    assert outbox.stats().sent == taken.count(True)
    assert outbox.offer(errand(1))


def test_forget_drops_waiting_tasks_and_waits_for_the_running_one(
    outbox: PushQueue, postman: Postman
) -> None:
    outbox.offer(errand(1))
    outbox.offer(errand(2))
    forgetting = threading.Thread(target=outbox.forget)
    forgetting.start()
    wait_for(lambda: outbox.stats().waiting <= 1, what="what waits to be dropped", timeout_s=10)
    postman.may_go.set()
    forgetting.join(timeout=10)
    assert outbox.stats().waiting == 0
    assert len(postman.ran) <= 1
