"""The owner's gate and its visitors, in one process: each has descriptors and locks of its own."""

import os
import subprocess
import threading
from collections.abc import Iterator

import pytest

from memserve.core.errors import InstanceLost, StaleEpoch, TransferFailed, TransferTimeout
from memserve.core.ids import new_epoch
from memserve.testing.transport_process import DEADLINE_S
from memserve.transport.local.fence import EpochFence, RemoteFence
from memserve.transport.regions import Region

ME, SHORT_S = new_epoch(), 0.02


@pytest.fixture
def gate() -> Iterator[EpochFence]:
    gate = EpochFence(new_epoch())
    yield gate
    gate.close()


@pytest.fixture
def visitor(gate: EpochFence) -> Iterator[RemoteFence]:
    visitor = RemoteFence("owner", os.getpid(), gate.fd, gate.epoch)
    yield visitor
    visitor.close()


def test_a_visitor_sees_regions_come_and_go(gate: EpochFence, visitor: RemoteFence) -> None:
    gate.regions.add(Region(7, 4096, 100))
    assert list(visitor.regions) == [Region(7, 4096, 100)]
    gate.regions.remove(7)
    assert list(visitor.regions) == []


def test_clear_waits_for_visitors(gate: EpochFence, visitor: RemoteFence) -> None:
    cleared = threading.Thread(target=gate.clear, args=(DEADLINE_S,))
    with visitor.visit(ME, SHORT_S):
        with pytest.raises(TransferTimeout):
            gate.clear(SHORT_S)
        cleared.start()
        assert cleared.is_alive()
    cleared.join(DEADLINE_S)
    assert not cleared.is_alive()
    with visitor.visit(ME, SHORT_S):
        pass


def test_who_is_refused_stays_out(gate: EpochFence, visitor: RemoteFence) -> None:
    other = new_epoch()
    gate.refuse(ME)
    with pytest.raises(TransferFailed, match="fenced"), visitor.visit(ME, SHORT_S):
        pytest.fail("inside")
    with visitor.visit(other, SHORT_S):
        pass


def test_a_closed_gate_is_a_lost_instance(gate: EpochFence, visitor: RemoteFence) -> None:
    gate.close()
    gate.clear(SHORT_S)
    with pytest.raises(InstanceLost), visitor.visit(ME, SHORT_S):
        pytest.fail("inside")


def test_another_process_at_that_number_is_stale(gate: EpochFence) -> None:
    with pytest.raises(StaleEpoch):
        RemoteFence("owner", os.getpid(), gate.fd, new_epoch())
    with subprocess.Popen(["sleep", "60"]) as stranger:
        with pytest.raises(StaleEpoch):
            RemoteFence("owner", stranger.pid, 0, gate.epoch)
        stranger.kill()
    with pytest.raises(InstanceLost):
        RemoteFence("owner", stranger.pid, 0, gate.epoch)


def test_closing_during_a_visit_ends_it_first(gate: EpochFence) -> None:
    visitor = RemoteFence("owner", os.getpid(), gate.fd, gate.epoch)
    with visitor.visit(ME, SHORT_S):
        visitor.close()
        with pytest.raises(TransferTimeout):
            gate.clear(SHORT_S)
    gate.clear(SHORT_S)
    with pytest.raises(InstanceLost), visitor.visit(ME, SHORT_S):
        pytest.fail("inside")
