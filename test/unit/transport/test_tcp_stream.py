"""What a stream does when the kernel takes or gives only part, or nothing."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from memserve.core.errors import InstanceLost, TransferTimeout
from memserve.transport.local.syscalls import SocketVectors
from memserve.transport.tcp import stream as tcp_stream
from memserve.transport.tcp.stream import NO_DEADLINE, Stream

SLICE_S = 0.02


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stream, Stream]]:
    monkeypatch.setattr(tcp_stream, "_SLICE_S", SLICE_S)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    calls = SocketVectors()
    pair = Stream(one, "one", calls), Stream(other, "other", calls)
    yield pair
    for stream in pair:
        stream.close()


def test_a_deadline_of_many_slices_is_waited_for_and_not_passed(streams: tuple[Stream, Stream]) -> None:
    begun = time.monotonic()
    deadline = begun + 10 * SLICE_S
    with pytest.raises(TransferTimeout):
        streams[0].receive(memoryview(bytearray(1)), deadline)
    assert deadline <= time.monotonic() < deadline + 1


def test_bytes_that_come_after_some_slices_are_received(streams: tuple[Stream, Stream]) -> None:
    later = threading.Timer(5 * SLICE_S, streams[1].send_bytes, (b"late", NO_DEADLINE))
    later.start()
    memory = bytearray(4)
    streams[0].receive(memoryview(memory), time.monotonic() + 5)
    later.join()
    assert memory == b"late"


def test_head_and_memory_arrive_whole_though_the_buffers_are_smaller(streams: tuple[Stream, Stream]) -> None:
    sent = bytes(range(256)) * (1 << 17)  # 32 MiB
    received = bytearray(len(sent))

    def send() -> None:
        streams[0].send(b"head", memoryview(sent), time.monotonic() + 30)

    sender = threading.Thread(target=send)
    sender.start()
    assert streams[1].receive_bytes(4, NO_DEADLINE) == b"head"
    streams[1].receive(memoryview(received), NO_DEADLINE)
    sender.join()
    assert received == sent


def test_send_to_a_peer_that_does_not_read_times_out(streams: tuple[Stream, Stream]) -> None:
    deadline = time.monotonic() + 5 * SLICE_S
    with pytest.raises(TransferTimeout):
        streams[0].send(b"head", memoryview(bytes(1 << 26)), deadline)
    assert deadline <= time.monotonic() < deadline + 1


def test_the_other_end_closing_amid_memory_is_a_loss(streams: tuple[Stream, Stream]) -> None:
    streams[1].send_bytes(b"half", NO_DEADLINE)
    streams[1].cut()
    with pytest.raises(InstanceLost):
        streams[0].receive(memoryview(bytearray(8)), NO_DEADLINE)
