"""What is left behind when another process dies, stops or restarts: nothing, and a count of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memserve.core.errors import InstanceLost, MemServeError, StaleEpoch, TransferFailed, TransferTimeout
from memserve.core.ids import Epoch
from memserve.peering.remote_process import PeerAddress
from memserve.testing.transport_process import ChildProcess, wait_until

from ..harness import keys_of, store
from .pair import end, once, running

PROMPT = [1, 2, 3, 4]
NUM_SLOTS = 12
TIMEOUT_S = 1.0
LOST = (InstanceLost, TransferFailed, TransferTimeout)


class Child(ChildProcess):
    """A second process with a pool, which ends what is overdue after `reservation_s`."""

    def __init__(self, transport: str = "tcp", reservation_s: float = 30.0, port: int = 0) -> None:
        path = Path(__file__).with_name("peer_process.py")
        super().__init__(str(path), transport, str(NUM_SLOTS), str(reservation_s), str(port))
        self.peer = PeerAddress(self.greeting["control"], Epoch(self.greeting["epoch"]))
        self.port = int(self.peer.control.rsplit(":", 1)[1])

    def has(self, prompt: list[int]) -> int:
        return int(self.ask("has", prompt=prompt))

    def stats(self) -> dict[str, int]:
        return dict(self.ask("stats"))

    def is_clean(self) -> bool:
        stats = self.stats()
        return not any(stats[name] for name in ("private", "reserved", "quarantined", "leases"))


@contextmanager
def child(transport: str = "tcp", reservation_s: float = 30.0, port: int = 0) -> Iterator[Child]:
    process = Child(transport, reservation_s, port)
    try:
        yield process
    finally:
        process.resume()
        process.kill()


def failed(attempt: Callable[[], object]) -> MemServeError:
    """What it raises, which is that a peer is lost."""
    with pytest.raises(LOST) as caught:
        attempt()
    return caught.value


@pytest.mark.parametrize("transport", ["tcp", "local"])
def test_two_processes_exchange_blocks(transport: str) -> None:
    here = end(transport)
    with child(transport) as other, running(here):
        store(here.pool, PROMPT)
        assert here.peers.transfer_with_insert(other.peer, here.pool, keys_of(PROMPT)).num_sent == 4
        assert other.has(PROMPT) == 4
        other.ask("put", prompt=[5, 6, 7])
        assert here.peers.fetch(other.peer, here.pool, keys_of([5, 6, 7]), timeout_s=TIMEOUT_S) == 3
        assert here.has([5, 6, 7]) == 3
        assert other.is_clean()


@pytest.mark.parametrize("transport", ["tcp", "local"])
def test_a_peer_killed_in_a_push_costs_an_error(transport: str) -> None:
    here = end(transport)
    with child(transport) as other, running(here):
        store(here.pool, PROMPT)
        once(here.hooks, "before_copy", other.kill)
        failed(lambda: here.peers.transfer_with_insert(other.peer, here.pool, keys_of(PROMPT)))
        here.assert_clean()
        assert here.peers.stats().failures == 1


@pytest.mark.parametrize("transport", ["tcp", "local"])
def test_a_peer_killed_in_a_fetch_costs_an_error(transport: str) -> None:
    here = end(transport)
    with child(transport) as other, running(here):
        other.ask("put", prompt=PROMPT)
        once(here.hooks, "before_copy", other.kill)
        failed(lambda: here.peers.fetch(other.peer, here.pool, keys_of(PROMPT), timeout_s=TIMEOUT_S))
        wait_until(lambda: here.peers.stats().quarantined == 0, "the read to be settled")
        here.assert_clean()
        assert here.has(PROMPT) == 0


@pytest.mark.parametrize("is_told", [True, False], ids=["membership", "deadline"])
def test_reservation_of_a_dead_writer_is_freed(is_told: bool) -> None:
    here = end(reservation_s=30.0 if is_told else 1.0)
    with child() as other, running(here):
        other.ask("reserve", control=here.peer.control, epoch=here.peer.epoch, num_blocks=3)
        assert here.pool.stats().reserved + here.pool.stats().quarantined == 3
        other.kill()
        if is_told:
            here.peers.gone(other.peer.epoch)
        wait_until(lambda: here.pool.stats().free == NUM_SLOTS, "the blocks to be freed")
        assert here.peers.stats().fenced == 1
        here.assert_clean()


def test_late_write_never_lands_in_a_block_with_a_new_owner() -> None:
    here = end(reservation_s=0.2)
    with child(reservation_s=1.0) as other, running(here):
        store(here.pool, PROMPT)
        once(here.hooks, "before_copy", other.stop)
        failed(
            lambda: here.peers.transfer_with_insert(other.peer, here.pool, keys_of(PROMPT))
        )  # in the child's socket now
        here.assert_clean()
        other.resume()
        wait_until(lambda: other.stats()["fenced"] == 1 and other.is_clean(), "the quarantine to end")
        assert other.ask("fill", first=100) == NUM_SLOTS, "every slot holds what its new owner wrote"
        push = lambda: here.peers.transfer_with_insert(other.peer, here.pool, keys_of(PROMPT))  # noqa: E731
        assert push().num_sent == 4, "and we are on speaking terms again"
        assert other.has(PROMPT) == 4


def test_a_peer_stopped_in_a_fetch_leaves_nothing_when_it_runs_again() -> None:
    here = end()
    with child() as other, running(here):
        other.ask("put", prompt=PROMPT)
        once(here.hooks, "before_copy", other.stop)
        failed(lambda: here.peers.fetch(other.peer, here.pool, keys_of(PROMPT), timeout_s=TIMEOUT_S))
        assert here.has(PROMPT) == 0
        assert here.pool.stats().reserved == 0
        other.resume()
        wait_until(lambda: here.peers.stats().quarantined == 0, "the read to be settled")
        here.assert_clean()
        assert here.peers.fetch(other.peer, here.pool, keys_of(PROMPT), timeout_s=TIMEOUT_S) == 4


def test_failed_read_is_settled_when_its_peer_is_reported_gone() -> None:
    here = end(timeout_s=0.5)
    with child() as other, running(here):
        other.ask("put", prompt=PROMPT)
        once(here.hooks, "before_copy", other.stop)
        failed(lambda: here.peers.fetch(other.peer, here.pool, keys_of(PROMPT), timeout_s=TIMEOUT_S))
        assert here.peers.stats().quarantined == len(PROMPT)
        here.peers.gone(other.peer.epoch)
        wait_until(lambda: here.peers.stats().quarantined == 0, "the read to be settled")


def test_a_child_that_restarts_at_its_port_is_another_process() -> None:
    here = end()
    with child() as other, running(here):
        store(here.pool, PROMPT)
        assert here.peers.transfer_with_insert(other.peer, here.pool, keys_of(PROMPT[:1])).num_sent == 1
        other.kill()
        with child(port=other.port) as again:
            with pytest.raises(StaleEpoch):
                here.peers.transfer_with_insert(other.peer, here.pool, keys_of(PROMPT))
            assert here.peers.transfer_with_insert(again.peer, here.pool, keys_of(PROMPT)).num_sent == 4
            assert again.has(PROMPT) == 4


def test_a_byte_flipped_in_another_processs_arena_is_a_miss() -> None:
    here = end()
    with child() as other, running(here):
        other.ask("put", prompt=PROMPT)
        other.ask("flip", prompt=PROMPT)
        assert here.peers.fetch(other.peer, here.pool, keys_of(PROMPT), timeout_s=TIMEOUT_S) == 3
        assert here.has(PROMPT) == 3
        assert here.peers.stats().corrupt_on_arrival == 1
        assert other.is_clean()
