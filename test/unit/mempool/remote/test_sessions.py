"""What is known of a peer: what is over stays over, and who is fenced stays out."""

from __future__ import annotations

import pytest

from memserve.core.errors import InstanceLost, TransferTimeout
from memserve.core.ids import Epoch
from memserve.core.kv_layout import TransferMode
from memserve.mempool.remote.config import PeersConfig
from memserve.mempool.remote.sessions import (
    EXCHANGE_OVER,
    CompletedExchange,
    IdempotencyLog,
    PeerSessions,
)
from memserve.testing.faulty_link import Fault
from memserve.wire.messages import Done, Refused, Unknown
from memserve.wire.peer_messages import (
    Cancel,
    Commit,
    Committed,
    Declined,
    Hello,
    Reserve,
    Reserved,
    Welcome,
)

from ..harness import LAYOUT, keys_of, store
from .harness import RESERVATION_S, Node, World
from .network import Mishap

KEYS = keys_of([1, 2, 3])
WRITER = Epoch(99)


def greeted(num_slots: int = 8) -> tuple[World, Node]:
    """A process that WRITER has introduced itself to."""
    world = World()
    node = world.start("b", num_slots)
    assert isinstance(node.answer(Hello(WRITER, node.address.epoch, WRITER, LAYOUT)), Welcome)
    return world, node


def reserve(transfer_id: int) -> Reserve:
    return Reserve(WRITER, transfer_id, LAYOUT.digest, tuple(KEYS), None)


def test_idempotency_log_keeps_the_last_answers_and_declares_older_ids_over() -> None:
    max_completed = 16
    ledger = IdempotencyLog(max_completed)
    answer = CompletedExchange(EXCHANGE_OVER, Committed(3))
    for exchange_id in range(1, max_completed + 10):
        ledger.add(exchange_id, answer)
    assert ledger.get(max_completed) == answer
    assert ledger.get(3) == CompletedExchange(EXCHANGE_OVER)
    assert ledger.get(max_completed + 10) is None
    ledger.add(max_completed, CompletedExchange(EXCHANGE_OVER))
    assert ledger.get(max_completed) == answer, "it ended once"


def test_idle_sessions_are_forgotten_and_busy_ones_are_not() -> None:
    max_sessions = 16
    sessions = PeerSessions(max_sessions)
    sessions.admit(Epoch(1), Epoch(1))
    busy = sessions.get(Epoch(1))
    assert busy is not None
    busy.to_fence.add(Epoch(1))
    for epoch in range(2, max_sessions + 10):
        assert sessions.admit(Epoch(epoch), Epoch(epoch))
    assert sessions.get(Epoch(1)) is busy
    assert sessions.get(Epoch(2)) is None
    assert sum(1 for _ in sessions) == max_sessions


def test_unknown_peer_is_asked_for_a_handshake() -> None:
    node = World().start("b", 8)
    for message in (reserve(1), Commit(WRITER, 1, ())):
        assert node.answer(message) == Unknown()
    assert node.answer(Cancel(WRITER, 1, True)) == Done()


def test_a_reserve_after_its_cancel_reserves_nothing() -> None:
    _, node = greeted()
    assert node.answer(Cancel(WRITER, 1, True)) == Done()
    assert node.answer(reserve(1)) == EXCHANGE_OVER
    assert node.pool.stats().reserved == 0


def test_a_declined_reserve_stays_declined() -> None:
    _, node = greeted(num_slots=3)
    taken = node.pool.alloc_mem(2)
    answer = node.answer(reserve(1))
    assert isinstance(answer, Declined)
    node.pool.free_mem(taken)
    assert node.answer(reserve(1)) == answer
    assert node.pool.stats().free == 3


def test_a_commit_of_another_number_of_blocks_is_refused_and_changes_nothing() -> None:
    _, node = greeted()
    node.answer(reserve(1))
    assert isinstance(node.answer(Commit(WRITER, 1, (1, 2))), Refused)
    assert node.pool.stats().reserved == 3
    assert node.answer(Cancel(WRITER, 1, True)) == Done()
    assert node.pool.stats().free == 8


def test_a_commit_says_the_same_twice_and_a_cancel_after_it_changes_nothing() -> None:
    _, node = greeted()
    node.answer(reserve(1))
    commit = Commit(WRITER, 1, (1, 2, 3))  # which nothing sums to
    assert node.answer(commit) == node.answer(commit) == Committed(0)
    assert node.answer(Cancel(WRITER, 1, True)) == Done()
    assert node.answer(commit) == Committed(0)
    assert node.pool.stats().free == 8
    assert node.stats().corrupt_in_flight == 1


def test_pool_server_refuses_messages_of_other_kinds() -> None:
    _, node = greeted()
    assert isinstance(node.answer(Committed(1)), Refused)


def test_fenced_peer_is_admitted_under_another_data_epoch_only() -> None:
    world, node = greeted()
    node.answer(reserve(1))
    world.clock.advance(RESERVATION_S)
    node.sweep()
    assert node.stats().fenced == 1
    assert node.pool.stats().free == 8
    assert node.answer(reserve(2)) == Unknown()
    again = node.answer(Hello(WRITER, node.address.epoch, WRITER, LAYOUT))
    assert isinstance(again, Welcome)
    assert again.is_fenced
    assert again.endpoints == ()
    other = node.answer(Hello(WRITER, node.address.epoch, Epoch(98), LAYOUT))
    assert isinstance(other, Welcome)
    assert not other.is_fenced
    assert isinstance(node.answer(reserve(2)), Reserved)
    assert node.answer(Cancel(WRITER, 2, True)) == Done()


def test_fencing_one_data_epoch_does_not_settle_writes_of_the_next_one() -> None:
    world = World()
    sender, receiver = world.start("a", 8), world.start("b", 8)
    store(sender.pool, [1, 2, 3])
    world.network.can_settle = world.network.can_fence = False

    def push_late(prompt: list[int]) -> None:
        world.network.mishaps.append(Mishap.LATE)
        with pytest.raises(TransferTimeout):
            sender.to(receiver.address).sender.transfer_with_insert(
                keys_of(prompt), None, TransferMode.AGGREGATED
            )

    push_late([1])
    world.clock.advance(RESERVATION_S)
    receiver.sweep()  # refuses the first life, but cannot be sure that it is out
    push_late([1, 2, 3])
    assert sender.stats().reopened == 1
    assert receiver.num_quarantined() == 4
    receiver.answer(Cancel(sender.address.epoch, 1, True))  # That life is over, and so are its bytes.
    assert receiver.num_quarantined() == 3
    world.network.can_fence = True
    world.clock.advance(PeersConfig().retry_s)
    receiver.sweep()  # keeps the first life out
    assert receiver.stats().fenced == 1
    assert receiver.num_quarantined() == 3, "and says nothing of the second"
    world.clock.advance(RESERVATION_S)
    receiver.sweep()
    assert receiver.stats().fenced == 2
    assert receiver.num_quarantined() == 0
    assert world.network.late == []


def test_a_commit_that_comes_too_late_is_declined() -> None:
    world = World()
    sender, receiver = world.start("a", 8), world.start("b", 8)
    store(sender.pool, [1, 2, 3])
    world.faults.expect(Commit, Fault.DELAY, Fault.DELAY)
    with pytest.raises(InstanceLost, match="late"):
        sender.to(receiver.address).sender.transfer_with_insert(KEYS, None, TransferMode.AGGREGATED)
    world.clock.advance(RESERVATION_S)
    receiver.sweep()
    world.faults.land()
    assert receiver.pool.num_cached(KEYS) == 0
    assert receiver.pool.stats().free == 8
