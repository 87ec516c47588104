"""The states of members, and which of them get requests."""

from __future__ import annotations

import pytest

from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.config import ClusterConfig
from memserve.router.cluster.control import answer
from memserve.router.cluster.discovery.static import STATIC_EPOCH
from memserve.router.cluster.member import Member, ProcessStatus, State
from memserve.router.cluster.pools import Pools
from memserve.router.cluster.registry import (
    InstanceRegistry,
)
from memserve.router.server_info import ServerInfo
from memserve.testing.fake_clock import FakeClock
from memserve.wire.messages import (
    Accepted,
    Deregister,
    Heartbeat,
    InstanceInfo,
    Load,
    Refused,
    Register,
    Role,
    Unknown,
)
from memserve.wire.peer_messages import Welcome

FACTS = ServerInfo("model", "/model")
ONE, TWO = Epoch(1), Epoch(2)
NAME = InstanceId("d")

DEFAULTS = ClusterConfig()


def decode(epoch: Epoch = ONE, url: str = "http://h:1", name: str = NAME) -> InstanceInfo:
    return InstanceInfo(InstanceId(name), epoch, Role.DECODE, url)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def cluster(clock: FakeClock) -> InstanceRegistry:
    return InstanceRegistry(ClusterConfig(heartbeat_secs=1.0), clock)


@pytest.fixture
def pools(clock: FakeClock) -> Pools:
    return Pools(ClusterConfig(heartbeat_secs=1.0), clock)


def states(cluster: InstanceRegistry) -> dict[str, State]:
    return {member.info.instance_id: member.state for member in cluster.members()}


def test_registered_instance_gets_requests_after_a_probe(cluster: InstanceRegistry) -> None:
    cluster.register(decode())
    assert cluster.snapshot.decodes == ()
    assert cluster.probe_needed.is_set()
    cluster.joined(NAME, ONE, FACTS)
    assert [one.instance_id for one in cluster.snapshot.decodes] == [NAME]


def test_registry_register_is_idempotent(cluster: InstanceRegistry) -> None:
    cluster.register(decode())
    cluster.joined(NAME, ONE, FACTS)
    before = cluster.snapshot
    cluster.register(decode())
    assert cluster.snapshot is before


def test_registry_replaces_an_old_epoch(cluster: InstanceRegistry) -> None:
    cluster.register(decode())
    cluster.joined(NAME, ONE, FACTS)
    cluster.register(decode(TWO))
    assert cluster.snapshot.decodes == ()
    cluster.joined(NAME, ONE, FACTS)  # a late answer of the old process
    assert cluster.snapshot.decodes == ()
    cluster.joined(NAME, TWO, FACTS)
    assert [one.epoch for one in cluster.snapshot.decodes] == [TWO]


def test_registry_replaces_another_id_at_the_same_url(cluster: InstanceRegistry) -> None:
    cluster.register(decode())
    cluster.register(decode(TWO, name="other"))
    assert list(states(cluster)) == ["other"]


def test_silent_instance_becomes_suspect_then_down_then_forgotten(
    cluster: InstanceRegistry, clock: FakeClock
) -> None:
    cluster.register(decode())
    cluster.register(decode(url="http://h:2", name="other"))
    for name in (NAME, InstanceId("other")):
        cluster.joined(name, ONE, FACTS)
    seen = []
    for _ in range(11):
        cluster.heartbeat(InstanceId("other"), ONE)
        cluster.check_heartbeats()
        seen.append((states(cluster).get(NAME), len(cluster.snapshot.decodes), len(cluster.up.decodes)))
        clock.advance(DEFAULTS.forget_heartbeats / 10 + 0.01)
    assert list(dict.fromkeys(seen)) == [
        (State.READY, 2, 2),
        (State.SUSPECT, 1, 2),
        (State.DOWN, 1, 1),
        (None, 1, 1),
    ]
    assert not cluster.heartbeat(NAME, ONE)


def test_heartbeat_makes_a_suspect_instance_ready(cluster: InstanceRegistry, clock: FakeClock) -> None:
    cluster.register(decode())
    cluster.joined(NAME, ONE, FACTS)
    clock.advance(DEFAULTS.suspect_heartbeats + 0.1)
    cluster.check_heartbeats()
    (member,) = cluster.members()
    assert (member.state, member.reason) == (State.SUSPECT, "no heartbeat for 2.1 s")
    assert cluster.heartbeat(NAME, ONE)
    assert (member.state, member.reason) == (State.READY, "")


def test_heartbeat_makes_a_silent_down_instance_join(cluster: InstanceRegistry, clock: FakeClock) -> None:
    cluster.register(decode())
    cluster.joined(NAME, ONE, FACTS)
    clock.advance(DEFAULTS.down_heartbeats + 0.1)
    cluster.check_heartbeats()
    assert states(cluster) == {NAME: State.DOWN}
    cluster.probe_needed.clear()
    assert cluster.heartbeat(NAME, ONE)
    assert states(cluster) == {NAME: State.JOINING}
    assert cluster.probe_needed.is_set()
    cluster.joined(NAME, ONE, FACTS)
    assert states(cluster) == {NAME: State.READY}


def test_silent_instance_that_answers_probes_stays_suspect(
    cluster: InstanceRegistry, clock: FakeClock
) -> None:
    """Its requests go one way, its heartbeats another."""
    cluster.register(decode())
    cluster.joined(NAME, ONE, FACTS)
    for _ in range(20):
        clock.advance(1.0)
        cluster.check_heartbeats()
        cluster.joined(NAME, ONE, FACTS)
    assert states(cluster) == {NAME: State.SUSPECT}


def test_shift_deadlines_excuses_silence_caused_by_the_router(
    cluster: InstanceRegistry, clock: FakeClock
) -> None:
    cluster.register(decode())
    cluster.joined(NAME, ONE, FACTS)
    clock.advance(20.0)
    cluster.shift_deadlines(19.5)
    cluster.check_heartbeats()
    assert states(cluster) == {NAME: State.READY}


def test_stuck_instance_gets_requests_only_without_alternative(clock: FakeClock) -> None:
    cluster = InstanceRegistry(ClusterConfig(heartbeat_secs=1.0, stuck_secs=15.0), clock)
    stuck, works = Load(1, 0, 10, 100, 15.5), Load(1, 0, 10, 100, 14.5)
    other, third = InstanceId("other"), InstanceId("third")
    for name, model in ((NAME, "model"), (other, "model"), (third, "another")):
        cluster.register(decode(name=name, url=f"http://{name}:1"))
        cluster.joined(name, ONE, ServerInfo(model, "/model"))
    for name in (NAME, third):
        cluster.heartbeat(name, ONE, stuck)
    cluster.heartbeat(other, ONE, works)
    assert [one.instance_id for one in cluster.snapshot.decodes] == [other, third]
    assert states(cluster) == {NAME: State.SUSPECT, other: State.READY, third: State.SUSPECT}
    assert "15.5 s" in cluster.members()[0].reason
    cluster.heartbeat(other, ONE, stuck)
    assert len(cluster.snapshot.decodes) == 3
    for name in (NAME, other, third):
        cluster.heartbeat(name, ONE, works)
    assert set(states(cluster).values()) == {State.READY}


def test_drained_suspect_instance_is_draining(cluster: InstanceRegistry, clock: FakeClock) -> None:
    cluster.register(decode())
    cluster.joined(NAME, ONE, FACTS)
    cluster.drain(cluster.members()[0])
    clock.advance(DEFAULTS.suspect_heartbeats + 0.1)
    cluster.check_heartbeats()
    assert states(cluster) == {NAME: State.DRAINING}
    assert not cluster.snapshot.decodes
    cluster.undrain(cluster.members()[0])
    assert states(cluster) == {NAME: State.SUSPECT}


def test_register_restores_a_drain(cluster: InstanceRegistry, pools: Pools) -> None:
    told = answer(cluster, pools, Register(decode(), is_draining=True))
    assert told == Accepted(1.0, is_draining=True)
    cluster.joined(NAME, ONE, FACTS)
    assert states(cluster) == {NAME: State.DRAINING}
    cluster.undrain(cluster.members()[0])
    # Its own memory of it is older than that.
    assert answer(cluster, pools, Register(decode(), is_draining=True)) == Accepted(1.0)
    assert answer(cluster, pools, Heartbeat(NAME, ONE)) == Accepted(1.0)
    cluster.drain(cluster.members()[0])
    assert answer(cluster, pools, Heartbeat(NAME, ONE)) == Accepted(1.0, is_draining=True)
    # Another process is another matter.
    assert answer(cluster, pools, Register(decode(TWO))) == Accepted(1.0)


def test_heartbeat_of_another_epoch_is_unknown(cluster: InstanceRegistry) -> None:
    cluster.register(decode())
    assert not cluster.heartbeat(NAME, TWO)


def test_lost_contact_takes_an_instance_down_until_a_probe_succeeds(cluster: InstanceRegistry) -> None:
    cluster.register(decode())
    cluster.joined(NAME, ONE, FACTS)
    cluster.probe_needed.clear()
    cluster.lost_contact(NAME, ONE, "refused")
    assert states(cluster) == {NAME: State.DOWN}
    assert not cluster.snapshot.decodes
    assert cluster.probe_needed.is_set()
    assert cluster.heartbeat(NAME, ONE)
    assert states(cluster) == {NAME: State.DOWN}
    cluster.joined(NAME, ONE, FACTS)
    assert cluster.snapshot.decodes


def test_process_status_follows_heartbeats_after_a_loss(cluster: InstanceRegistry, clock: FakeClock) -> None:
    cluster.register(decode())
    cluster.joined(NAME, ONE, FACTS)
    cluster.lost_contact(NAME, ONE, "reset")
    assert cluster.process_status(NAME, ONE) is ProcessStatus.UNKNOWN
    cluster.lost_contact(NAME, ONE, "refused", has_exited=True)
    assert cluster.process_status(NAME, ONE) is ProcessStatus.EXITED
    clock.advance(0.5)
    cluster.heartbeat(NAME, ONE)
    assert cluster.process_status(NAME, ONE) is ProcessStatus.ALIVE
    cluster.joined(NAME, ONE, FACTS)
    clock.advance(0.5)
    cluster.lost_contact(NAME, ONE, "reset")
    assert cluster.process_status(NAME, ONE) is ProcessStatus.UNKNOWN, "it was heard of before"
    cluster.joined(NAME, ONE, FACTS)
    assert cluster.process_status(NAME, ONE) is ProcessStatus.ALIVE
    cluster.register(decode(TWO))
    assert cluster.process_status(NAME, ONE) is ProcessStatus.EXITED


def test_lost_contact_of_an_old_epoch_is_ignored(cluster: InstanceRegistry) -> None:
    cluster.register(decode(TWO))
    cluster.joined(NAME, TWO, FACTS)
    cluster.lost_contact(NAME, ONE, "reset")
    assert cluster.snapshot.decodes


def test_static_server_is_never_forgotten(clock: FakeClock) -> None:
    cluster = InstanceRegistry(ClusterConfig(heartbeat_secs=1.0, static=(decode(STATIC_EPOCH),)), clock)
    clock.advance(1000)
    cluster.check_heartbeats()
    assert states(cluster) == {NAME: State.JOINING}


def test_static_server_returns_when_its_registration_ends(clock: FakeClock) -> None:
    cluster = InstanceRegistry(
        ClusterConfig(heartbeat_secs=1.0, static=(decode(STATIC_EPOCH, name="http://h:1"),)), clock
    )
    cluster.register(decode())
    assert list(states(cluster)) == [NAME]
    cluster.deregister(NAME, ONE)
    assert list(states(cluster)) == ["http://h:1"]


def test_deregister_removes_only_its_own_epoch(cluster: InstanceRegistry) -> None:
    cluster.register(decode(TWO))
    cluster.deregister(NAME, ONE)
    assert list(states(cluster)) == [NAME]
    cluster.deregister(NAME, TWO)
    cluster.deregister(NAME, TWO)
    assert states(cluster) == {}


def test_control_answers_the_messages_of_instances(cluster: InstanceRegistry, pools: Pools) -> None:
    assert answer(cluster, pools, Heartbeat(NAME, ONE)) == Unknown()
    assert answer(cluster, pools, Register(decode())) == Accepted(1.0)
    assert answer(cluster, pools, Heartbeat(NAME, ONE)) == Accepted(1.0)
    assert answer(cluster, pools, Deregister(NAME, ONE)) == Accepted(1.0)
    assert answer(cluster, pools, Heartbeat(NAME, ONE)) == Unknown()


@pytest.mark.parametrize(
    "message",
    [
        Register(decode(STATIC_EPOCH)),
        Register(InstanceInfo(NAME, ONE, Role.PREFILL, "http://h:1")),
        Welcome(ONE, ONE, (), ()),
    ],
)
def test_control_refuses_invalid_instances(
    cluster: InstanceRegistry, pools: Pools, message: Register
) -> None:
    assert isinstance(answer(cluster, pools, message), Refused)
    assert states(cluster) == {}


def joined(cluster: InstanceRegistry, info: InstanceInfo) -> Member:
    cluster.register(info)
    cluster.joined(info.instance_id, info.epoch, FACTS)
    member = cluster.find(info.instance_id)
    assert member is not None
    return member


def test_draining_instance_is_up_and_gets_no_new_requests(cluster: InstanceRegistry) -> None:
    member = joined(cluster, decode())
    cluster.drain(member)
    cluster.drain(member)
    assert states(cluster) == {NAME: State.DRAINING}
    assert not cluster.snapshot.decodes
    assert [one.instance_id for one in cluster.up.decodes] == cluster.working() == [NAME]
    cluster.undrain(member)
    assert states(cluster) == {NAME: State.READY}
    assert cluster.snapshot == cluster.up


def test_drain_outlasts_heartbeats_probes_and_lost_contact(cluster: InstanceRegistry) -> None:
    member = joined(cluster, decode())
    cluster.drain(member)
    cluster.register(decode())
    assert cluster.heartbeat(NAME, ONE)
    cluster.joined(NAME, ONE, FACTS)
    assert states(cluster) == {NAME: State.DRAINING}
    cluster.lost_contact(NAME, ONE, "reset")
    assert states(cluster) == {NAME: State.DOWN}
    assert cluster.working() == [NAME]
    cluster.joined(NAME, ONE, FACTS)
    assert states(cluster) == {NAME: State.DRAINING}


def test_instance_drained_before_its_first_probe_is_never_ready(cluster: InstanceRegistry) -> None:
    cluster.register(decode())
    cluster.drain(cluster.members()[0])
    assert states(cluster) == {NAME: State.JOINING}
    cluster.joined(NAME, ONE, FACTS)
    assert states(cluster) == {NAME: State.DRAINING}


def test_new_process_does_not_drain(cluster: InstanceRegistry) -> None:
    cluster.drain(joined(cluster, decode()))
    joined(cluster, decode(TWO))
    assert states(cluster) == {NAME: State.READY}
    cluster.deregister(NAME, TWO)
    cluster.drain(joined(cluster, decode(TWO)))
    cluster.deregister(NAME, TWO)
    joined(cluster, decode(TWO))
    assert states(cluster) == {NAME: State.READY}


def test_static_servers_are_added_and_removed_at_run_time(cluster: InstanceRegistry) -> None:
    info = decode(STATIC_EPOCH, name="http://h:1")
    assert cluster.add_static(info) is info
    assert cluster.add_static(decode(STATIC_EPOCH, name="http://h:1")) is info
    assert list(states(cluster)) == ["http://h:1"]
    cluster.remove_static("http://h:1")
    cluster.remove_static("http://h:1")
    assert states(cluster) == {}


def test_static_server_does_not_replace_a_registered_instance(cluster: InstanceRegistry) -> None:
    joined(cluster, decode())
    cluster.add_static(decode(STATIC_EPOCH, name="http://h:1"))
    assert list(states(cluster)) == [NAME]
    cluster.remove_static("http://h:1")
    assert list(states(cluster)) == [NAME]
    cluster.deregister(NAME, ONE)
    assert states(cluster) == {}
