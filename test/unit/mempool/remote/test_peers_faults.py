"""What is left behind when a peer, a message or a byte goes astray: nothing, and a count of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memserve.core.errors import (
    InstanceLost,
    PeerDeclined,
    StaleEpoch,
    TransferFailed,
    TransferTimeout,
)
from memserve.mempool.remote.config import PeersConfig
from memserve.mempool.remote.records import Pushed
from memserve.testing.faulty_link import Fault
from memserve.testing.transport_process import wait_until
from memserve.transport.registry import TransportConfig
from memserve.wire.messages import Message
from memserve.wire.peer_messages import AcquireLease, Cancel, Commit, Hello, ReleaseLease, Reserve

from ..harness import LAYOUT, keys_of, store
from .pair import End, end, once, running, start

PROMPT = [1, 2, 3, 4]
TIMEOUT_S = 1.0
LOST = (InstanceLost, TransferFailed, TransferTimeout)


@contextmanager
def two(**settings: float) -> Iterator[tuple[End, End]]:
    ends = end(**settings), end(**settings)
    with running(*ends):
        yield ends


def reserve_and_forget(here: End, there: End) -> None:
    """Reserve blocks at a peer and neither write, commit nor cancel."""
    peer = here.peers._use(there.peer, here.pool)
    peer.remote.exchange(lambda connection: peer.sender.reserve(connection, keys_of([8, 9]), None))


# ---- bytes


def test_a_byte_flipped_in_the_senders_arena_is_a_miss_at_both_ends() -> None:
    with two() as (here, there):
        store(here.pool, PROMPT)
        here.pool.block(here.pool.match(keys_of(PROMPT)).addrs[2])[5] ^= 4
        assert here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT)).num_sent == 2
        assert there.has(PROMPT) == 2
        assert there.peers.stats().corrupt_in_flight == 1
        assert here.has(PROMPT) == 2, "and it is not sent again"
        assert here.pool.stats().corruptions == 1


def test_a_byte_flipped_in_the_holders_arena_is_a_miss() -> None:
    with two() as (here, there):
        store(there.pool, PROMPT)
        there.pool.block(there.pool.match(keys_of(PROMPT)).addrs[2])[5] ^= 4
        assert here.peers.fetch(there.peer, here.pool, keys_of(PROMPT), timeout_s=TIMEOUT_S) == 2
        assert here.has(PROMPT) == 2
        assert here.peers.stats().corrupt_on_arrival == 1
        there.pool.clear()


def test_byte_flipped_in_flight_is_a_miss_and_the_next_push_repairs_it() -> None:
    with two() as (here, there):
        store(here.pool, PROMPT)
        block = here.pool.block(here.pool.match(keys_of(PROMPT)).addrs[1])

        def flip() -> None:
            block[7] ^= 1

        once(here.hooks, "before_copy", flip)
        once(here.hooks, "after_copy", flip)
        assert here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT)).num_sent == 1
        assert there.peers.stats().corrupt_in_flight == 1
        assert here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT)) == Pushed(
            1, 3, 3 * LAYOUT.block_bytes
        )
        assert there.has(PROMPT) == 4


# ---- messages


@pytest.mark.parametrize("fault", [Fault.LOSE_REQUEST, Fault.LOSE_ANSWER, Fault.DOUBLE, Fault.DELAY])
@pytest.mark.parametrize("kind", [Hello, Reserve, Commit])
def test_one_lost_doubled_or_late_message_changes_nothing_for_a_push(
    kind: type[Message], fault: Fault
) -> None:
    with two() as (here, there):
        store(here.pool, PROMPT)
        here.faults.expect(kind, fault)
        assert here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT)).num_sent == 4
        here.faults.land()
        assert there.has(PROMPT) == 4
        assert there.peers.stats().blocks_received == 4
        there.assert_clean()


@pytest.mark.parametrize("fault", [Fault.LOSE_REQUEST, Fault.LOSE_ANSWER, Fault.DOUBLE, Fault.DELAY])
@pytest.mark.parametrize("kind", [Hello, AcquireLease, ReleaseLease])
def test_one_lost_doubled_or_late_message_changes_nothing_for_a_fetch(
    kind: type[Message], fault: Fault
) -> None:
    with two(lease_s=0.2) as (here, there):
        store(there.pool, PROMPT)
        here.faults.expect(kind, fault)
        assert here.peers.fetch(there.peer, here.pool, keys_of(PROMPT), timeout_s=TIMEOUT_S) == 4
        here.faults.land()
        assert here.has(PROMPT) == 4
        wait_until(lambda: there.pool.stats().leases == 0, "the lease to end")


@pytest.mark.parametrize("fault", [Fault.LOSE_REQUEST, Fault.LOSE_ANSWER, Fault.DELAY])
@pytest.mark.parametrize("kind", [Reserve, Commit])
def test_push_without_an_answer_is_cancelled_with_the_next_push(kind: type[Message], fault: Fault) -> None:
    with two() as (here, there):
        store(here.pool, PROMPT)
        here.faults.expect(kind, fault, fault)
        with pytest.raises(InstanceLost):
            here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT))
        assert here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT)).num_known in (0, 4)
        here.faults.land()
        assert there.has(PROMPT) == 4
        there.assert_clean()
        assert there.peers.stats().fenced == 0


def test_a_commit_after_its_reservation_has_run_out_is_declined() -> None:
    with two(reservation_s=0.5) as (here, there):
        store(here.pool, PROMPT)

        def run_out() -> None:
            wait_until(lambda: there.peers.stats().fenced == 1, "the sender to be fenced")

        once(here.hooks, "after_copy", run_out)
        with pytest.raises(PeerDeclined):
            here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT))
        there.assert_clean()
        assert there.has(PROMPT) == 0
        assert there.peers.stats().expired_reservations == 1


def test_lost_cancel_ends_by_the_receivers_deadline() -> None:
    with two(reservation_s=0.1) as (here, there):
        store(here.pool, PROMPT)
        here.faults.expect(Cancel, Fault.LOSE_REQUEST)

        def fail() -> None:
            raise TransferFailed("a test", "no bytes today")

        once(here.hooks, "before_copy", fail)
        with pytest.raises(TransferFailed):
            here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT))
        wait_until(lambda: there.peers.stats().expired_reservations == 1, "the deadline")
        wait_until(lambda: there.peers.stats().quarantined == 0, "the quarantine to end")
        there.assert_clean()


# ---- lives


@pytest.mark.parametrize("transport", ["tcp", "local"])
def test_fenced_live_sender_reopens_its_transports(transport: str) -> None:
    here, there = end(transport, reservation_s=0.5), end(transport, reservation_s=0.5)
    with running(here, there):
        store(here.pool, PROMPT)
        here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT[:1]))
        reserve_and_forget(here, there)
        wait_until(lambda: there.peers.stats().fenced == 1, "the sender to be fenced")
        there.assert_clean()
        pushed = here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT))
        assert pushed.num_sent == 3
        assert here.peers.stats().reopened == 1
        store(there.pool, [5, 6])
        assert here.peers.fetch(there.peer, here.pool, keys_of([5, 6]), timeout_s=TIMEOUT_S) == 2
        store(here.pool, [7])
        assert there.peers.fetch(here.peer, there.pool, keys_of([7]), timeout_s=TIMEOUT_S) == 1


def test_a_receiver_that_restarts_before_the_commit_is_another_process() -> None:
    here, there = end(), end()
    port = int(there.peer.control.rsplit(":", 1)[1])
    later: list[End] = []

    def restart() -> None:
        there.peers.close()
        later.append(start(TransportConfig("tcp", control_port=port), PeersConfig(timeout_s=TIMEOUT_S)))

    with running(here, there):
        store(here.pool, PROMPT)
        once(here.hooks, "after_copy", restart)
        with pytest.raises(StaleEpoch):
            here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT))
        with running(*later):
            assert later[0].has(PROMPT) == 0
            assert here.peers.transfer_with_insert(later[0].peer, here.pool, keys_of(PROMPT)).num_sent == 4


def test_peer_with_another_cluster_key_is_not_answered(tmp_path: Path) -> None:
    def with_key(secret: str) -> End:
        path = tmp_path / secret
        path.write_text(secret)
        path.chmod(0o600)
        return start(TransportConfig("tcp", cluster_key_file=str(path)), PeersConfig(timeout_s=0.2))

    ours, theirs = "0123456789abcdef", "fedcba9876543210"
    here, there, friend = with_key(ours), with_key(theirs), with_key(ours)
    with running(here, there, friend):
        store(here.pool, PROMPT)
        with pytest.raises(InstanceLost):
            here.peers.transfer_with_insert(there.peer, here.pool, keys_of(PROMPT))
        assert here.peers.transfer_with_insert(friend.peer, here.pool, keys_of(PROMPT)).num_sent == 4


def test_abandoned_lease_ends_by_its_deadline() -> None:
    with two(lease_s=0.1) as (here, there):
        store(there.pool, PROMPT)
        here.faults.expect(ReleaseLease, Fault.LOSE_REQUEST)
        assert here.peers.fetch(there.peer, here.pool, keys_of(PROMPT), timeout_s=TIMEOUT_S) == 4
        wait_until(lambda: there.peers.stats().expired_leases == 1, "the lease to run out")
        there.assert_clean()
