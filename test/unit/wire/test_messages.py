"""Messages and their bytes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.errors import WireMismatch
from memserve.core.ids import Epoch, InstanceId
from memserve.wire.messages import (
    WIRE_VERSION,
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
    decode,
    encode,
)
from memserve.wire.peer_messages import Hello, MemoryRange, TransportAddress, Welcome

words = st.sampled_from(["", "a", "http://h:1", "ü", "x" * 300])
names = words.map(InstanceId)
epochs = st.integers(0, 2**63 - 1).map(Epoch)
numbers = st.integers(0, 2**64 - 1)
infos = st.builds(
    InstanceInfo, names, epochs, st.sampled_from(Role), words, st.none() | st.integers(0, 65535)
)
loads = st.builds(Load, *(numbers,) * 4, st.floats(allow_nan=False))
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Register, infos, st.booleans()),
    st.builds(Heartbeat, names, epochs, st.none() | loads),
    st.builds(Deregister, names, epochs),
    st.builds(Accepted, st.floats(allow_nan=False), st.booleans()),
    st.builds(Unknown),
    st.builds(Refused, words),
    st.builds(Hello, epochs, epochs, epochs),
    st.builds(
        Welcome,
        epochs,
        epochs,
        st.lists(st.builds(TransportAddress, words, words), max_size=2).map(tuple),
        st.lists(st.builds(MemoryRange, numbers, numbers, numbers), max_size=2).map(tuple),
    ),
)

HEARTBEAT = Heartbeat(InstanceId("a"), Epoch(1))


@given(messages)
def test_decode_returns_the_encoded_message(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.binary(max_size=64))
def test_decode_refuses_garbage_as_a_mismatch(data: bytes) -> None:
    with pytest.raises(WireMismatch):
        decode(data)


@given(messages, st.data())
def test_a_truncated_message_is_a_mismatch(message: Message, data: st.DataObject) -> None:
    encoded = encode(message)
    with pytest.raises(WireMismatch):
        decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@given(messages, st.data())
def test_a_damaged_message_is_a_mismatch_or_another_message(message: Message, data: st.DataObject) -> None:
    damaged = bytearray(encode(message))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decode(bytes(damaged))
    except WireMismatch:
        return


@pytest.mark.parametrize("version", [0, WIRE_VERSION + 1])
def test_another_version_is_refused_by_name(version: int) -> None:
    body = msgspec.msgpack.encode(HEARTBEAT)
    with pytest.raises(WireMismatch, match=f"version {version}"):
        decode(msgspec.msgpack.encode([version, msgspec.Raw(body)]))


def test_decode_does_not_read_the_body_of_another_version() -> None:
    with pytest.raises(WireMismatch, match=f"version {WIRE_VERSION + 1}"):
        decode(msgspec.msgpack.encode([WIRE_VERSION + 1, {"type": "FromTheFuture"}]))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"type": "Nothing"},
        {"type": "Heartbeat"},
        {"type": "Heartbeat", "instance_id": 5, "epoch": 1},
        {"type": "Register", "info": {"instance_id": "a", "epoch": 1, "role": "king", "url": ""}},
        ["Heartbeat", "a", 1],
        None,
    ],
)
def test_a_body_of_another_shape_is_a_mismatch(body: object) -> None:
    with pytest.raises(WireMismatch):
        decode(msgspec.msgpack.encode([WIRE_VERSION, body]))
