"""Which instances exist and which of them can take a request. Does no I/O; the clock is given.

register, name ──> JOINING ──joined──> READY ──lost_contact──> DOWN
                      ^                 │ ^                      │ re-register: JOINING
                      │           drain v │ undrain              │ deregister, no heartbeat: forgotten
                      │               DRAINING ──lost_contact──> │
                      └───────joined: READY, or DRAINING again───┘

A drain is the process's: it lasts through lost contact, and ends with `undrain`, with the process, or
when the instance is forgotten. Of a server that was named nobody knows when its process is another.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.instance import Facts, Instance, Snapshot
from memserve.wire.messages import InstanceInfo

logger = logging.getLogger(__name__)

HEARTBEAT_MISSES = 5
"""An instance is forgotten when it was silent for so many heartbeats."""


class State(StrEnum):
    """What the router believes of a member."""

    JOINING = "joining"
    READY = "ready"
    DRAINING = "draining"
    """It ends what it has, and gets nothing new."""
    DOWN = "down"


@dataclass(slots=True)
class Member:
    """One instance the cluster knows of. Changed by `Cluster` only."""

    info: InstanceInfo
    static: bool
    seen_s: float
    state: State = State.JOINING
    facts: Facts | None = None
    reason: str = "not seen yet"
    """Why it does not answer."""
    is_draining: bool = False
    """It gets nothing new, also when it answers again."""

    @property
    def is_up(self) -> bool:
        """It answers, and may have requests to end."""
        return self.state in (State.READY, State.DRAINING)


class Cluster:
    """The members and their states. Event loop thread only."""

    def __init__(
        self, static: Iterable[InstanceInfo], *, heartbeat_s: float, clock: Callable[[], float]
    ) -> None:
        """`static` are servers that do not register: they are forgotten by `unname` only."""
        self.heartbeat_s = heartbeat_s
        self.stirred = asyncio.Event()
        """Set whenever a member needs a probe."""
        self._clock = clock
        self._static = {info.url: info for info in static}
        self._members: dict[InstanceId, Member] = {}
        self._snapshot = Snapshot()
        self._up = Snapshot()
        for info in self._static.values():
            self._add(info, static=True)

    @property
    def snapshot(self) -> Snapshot:
        """The ready instances; a new object whenever they change."""
        return self._snapshot

    @property
    def up(self) -> Snapshot:
        """The same, and the draining ones."""
        return self._up

    def working(self) -> list[InstanceId]:
        """Who may have requests to end: those that are up, and those that drain and have lost contact."""
        members = self._members.values()
        return [one.info.instance_id for one in members if one.is_up or one.is_draining]

    def find(self, name: str) -> Member | None:
        """Who has that id, or that URL."""
        members = self.members()
        by_id = (one for one in members if one.info.instance_id == name)
        return next(by_id, None) or next((one for one in members if one.info.url == name), None)

    def members(self) -> list[Member]:
        """Everyone known, ready or not."""
        return list(self._members.values())

    def name(self, info: InstanceInfo) -> InstanceInfo:
        """Know `info`, a server that does not register, from now on; what was named at its URL before,
        and stays, if there is such a server."""
        known = self._static.setdefault(info.url, info)
        if known is info and self.find(info.url) is None:
            logger.info("server named role=%s url=%s", info.role, info.url)
            self._add(info, static=True)
        return known

    def named(self) -> frozenset[str]:
        """The URLs of the servers that were named; one may have registered since."""
        return frozenset(self._static)

    def unname(self, url: str) -> None:
        """Forget the server that was named at `url`; not one that has registered there. Idempotent."""
        self._static.pop(url, None)
        member = self.find(url)
        if member is not None and member.static:
            self._forget(member.info.instance_id, "it is named no more")

    def drain(self, member: Member) -> None:
        """No new requests for `member`, one of `members`; those it has may end. Idempotent."""
        if not member.is_draining:
            logger.info("instance draining instance=%s", member.info.instance_id)
        self._set_draining(member, True)

    def undrain(self, member: Member) -> None:
        """Requests for it again, as soon as it is ready. Idempotent."""
        if member.is_draining:
            logger.info("instance drains no more instance=%s", member.info.instance_id)
        self._set_draining(member, False)

    def register(self, info: InstanceInfo) -> None:
        """`info` is ready to serve. Idempotent; a new epoch, or a new id at its URL, replaces the old."""
        known = self._members.get(info.instance_id)
        if known is not None and known.info == info:
            known.seen_s = self._clock()
            if known.state is State.DOWN:
                known.state = State.JOINING
                self.stirred.set()
            return
        for other in self.members():
            if other.info.url == info.url or other.info.instance_id == info.instance_id:
                del self._members[other.info.instance_id]
        logger.info("instance registered instance=%s role=%s url=%s", info.instance_id, info.role, info.url)
        self._add(info, static=False)

    def heartbeat(self, instance_id: InstanceId, epoch: Epoch) -> bool:
        """The instance lives. False if it is not known under that epoch and has to register again."""
        member = self._find(instance_id, epoch)
        if member is None:
            return False
        member.seen_s = self._clock()
        return True

    def deregister(self, instance_id: InstanceId, epoch: Epoch) -> None:
        """The instance wants no more requests; those it has may end. Idempotent."""
        if self._find(instance_id, epoch) is not None:
            self._forget(instance_id, "it deregistered")

    def joined(self, instance_id: InstanceId, epoch: Epoch, facts: Facts) -> None:
        """A probe found the instance serving. Ignored if it is another process by now."""
        member = self._find(instance_id, epoch)
        if member is None:
            return
        state = _up_state(member)
        if member.state is not state:
            logger.info(
                "instance %s instance=%s role=%s model=%s", state, instance_id, member.info.role, facts.model
            )
        member.state, member.facts, member.reason = state, facts, ""
        self._refresh()

    def lost_contact(self, instance_id: InstanceId, epoch: Epoch, reason: str) -> None:
        """The instance did not answer: no requests until a probe succeeds. Idempotent."""
        member = self._find(instance_id, epoch)
        if member is None:
            return
        if member.is_up:
            logger.warning("instance down instance=%s reason=%s", instance_id, reason)
        member.state, member.reason = State.DOWN, reason
        self.stirred.set()
        self._refresh()

    def forget_silent(self) -> None:
        """Forget the registered instances whose heartbeats have stopped."""
        deadline = self._clock() - HEARTBEAT_MISSES * self.heartbeat_s
        for member in self.members():
            if not member.static and member.seen_s < deadline:
                self._forget(member.info.instance_id, f"{HEARTBEAT_MISSES} heartbeats missed")

    def _find(self, instance_id: InstanceId, epoch: Epoch) -> Member | None:
        member = self._members.get(instance_id)
        return member if member is not None and member.info.epoch == epoch else None

    def _set_draining(self, member: Member, is_draining: bool) -> None:
        member.is_draining = is_draining
        if member.is_up:
            member.state = _up_state(member)
            self._refresh()

    def _add(self, info: InstanceInfo, *, static: bool) -> None:
        self._members[info.instance_id] = Member(info, static, self._clock())
        self.stirred.set()
        self._refresh()

    def _forget(self, instance_id: InstanceId, reason: str) -> None:
        logger.info("instance gone instance=%s reason=%s", instance_id, reason)
        url = self._members.pop(instance_id).info.url
        if url in self._static:
            self._add(self._static[url], static=True)
        self._refresh()

    def _refresh(self) -> None:
        up = {
            info.instance_id: Instance(
                info.instance_id, info.epoch, info.role, info.url, info.bootstrap_port, member.facts
            )
            for member in self._members.values()
            if (info := member.info) and member.is_up and member.facts is not None
        }
        ready = [one for name, one in up.items() if not self._members[name].is_draining]
        self._up, self._snapshot = Snapshot.of(up.values()), Snapshot.of(ready)


def _up_state(member: Member) -> State:
    return State.DRAINING if member.is_draining else State.READY
