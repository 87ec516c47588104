"""Request and answer over ZMQ."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import zmq

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import BadRequest, ConfigError, InstanceLost, WireMismatch
from memserve.core.ids import Epoch, InstanceId
from memserve.wire.link import MAX_MESSAGE_BYTES, ControlClient, ControlServer, Handler, is_loopback
from memserve.wire.messages import Accepted, Heartbeat, Message, Refused, encode

KEY = ClusterKey(b"0123456789abcdef")
OTHER_KEY = ClusterKey(b"fedcba9876543210")
SOON_S = 0.3
LATE_S = 5.0


def beat(name: str = "a") -> Heartbeat:
    return Heartbeat(InstanceId(name), Epoch(1))


def echo(message: Message) -> Message:
    """Say whose heartbeat it was."""
    assert isinstance(message, Heartbeat)
    return Refused(message.instance_id)


@contextmanager
def served(
    handler: Handler = echo, *, key: ClusterKey | None = None, port: int = 0
) -> Iterator[ControlServer]:
    server = ControlServer("127.0.0.1", port, handler, key=key)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def connected(address: str, *, key: ClusterKey | None = None) -> Iterator[ControlClient]:
    client = ControlClient(address, key=key)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def raw_socket(address: str) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        socket = context.socket(zmq.DEALER)
        socket.connect(f"tcp://{address}")
        yield socket
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("key", [None, KEY])
def test_each_request_gets_its_own_answer(key: ClusterKey | None) -> None:
    with served(key=key) as server, connected(server.address, key=key) as client:
        for name in "abc":
            assert client.request(beat(name), timeout_s=LATE_S) == Refused(name)


@pytest.mark.parametrize(("ours", "theirs"), [(KEY, OTHER_KEY), (KEY, None), (None, KEY)])
def test_registration_with_another_key_is_not_answered(
    ours: ClusterKey | None, theirs: ClusterKey | None
) -> None:
    heard = threading.Event()

    def handler(message: Message) -> Message:
        heard.set()
        return echo(message)

    with served(handler, key=ours) as server, connected(server.address, key=theirs) as client:
        with pytest.raises(InstanceLost) as caught:
            client.request(beat(), timeout_s=SOON_S)
        assert caught.value.peer == server.address
    assert not heard.is_set()


def test_a_server_that_is_not_there_is_lost_and_found_when_it_comes() -> None:
    with served() as server:
        port, address = server.port, server.address
    with connected(address) as client:
        with pytest.raises(InstanceLost):
            client.request(beat(), timeout_s=SOON_S)
        with served(port=port):
            assert client.request(beat("b"), timeout_s=LATE_S) == Refused("b")


def test_control_client_drops_a_late_answer() -> None:
    release = threading.Event()

    def slow_once(message: Message) -> Message:
        if message == beat("slow"):
            release.wait(LATE_S)
        return echo(message)

    with served(slow_once) as server, connected(server.address) as client:
        with pytest.raises(InstanceLost):
            client.request(beat("slow"), timeout_s=SOON_S)
        release.set()
        assert client.request(beat("next"), timeout_s=LATE_S) == Refused("next")


def test_control_client_serves_several_threads() -> None:
    answers: dict[str, Message] = {}
    with served() as server, connected(server.address) as client:

        def ask(name: str) -> None:
            answers[name] = client.request(beat(name), timeout_s=LATE_S)

        threads = [threading.Thread(target=ask, args=(str(i),)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {str(i): Refused(str(i)) for i in range(8)}


def test_an_error_of_the_handler_is_a_refusal_with_its_text() -> None:
    def refuse(message: Message) -> Message:
        raise BadRequest("not today")

    with served(refuse) as server, connected(server.address) as client:
        assert client.request(beat(), timeout_s=LATE_S) == Refused("not today")


def test_control_server_answers_a_future_when_it_is_done_and_other_requests_before_it() -> None:
    slow: Future[Message] = Future()

    def handler(message: Message) -> Message | Future[Message]:
        return slow if message == beat("slow") else echo(message)

    with (
        served(handler) as server,
        connected(server.address) as one,
        connected(server.address) as other,
        ThreadPoolExecutor(1) as threads,
    ):
        asked = threads.submit(one.request, beat("slow"), timeout_s=LATE_S)
        for name in "abc":
            assert other.request(beat(name), timeout_s=LATE_S) == Refused(name)
        assert not asked.done()
        slow.set_result(Accepted(2.0))
        assert asked.result(LATE_S) == Accepted(2.0)


def test_control_server_answers_a_completed_future() -> None:
    def handler(message: Message) -> Future[Message]:
        done: Future[Message] = Future()
        done.set_result(echo(message))
        return done

    with served(handler) as server, connected(server.address) as client:
        assert client.request(beat(), timeout_s=LATE_S) == Refused("a")


def test_many_futures_are_each_their_own_requests_answer() -> None:
    with ThreadPoolExecutor(4) as threads:

        def handler(message: Message) -> Future[Message]:
            return threads.submit(echo, message)

        with served(handler) as server, ThreadPoolExecutor(8) as askers:

            def ask(name: str) -> list[Message]:
                with connected(server.address) as client:
                    return [client.request(beat(f"{name}{i}"), timeout_s=LATE_S) for i in range(20)]

            for name, answers in zip("abcdefgh", askers.map(ask, "abcdefgh"), strict=True):
                assert answers == [Refused(f"{name}{i}") for i in range(20)]


def test_an_error_of_a_future_is_a_refusal_with_its_text() -> None:
    def handler(message: Message) -> Future[Message]:
        failed: Future[Message] = Future()
        failed.set_exception(BadRequest("not today"))
        return failed

    with served(handler) as server, connected(server.address) as client:
        assert client.request(beat(), timeout_s=LATE_S) == Refused("not today")


def test_control_server_drops_a_future_that_ends_after_close() -> None:
    slow: Future[Message] = Future()
    asked = threading.Event()

    def handler(message: Message) -> Future[Message]:
        asked.set()
        return slow

    server = ControlServer("127.0.0.1", 0, handler)
    with raw_socket(server.address) as socket:
        socket.send_multipart([b"id", encode(beat())])
        assert asked.wait(LATE_S)
        server.close()
        slow.set_result(Accepted(1.0))
        assert not socket.poll(timeout=int(SOON_S * 1000))


@pytest.mark.parametrize("frames", [[b"x"], [b"id", b"body", b"more"], [b""]])
def test_malformed_requests_do_not_stop_the_control_server(frames: list[bytes]) -> None:
    with served() as server, raw_socket(server.address) as socket, connected(server.address) as client:
        socket.send_multipart(frames)
        assert client.request(beat(), timeout_s=LATE_S) == Refused("a")


def test_tcp_refuses_a_connection_that_is_no_handshake() -> None:
    with served() as server, raw_socket(server.address) as socket:
        socket.send_multipart([b"id", b"\xc1 garbage"])
        assert socket.poll(timeout=5000)
        request_id, answer = socket.recv_multipart()
        assert request_id == b"id"
        assert b"malformed" in answer


def test_an_oversized_message_is_dropped_with_its_sender_only() -> None:
    with served() as server, connected(server.address) as other:
        with raw_socket(server.address) as socket:
            socket.send_multipart([b"id", bytes(MAX_MESSAGE_BYTES + 1)])
            assert not socket.poll(timeout=int(SOON_S * 1000))
        assert other.request(beat(), timeout_s=LATE_S) == Refused("a")


def test_an_answer_of_another_shape_is_a_mismatch() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")

    def answer() -> None:
        identity, request_id, _ = router.recv_multipart()
        router.send_multipart([identity, request_id, b"\x92\x63\xc0"])  # version 99

    thread = threading.Thread(target=answer)
    thread.start()
    with connected(f"127.0.0.1:{port}") as client, pytest.raises(WireMismatch, match="99"):
        client.request(beat(), timeout_s=LATE_S)
    thread.join()
    context.destroy(linger=0)


def test_leaving_the_host_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="cluster-key-file"):
        ControlServer("0.0.0.0", 0, echo)
    server = ControlServer("0.0.0.0", 0, echo, key=KEY)
    with connected(f"127.0.0.1:{server.port}", key=KEY) as client:
        assert client.request(beat(), timeout_s=LATE_S) == Refused("a")
    server.close()


def test_control_server_refuses_a_busy_port_and_close_frees_it() -> None:
    with served() as server:
        with pytest.raises(ConfigError, match=str(server.port)):
            ControlServer("127.0.0.1", server.port, echo)
        server.close()
        server.close()
        ControlServer("127.0.0.1", server.port, lambda _: Accepted(1.0)).close()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_only_loopback_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
