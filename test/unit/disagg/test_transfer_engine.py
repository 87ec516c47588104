"""The drop-in between two real processes, with the calls and return values of SGLang's connector."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memserve.core.errors import ConfigError
from memserve.disagg.transfer_engine import TransferEngine
from memserve.peering.endpoint import TransferEndpoint
from memserve.testing.transport_process import DEADLINE_S, ChildProcess
from memserve.transport.registry import TransportConfig

NUM_BYTES = 1 << 20
PAGE = 4096


class Sender:
    """This process's engine with 1 MiB of registered memory."""

    def __init__(self, transport: str, key_file: Path | None = None) -> None:
        config = TransportConfig(transport, cluster_key_file=str(key_file) if key_file else None)  # type: ignore[arg-type]
        self.engine = TransferEngine(TransferEndpoint(config), config, timeout_s=5.0)
        self.memory = np.zeros(NUM_BYTES, np.uint8)
        self.address = self.memory.ctypes.data
        assert self.engine.batch_register([self.address], [NUM_BYTES]) == 0


class Receiver(ChildProcess):
    def __init__(self, transport: str, key_file: str = "", port: int = 0) -> None:
        super().__init__(str(Path(__file__).parent / "transfer_peer.py"), transport, key_file, str(port))
        self.session: str = self.greeting["session"]
        self.address: int = self.greeting["address"]

    def contents(self, start: int, stop: int) -> bytes:
        return bytes.fromhex(self.ask("contents", start=start, stop=stop))


@pytest.fixture(params=["local", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sender(transport: str) -> Iterator[Sender]:
    sender = Sender(transport)
    yield sender
    sender.engine.close()


@pytest.fixture
def receiver(transport: str) -> Iterator[Receiver]:
    receiver = Receiver(transport)
    yield receiver
    receiver.kill()


def test_pages_land_where_the_addresses_say(sender: Sender, receiver: Receiver) -> None:
    sender.memory[:] = np.repeat(np.arange(256, dtype=np.uint8), PAGE)
    pages = [3, 200, 4, 5]
    result = sender.engine.batch_transfer_sync(
        receiver.session,
        [sender.address + page * PAGE for page in pages],
        [receiver.address + (10 + i) * PAGE for i in range(4)],
        [PAGE] * 4,
    )
    assert result == 0
    expected = b"".join(bytes([page]) * PAGE for page in pages)
    assert receiver.contents(9 * PAGE, 15 * PAGE) == bytes(PAGE) + expected + bytes(PAGE)
    assert sender.engine.transfer_sync(receiver.session, sender.address + PAGE, receiver.address, 3) == 0
    assert receiver.contents(0, 4) == b"\x01\x01\x01\x00"
    assert sender.engine.batch_transfer_sync(receiver.session, [], [], []) == 0


def test_the_session_is_logged_once_and_its_traffic_counted(
    sender: Sender, receiver: Receiver, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(3):
        assert sender.engine.transfer_sync(receiver.session, sender.address, receiver.address, 100) == 0
    assert sender.engine.transfer_sync(receiver.session, sender.address, receiver.address - 1, 100) < 0
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert lines == [f"peer reached peer={receiver.session} transport={transport}"]
    stats = sender.engine.stats()
    assert (stats.total.num_transfers, stats.total.num_copies, stats.total.num_bytes) == (3, 3, 300)
    assert stats.total.num_failures == 1
    assert stats.sessions == {receiver.session: stats.total}


def test_memory_the_peer_registers_later_is_found(sender: Sender, receiver: Receiver) -> None:
    sender.memory[:] = 6
    later = receiver.address + NUM_BYTES
    assert sender.engine.transfer_sync(receiver.session, sender.address, later, 64) < 0
    assert receiver.ask("register_more") == 0
    assert sender.engine.transfer_sync(receiver.session, sender.address, later, 64) == 0
    assert receiver.contents(NUM_BYTES, NUM_BYTES + 64) == bytes([6] * 64)


def test_memory_the_peer_registers_anew_is_found(sender: Sender, receiver: Receiver) -> None:
    sender.memory[:] = 6
    assert sender.engine.transfer_sync(receiver.session, sender.address, receiver.address, 64) == 0
    receiver.ask("register_anew")
    assert sender.engine.transfer_sync(receiver.session, sender.address, receiver.address, 64) == 0


@pytest.mark.parametrize(
    "arguments", [([0], [0], [8]), ([1], [1, 2], [3]), ([None], [1], [1]), ([1 << 70], [1], [1])]
)
def test_transfer_engine_returns_a_negative_number_for_wrong_arguments(
    sender: Sender, receiver: Receiver, arguments: tuple[list[int], list[int], list[int]]
) -> None:
    assert sender.engine.batch_transfer_sync(receiver.session, *arguments) < 0
    assert sender.engine.batch_transfer_sync("nobody", [sender.address], [1], [1]) < 0
    assert sender.engine.send_probe("nobody") < 0


def test_a_restarted_peer_is_refused_under_its_old_session_and_served_under_the_new(
    sender: Sender, receiver: Receiver, transport: str
) -> None:
    assert sender.engine.transfer_sync(receiver.session, sender.address, receiver.address, 64) == 0
    assert sender.engine.send_probe(receiver.session) == 0
    receiver.kill()
    again = Receiver(transport, port=int(receiver.session.split(":")[1]))
    try:
        assert sender.engine.transfer_sync(receiver.session, sender.address, receiver.address, 64) < 0
        assert sender.engine.transfer_sync(receiver.session, sender.address, again.address, 64) < 0
        assert sender.engine.send_probe(receiver.session) < 0
        assert sender.engine.send_probe(again.session) == 0
        sender.memory[:] = 7
        assert sender.engine.transfer_sync(again.session, sender.address, again.address, 64) == 0
        assert again.contents(0, 65) == bytes([7] * 64) + b"\0"
    finally:
        again.kill()


def test_many_threads_share_a_session(sender: Sender, receiver: Receiver) -> None:
    sender.memory[:] = np.random.default_rng(1).integers(0, 256, NUM_BYTES, np.uint8)
    results: list[int] = []

    def send(part: int) -> None:
        for at in range(part * PAGE, NUM_BYTES, 8 * PAGE):
            results.append(
                sender.engine.transfer_sync(
                    receiver.session, sender.address + at, receiver.address + at, PAGE
                )
            )

    threads = [threading.Thread(target=send, args=(part,)) for part in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert results == [0] * (NUM_BYTES // PAGE)
    assert receiver.contents(0, NUM_BYTES) == sender.memory.tobytes()
    assert sender.engine.stats().total.num_bytes == NUM_BYTES


def test_registration_follows_mooncakes_conventions() -> None:
    sender = Sender("tcp")
    engine, address = sender.engine, sender.address
    other = np.zeros(PAGE, np.uint8)
    assert engine.batch_register([other.ctypes.data, address + 8], [PAGE, 8]) < 0
    engine.register(other.ctypes.data, PAGE)  # the failed batch left nothing behind
    with pytest.raises(RuntimeError, match="registration failed"):
        engine.register(address, NUM_BYTES)
    with pytest.raises(RuntimeError, match="registration failed"):
        engine.register(address, 0)
    engine.deregister(other.ctypes.data)
    with pytest.raises(RuntimeError, match="deregistration failed"):
        engine.deregister(other.ctypes.data)
    assert engine.batch_deregister([other.ctypes.data, address]) < 0
    assert engine.batch_deregister([address]) < 0  # gone, although the batch failed
    assert engine.get_ib_device() == ""
    engine.close()
    engine.close()


def test_auto_picks_local_on_one_host_and_keys_must_match(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    key_file = tmp_path / "key"
    key_file.write_text("a key of sixteen bytes or more")
    key_file.chmod(0o600)
    sender, receiver = Sender("auto", key_file), Receiver("auto", str(key_file))
    assert sender.engine.transfer_sync(receiver.session, sender.address, receiver.address, 64) == 0
    assert f"peer={receiver.session} transport=local" in caplog.text
    assert sender.engine.get_session_id().count(":") == 2
    receiver.kill()
    sender.engine.close()


def test_ends_without_a_common_transport_cannot_transfer(caplog: pytest.LogCaptureFixture) -> None:
    sender, receiver = Sender("tcp"), Receiver("local")
    assert sender.engine.transfer_sync(receiver.session, sender.address, receiver.address, 64) < 0
    assert "no transport reaches it: here tcp; there local" in caplog.text
    receiver.kill()
    sender.engine.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_a_host_that_peers_cannot_reach_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="name the address"):
        TransportConfig(host=host)


def test_leaving_the_host_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="cluster-key-file"):
        TransferEndpoint(TransportConfig("local", host="10.1.2.3"))
