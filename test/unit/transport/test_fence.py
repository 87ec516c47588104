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
def remote(gate: EpochFence) -> Iterator[RemoteFence]:
    remote = RemoteFence("owner", os.getpid(), gate.fd, gate.epoch)
    yield remote
    remote.close()


def test_remote_fence_sees_registered_and_removed_regions(gate: EpochFence, remote: RemoteFence) -> None:
    gate.regions.add(Region(7, 4096, 100))
    assert list(remote.regions) == [Region(7, 4096, 100)]
    gate.regions.remove(7)
    assert list(remote.regions) == []


def test_clear_waits_for_running_accesses(gate: EpochFence, remote: RemoteFence) -> None:
    cleared = threading.Thread(target=gate.clear, args=(DEADLINE_S,))
    with remote.access(ME, SHORT_S):
        with pytest.raises(TransferTimeout):
            gate.clear(SHORT_S)
        cleared.start()
        assert cleared.is_alive()
    cleared.join(DEADLINE_S)
    assert not cleared.is_alive()
    with remote.access(ME, SHORT_S):
        pass


def test_fence_keeps_a_refused_epoch_out(gate: EpochFence, remote: RemoteFence) -> None:
    other = new_epoch()
    gate.refuse(ME)
    with pytest.raises(TransferFailed, match="fenced"), remote.access(ME, SHORT_S):
        pytest.fail("inside")
    with remote.access(other, SHORT_S):
        pass


def test_closed_fence_is_a_lost_instance(gate: EpochFence, remote: RemoteFence) -> None:
    gate.close()
    gate.clear(SHORT_S)
    with pytest.raises(InstanceLost), remote.access(ME, SHORT_S):
        pytest.fail("inside")


def test_fence_of_another_process_with_the_same_pid_is_stale(gate: EpochFence) -> None:
    with pytest.raises(StaleEpoch):
        RemoteFence("owner", os.getpid(), gate.fd, new_epoch())
    with subprocess.Popen(["sleep", "60"]) as stranger:
        with pytest.raises(StaleEpoch):
            RemoteFence("owner", stranger.pid, 0, gate.epoch)
        stranger.kill()
    with pytest.raises(InstanceLost):
        RemoteFence("owner", stranger.pid, 0, gate.epoch)


def test_close_during_an_access_waits_for_its_end(gate: EpochFence) -> None:
    remote = RemoteFence("owner", os.getpid(), gate.fd, gate.epoch)
    with remote.access(ME, SHORT_S):
        remote.close()
        with pytest.raises(TransferTimeout):
            gate.clear(SHORT_S)
    gate.clear(SHORT_S)
    with pytest.raises(InstanceLost), remote.access(ME, SHORT_S):
        pytest.fail("inside")
