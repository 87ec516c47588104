"""An instance stays known to its router: over a late, a forgetful and a refusing one."""

from __future__ import annotations

import queue
from collections.abc import Callable

from memserve.core.ids import Epoch, InstanceId
from memserve.instance.registrar import Registrar
from memserve.wire.link import ControlClient, ControlServer
from memserve.wire.messages import (
    Accepted,
    Deregister,
    Heartbeat,
    InstanceInfo,
    Load,
    Message,
    Refused,
    Register,
    Role,
    Unknown,
)

INFO = InstanceInfo(InstanceId("one"), Epoch(7), Role.DECODE, "http://127.0.0.1:1")
WAIT_S = 10.0


class FakeRouter:
    """Records every message and answers what it is told."""

    def __init__(self, answer: Callable[[Message], Message], port: int = 0) -> None:
        self.heard: queue.Queue[Message] = queue.Queue()
        self._answer = answer
        self._server = ControlServer("127.0.0.1", port, self._handle)
        self.address, self.port = self._server.address, self._server.port

    def _handle(self, message: Message) -> Message:
        self.heard.put(message)
        return self._answer(message)

    def next(self) -> Message:
        return self.heard.get(timeout=WAIT_S)

    def close(self) -> None:
        self._server.close()


def test_registrar_registers_sends_heartbeats_and_deregisters() -> None:
    router = FakeRouter(lambda message: Accepted(heartbeat_s=0.01))
    registrar = Registrar(ControlClient(router.address), INFO)
    registrar.start()
    assert router.next() == Register(INFO)
    assert router.next() == Heartbeat(INFO.instance_id, INFO.epoch)
    registrar.close()
    registrar.close()
    router.close()
    last = [router.heard.get_nowait() for _ in range(router.heard.qsize())][-1]
    assert last == Deregister(INFO.instance_id, INFO.epoch)


def test_registrar_tells_of_a_crash() -> None:
    router = FakeRouter(lambda message: Accepted(heartbeat_s=0.01))
    registrar = Registrar(ControlClient(router.address), INFO)
    registrar.start()
    assert router.next() == Register(INFO)
    registrar.crashed()
    router.close()
    last = [router.heard.get_nowait() for _ in range(router.heard.qsize())][-1]
    assert last == Deregister(INFO.instance_id, INFO.epoch, has_crashed=True)


def test_registrar_registers_again_at_a_router_that_forgot_it() -> None:
    def forgetful(message: Message) -> Message:
        return Accepted(heartbeat_s=0.01) if isinstance(message, Register) else Unknown()

    router = FakeRouter(forgetful)
    registrar = Registrar(ControlClient(router.address), INFO)
    registrar.start()
    heard = [router.next() for _ in range(3)]
    assert [type(message) for message in heard] == [Register, Heartbeat, Register]
    registrar.close()
    router.close()


def test_heartbeats_carry_the_load() -> None:
    load = Load(1, 2, 3, 4, 0.5)
    router = FakeRouter(lambda message: Accepted(heartbeat_s=0.01))
    registrar = Registrar(ControlClient(router.address), INFO, lambda: load)
    registrar.start()
    assert router.next() == Register(INFO)
    assert router.next() == Heartbeat(INFO.instance_id, INFO.epoch, load)
    registrar.close()
    router.close()


def test_draining_instance_tells_a_router_that_forgot_it_until_the_drain_ends() -> None:
    said = iter([Accepted(0.01), Accepted(0.01, is_draining=True), Unknown(), Accepted(0.01), Unknown()])
    router = FakeRouter(lambda message: next(said, Accepted(0.01)))
    registrar = Registrar(ControlClient(router.address), INFO)
    registrar.start()
    heard = [router.next() for _ in range(6)]
    assert [one for one in heard if isinstance(one, Register)] == [
        Register(INFO),
        Register(INFO, is_draining=True),
        Register(INFO),
    ]
    registrar.close()
    router.close()


def test_a_refused_registration_is_tried_again() -> None:
    answers = iter([Refused("not yet")])
    router = FakeRouter(lambda message: next(answers, Accepted(heartbeat_s=0.01)))
    registrar = Registrar(ControlClient(router.address), INFO)
    registrar.start()
    assert router.next() == router.next() == Register(INFO)
    assert isinstance(router.next(), Heartbeat)
    registrar.close()
    router.close()


def test_closing_before_the_start_is_harmless() -> None:
    router = FakeRouter(lambda message: Accepted(heartbeat_s=1))
    registrar = Registrar(ControlClient(router.address), INFO)
    registrar.close()
    router.close()
    assert router.heard.empty()
