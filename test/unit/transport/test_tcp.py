"""What the suite for all transports does not ask: keys, addresses, and strangers on the port."""

import contextlib
import logging
import random
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import ConfigError, StaleEpoch, TransferFailed, WireMismatch
from memserve.core.ids import new_epoch
from memserve.testing.transport_process import wait_until
from memserve.transport.base import Peer
from memserve.transport.copies import Copies, Copy
from memserve.transport.regions import Region, RegionTable
from memserve.transport.tcp.client import TcpTransport

KEY = ClusterKey(b"the key of this cluster")
OTHER_KEY = ClusterKey(b"the key of another one")
TIMEOUT_S = 5.0


class End:
    """A transport with 4 KiB of registered memory."""

    def __init__(self, key: ClusterKey | None = KEY, host: str = "127.0.0.1") -> None:
        self.epoch = new_epoch()
        self.transport = TcpTransport(self.epoch, host, key=key)
        self.memory = np.zeros(4096, np.uint8)
        self.transport.register(Region(1, self.memory.ctypes.data, 4096))

    @property
    def peer(self) -> Peer:
        return Peer("end", self.epoch, self.transport.address, RegionTable())

    @property
    def port(self) -> int:
        return int(self.transport.address.rpartition(":")[2])

    def write(self, to: "End") -> None:
        self.transport.write(to.peer, Copies.of([Copy(1, 0, 1, 0, 100)]), timeout_s=TIMEOUT_S)


@pytest.fixture
def owner() -> Iterator[End]:
    end = End()
    yield end
    end.transport.close()


@pytest.mark.parametrize("key", [None, OTHER_KEY])
def test_tcp_peer_with_another_key_or_none_is_refused_by_both_ends(
    owner: End, key: ClusterKey | None
) -> None:
    stranger = End(key)
    try:
        with pytest.raises(WireMismatch, match="cluster key"):
            stranger.write(owner)
        with pytest.raises(WireMismatch, match="cluster key"):
            owner.write(stranger)
    finally:
        stranger.transport.close()


def test_control_server_without_a_key_binds_loopback_only() -> None:
    with pytest.raises(ConfigError, match="cluster-key-file"):
        TcpTransport(new_epoch(), "0.0.0.0")
    with pytest.raises(ConfigError, match="cluster-key-file"):
        TcpTransport(new_epoch(), "example.org")


def test_a_port_that_is_taken_is_a_configuration_error(owner: End) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        TcpTransport(new_epoch(), "127.0.0.1", owner.port)


def test_control_link_works_over_ipv6() -> None:
    try:
        ends = End(host="::1"), End(host="::1")
    except ConfigError as error:
        pytest.skip(f"no IPv6 loopback here: {error}")
    ends[0].memory[:] = 3
    ends[0].write(ends[1])
    assert ends[0].transport.address.startswith("[::1]:")
    assert (ends[1].memory[:100] == 3).all()
    for end in ends:
        end.transport.close()


def test_malformed_tcp_request_ends_its_connection_with_one_log_line(
    owner: End, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    generator = random.Random(1)
    for junk in (b"GET / HTTP/1.1\r\n\r\n" * 8, generator.randbytes(300), bytes(200)):
        with socket.create_connection(("127.0.0.1", owner.port), timeout=TIMEOUT_S) as connection:
            connection.sendall(junk)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
    wait_until(lambda: len(caplog.records) == 3, "three lines")
    assert all("no memserve tcp transport" in record.getMessage() for record in caplog.records)
    end = End()
    end.memory[:] = 5
    end.write(owner)
    assert (owner.memory[:100] == 5).all()
    end.transport.close()


@pytest.mark.parametrize(
    ("request_bytes", "reason"),
    [
        (b"\x09" + bytes(39), "operation 9"),
        (b"\x01\0\0\0" + b"\xff" * 4 + bytes(32), "4294967295 rows"),
        (b"\x01\0\0\0\x01\0\0\0" + b"\xff" * 8 + b"\x01" + bytes(15) + b"\x04" + bytes(7), "do not fill"),
    ],
)
def test_a_malformed_request_of_an_admitted_peer_ends_its_connection(
    owner: End, caplog: pytest.LogCaptureFixture, request_bytes: bytes, reason: str
) -> None:
    caplog.set_level(logging.WARNING)
    end = End()
    end.transport.connect(owner.peer, timeout_s=TIMEOUT_S)
    link = end.transport._idle[owner.peer][0]
    link.stream.send_bytes(request_bytes, float("inf"))
    wait_until(lambda: reason in caplog.text, "a line that says why")
    end.transport.close()
    assert not owner.memory.any()


def test_tcp_refuses_an_epoch_fenced_before_its_connection(owner: End) -> None:
    end = End()
    owner.transport.fence(end.epoch, timeout_s=TIMEOUT_S)
    with pytest.raises(TransferFailed, match="fenced"):
        end.write(owner)
    end.transport.close()


def test_a_wrong_epoch_leaves_the_transport_usable(owner: End) -> None:
    end = End()
    wrong = Peer("end", new_epoch(), owner.transport.address, RegionTable())
    with pytest.raises(StaleEpoch):
        end.transport.connect(wrong, timeout_s=TIMEOUT_S)
    end.write(owner)
    end.transport.close()
