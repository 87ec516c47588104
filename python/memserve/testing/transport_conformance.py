"""The tests that every transport has to pass, against a real second process. Needs pytest.

    class TestLocal(TransportConformance):
        transport_name = "local"

Knows transports by their contract only. A class attribute declares a guarantee that a transport lacks.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import pytest

from memserve.core.errors import (
    InstanceLost,
    MemServeError,
    OutOfBounds,
    StaleEpoch,
    TransferFailed,
    TransferTimeout,
)
from memserve.core.ids import Epoch, new_epoch
from memserve.testing.transport_peer import TIMEOUT_S, PeerProcess, open_transport
from memserve.testing.transport_process import DEADLINE_S, wait_until
from memserve.transport.base import Peer
from memserve.transport.copies import Copies, Copy
from memserve.transport.regions import Region

NUM_BYTES = 48 << 20
"""More than the socket buffers of both ends, so that a stopped peer stops a copy."""
MIB = 1 << 20


class Own:
    """The end in this process: a transport and its region 1."""

    def __init__(self, name: str) -> None:
        self.epoch = new_epoch()
        self.transport = open_transport(name, self.epoch)
        self.memory = np.zeros(NUM_BYTES, np.uint8)
        self.region = Region(1, self.memory.ctypes.data, NUM_BYTES)
        self.transport.register(self.region)

    def write(self, peer: Peer, *copies: Copy, timeout_s: float = TIMEOUT_S) -> None:
        self.transport.write(peer, Copies.of(copies), timeout_s=timeout_s)

    def randomize(self, num_bytes: int, seed: int = 1) -> bytes:
        data = np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)
        self.memory[:num_bytes] = data
        return data.tobytes()


class TransportConformance:
    """Base class of a transport's test class, which sets `transport_name`."""

    transport_name: ClassVar[str]
    can_fence: ClassVar[bool] = True
    """Whether the owner of a region can refuse a peer."""
    needs_running_peer: ClassVar[bool] = True
    """Whether a copy waits for a stopped peer."""
    always_settles: ClassVar[bool] = True
    """Whether `settle` ends a copy that timed out, after its peer runs again."""

    @pytest.fixture(scope="class")
    @classmethod
    def shared_own(cls) -> Iterator[Own]:
        own = Own(cls.transport_name)
        yield own
        own.transport.close()

    @pytest.fixture(scope="class")
    @classmethod
    def shared_child(cls) -> Iterator[PeerProcess]:
        child = PeerProcess(cls.transport_name, NUM_BYTES)
        yield child
        child.kill()

    @pytest.fixture
    def own(self, shared_own: Own) -> Own:
        shared_own.memory[: 8 * MIB] = 0
        return shared_own

    @pytest.fixture
    def child(self, shared_child: PeerProcess) -> PeerProcess:
        """A peer for tests that leave it running."""
        shared_child.ask("fill", value=0)
        return shared_child

    @pytest.fixture
    def mortal(self) -> Iterator[PeerProcess]:
        """A peer for tests that stop or kill it."""
        child = PeerProcess(self.transport_name, NUM_BYTES)
        yield child
        child.kill()

    @pytest.fixture
    def own_alone(self) -> Iterator[Own]:
        own = Own(self.transport_name)
        yield own
        own.transport.close()

    def test_write_copies_the_bytes_to_the_target_range_only(self, own: Own, child: PeerProcess) -> None:
        data = own.randomize(MIB)
        own.write(child.peer, Copy(1, 0, 1, 2 * MIB, MIB))
        assert child.bytes(2 * MIB, 3 * MIB) == data
        assert child.bytes(2 * MIB - 64, 2 * MIB) == bytes(64)
        assert child.bytes(3 * MIB, 3 * MIB + 64) == bytes(64)

    def test_read_copies_the_bytes(self, own: Own, child: PeerProcess) -> None:
        child.ask("fill", value=7)
        own.transport.read(
            child.peer, Copies.of([Copy(1, 100, 1, 5, 3000), Copy(1, 9000, 1, 0, 1)]), timeout_s=TIMEOUT_S
        )
        expected = np.zeros(10_000, np.uint8)
        expected[100:3100] = 7
        expected[9000] = 7
        assert (own.memory[:10_000] == expected).all()

    def test_later_copies_overwrite_earlier_ones(self, own: Own, child: PeerProcess) -> None:
        own.memory[:300] = np.repeat(np.array([1, 2, 3], np.uint8), 100)
        own.write(child.peer, Copy(1, 0, 1, 0, 100), Copy(1, 100, 1, 50, 100), Copy(1, 200, 1, 25, 50))
        expected = np.array([1] * 25 + [3] * 50 + [2] * 75, np.uint8)
        assert child.bytes(0, 150) == expected.tobytes()

    def test_overlapping_sources_may_be_copied_in_one_call(self, own: Own, child: PeerProcess) -> None:
        data = own.randomize(200)
        own.write(child.peer, Copy(1, 0, 1, 0, 150), Copy(1, 50, 1, 1000, 150))
        assert child.bytes(0, 150) == data[:150]
        assert child.bytes(1000, 1150) == data[50:]

    def test_empty_copies_move_nothing(self, own: Own, child: PeerProcess) -> None:
        data = own.randomize(16)
        own.write(child.peer)
        own.write(child.peer, Copy(1, 0, 1, 8, 0))
        assert child.bytes(0, 32) == bytes(32)
        own.write(child.peer, Copy(1, 0, 1, 0, 0), Copy(1, 0, 1, 8, 4), Copy(1, NUM_BYTES, 1, NUM_BYTES, 0))
        assert child.bytes(0, 16) == bytes(8) + data[:4] + bytes(4)

    @pytest.mark.parametrize("num_bytes", [1, 3, 4095, 4097, 65_537])
    def test_copies_need_no_alignment(self, own: Own, child: PeerProcess, num_bytes: int) -> None:
        data = own.randomize(num_bytes + 17)
        own.write(child.peer, Copy(1, 17, 1, 4093, num_bytes))
        assert child.bytes(4092, 4094 + num_bytes) == b"\0" + data[17:] + b"\0"

    def test_ten_thousand_scattered_copies_move_in_one_call(self, own: Own, child: PeerProcess) -> None:
        count, size = 10_000, 700
        own.randomize(count * size)
        order = np.random.default_rng(2).permutation(count).astype(np.int64)
        ones = np.ones(count, np.int64)
        copies = Copies(ones, np.arange(count, dtype=np.int64) * size, ones, order * size, ones * size)
        own.transport.write(child.peer, copies, timeout_s=TIMEOUT_S)
        expected = np.empty((count, size), np.uint8)
        expected[order] = own.memory[: count * size].reshape(count, size)
        assert child.digest(0, count * size) == hashlib.sha256(expected.data).hexdigest()
        own.memory[: count * size] = 0
        own.transport.read(child.peer, copies, timeout_s=TIMEOUT_S)
        assert (own.memory[: count * size].reshape(count, size) == expected[order]).all()

    @pytest.mark.parametrize(
        "wrong",
        [
            Copy(1, 0, 1, NUM_BYTES - 3, 4),
            Copy(1, NUM_BYTES - 3, 1, 0, 4),
            Copy(1, 0, 1, -1, 4),
            Copy(1, -1, 1, 0, 4),
            Copy(1, 0, 1, 0, -4),
            Copy(1, 0, 1, NUM_BYTES + 1, 0),
            Copy(1, 0, 1, (1 << 63) - 2, 4),
            Copy(1, 0, 1, 4, (1 << 63) - 2),
            Copy(2, 0, 1, 0, 4),
            Copy(1, 0, 2, 0, 4),
            Copy(1, 0, -1, 0, 0),
        ],
    )
    def test_range_outside_a_region_is_refused_before_a_byte_moves(
        self, own: Own, child: PeerProcess, wrong: Copy
    ) -> None:
        own.memory[:64] = 9
        with pytest.raises(OutOfBounds):
            own.write(child.peer, Copy(1, 0, 1, 0, 64), wrong)
        assert child.bytes(0, 64) == bytes(64)
        own.write(child.peer, Copy(1, 0, 1, 0, 64))
        assert child.bytes(0, 64) == bytes([9] * 64)

    def test_copy_to_another_epoch_is_refused(self, own: Own, child: PeerProcess) -> None:
        own.memory[:64] = 9
        stale = Peer("child", Epoch(child.peer.epoch ^ 2), child.peer.address, child.peer.regions)
        with pytest.raises(StaleEpoch):
            own.write(stale, Copy(1, 0, 1, 0, 64))
        with pytest.raises(StaleEpoch):
            own.transport.connect(stale, timeout_s=TIMEOUT_S)
        assert child.bytes(0, 64) == bytes(64)

    def test_threads_write_at_the_same_time(self, own: Own, child: PeerProcess) -> None:
        data = own.randomize(8 * MIB)
        errors = _run_all([lambda i=i: _write_slices(own, child.peer, i) for i in range(4)])  # type: ignore[misc]
        assert errors == []
        assert child.digest(0, 8 * MIB) == hashlib.sha256(data).hexdigest()

    def test_no_byte_lands_in_a_deregistered_region(self, own: Own, mortal: PeerProcess) -> None:
        own.memory[:64] = 9
        own.write(mortal.peer, Copy(1, 0, 1, 0, 64))
        mortal.ask("fill", value=0)
        mortal.ask("deregister")
        with pytest.raises((OutOfBounds, TransferFailed)):
            own.write(mortal.peer, Copy(1, 0, 1, 0, 64))
        assert mortal.bytes(0, 64) == bytes(64)

    def test_copy_fails_when_its_peer_is_killed(self, own_alone: Own, mortal: PeerProcess) -> None:
        writer = _Writer(own_alone, mortal.peer)
        writer.wait_for_writes()
        mortal.kill()
        assert isinstance(writer.error(), InstanceLost | TransferFailed | TransferTimeout)
        with pytest.raises((InstanceLost, TransferFailed, TransferTimeout)):
            own_alone.write(mortal.peer, Copy(1, 0, 1, 0, 64))

    def test_peer_stopped_in_a_copy_gets_no_late_bytes(self, own_alone: Own, mortal: PeerProcess) -> None:
        transport, peer = own_alone.transport, mortal.peer
        start, num_bytes = MIB, NUM_BYTES - 2 * MIB
        own_alone.memory[:] = 9
        transport.connect(peer, timeout_s=TIMEOUT_S)
        mortal.stop()
        if not self.needs_running_peer:
            own_alone.write(peer, Copy(1, 0, 1, start, num_bytes), timeout_s=1.0)
            mortal.resume()
            assert mortal.digest(start, start + num_bytes) == hashlib.sha256(b"\x09" * num_bytes).hexdigest()
            return
        with pytest.raises(TransferTimeout):
            own_alone.write(peer, Copy(1, 0, 1, start, num_bytes), timeout_s=0.5)
        with pytest.raises(TransferTimeout):
            transport.settle(peer, timeout_s=0.2)
        mortal.resume()
        if self.always_settles:
            transport.settle(peer, timeout_s=TIMEOUT_S)
            mortal.ask("fill", value=0)  # as if the memory belonged to another request now
            own_alone.write(peer, Copy(1, 0, 1, 0, 64))
            assert mortal.digest(start, NUM_BYTES) == hashlib.sha256(bytes(NUM_BYTES - start)).hexdigest()
        assert mortal.digest(64, start) == hashlib.sha256(bytes(start - 64)).hexdigest()
        end = start + num_bytes
        assert mortal.digest(end, NUM_BYTES) == hashlib.sha256(bytes(NUM_BYTES - end)).hexdigest()

    def test_close_ends_a_running_copy(self, own_alone: Own, mortal: PeerProcess) -> None:
        writer = _Writer(own_alone, mortal.peer)
        writer.wait_for_writes()
        own_alone.transport.close()
        assert isinstance(writer.error(), TransferFailed)
        with pytest.raises(TransferFailed):
            own_alone.write(mortal.peer, Copy(1, 0, 1, 0, 64))
        own_alone.transport.close()

    def test_restarted_peer_is_another_peer(self, own_alone: Own, mortal: PeerProcess) -> None:
        own_alone.memory[:64] = 9
        own_alone.write(mortal.peer, Copy(1, 0, 1, 0, 64))
        mortal.kill()
        again = self.restarted(mortal)
        try:
            with pytest.raises((StaleEpoch, InstanceLost)):
                own_alone.write(mortal.peer, Copy(1, 0, 1, 0, 64))
            with pytest.raises((StaleEpoch, InstanceLost)):
                own_alone.write(mortal.peer, Copy(1, 0, 1, 0, 64))
            assert again.bytes(0, 64) == bytes(64)
            own_alone.write(again.peer, Copy(1, 0, 1, 0, 64))
            assert again.bytes(0, 64) == bytes([9] * 64)
        finally:
            again.kill()

    def restarted(self, dead: PeerProcess) -> PeerProcess:
        """A new process, at the dead process's address if the transport allows a choice."""
        return PeerProcess(self.transport_name, NUM_BYTES)

    def test_fenced_peer_writes_no_more_bytes(self, own_alone: Own, mortal: PeerProcess) -> None:
        region = (1, own_alone.region.address, own_alone.region.num_bytes)
        mortal.ask("flood", epoch=own_alone.epoch, address=own_alone.transport.address, region=region)
        assert own_alone.memory[0] == 0xEE
        if not self.can_fence:
            with pytest.raises(TransferFailed):
                own_alone.transport.fence(mortal.peer.epoch, timeout_s=TIMEOUT_S)
            return
        own_alone.transport.fence(mortal.peer.epoch, timeout_s=TIMEOUT_S)
        own_alone.memory[:] = 0
        assert mortal.ask("flood_end") in ("InstanceLost", "TransferFailed")
        with pytest.raises(Exception, match="fenced"):
            mortal.ask("flood", epoch=own_alone.epoch, address=own_alone.transport.address, region=region)
        assert not own_alone.memory.any()


class _Writer:
    """Writes large copies on a thread until a copy fails."""

    def __init__(self, own: Own, peer: Peer) -> None:
        self._own = own
        self._peer = peer
        self._num_writes = 0
        self._error: MemServeError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_for_writes(self) -> None:
        wait_until(lambda: self._num_writes > 0, "a first write")

    def error(self) -> MemServeError | None:
        self._thread.join(DEADLINE_S)
        return self._error

    def _run(self) -> None:
        try:
            while True:
                self._own.write(self._peer, Copy(1, 0, 1, 0, NUM_BYTES), timeout_s=3.0)
                self._num_writes += 1
        except MemServeError as error:
            self._error = error


def _write_slices(own: Own, peer: Peer, part: int) -> None:
    """Write a quarter of the first 8 MiB, in 64 calls."""
    size = 32 * 1024
    for i in range(64):
        at = part * 2 * MIB + i * size
        own.write(peer, Copy(1, at, 1, at, size))


def _run_all(actions: list[Callable[[], None]]) -> list[MemServeError]:
    errors: list[MemServeError] = []

    def run(action: Callable[[], None]) -> None:
        try:
            action()
        except MemServeError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads)
    return errors
