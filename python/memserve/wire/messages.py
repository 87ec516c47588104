"""Every control message between processes, and how it becomes bytes.

A request gets exactly one answer. A message added, or a field, bumps WIRE_VERSION; two versions
do not talk to each other. Knows no sockets.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from memserve.core.errors import WireMismatch
from memserve.core.ids import Epoch, InstanceId

WIRE_VERSION = 1


class Role(StrEnum):
    """What an instance does for a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


class InstanceInfo(msgspec.Struct, frozen=True):
    """What the router must know of an instance to send it requests."""

    instance_id: InstanceId
    epoch: Epoch
    role: Role
    url: str
    """Base URL of its HTTP server, without a trailing slash."""
    bootstrap_port: int | None = None
    """Where decode servers find a prefill's KV; None for other roles."""


class Register(msgspec.Struct, frozen=True, tag=True):
    """Instance → router: I am ready to serve. Idempotent; a new epoch replaces the old one."""

    info: InstanceInfo


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Instance → router: still here. Answered `Unknown` by a router that has forgotten it."""

    instance_id: InstanceId
    epoch: Epoch


class Deregister(msgspec.Struct, frozen=True, tag=True):
    """Instance → router: send me nothing more."""

    instance_id: InstanceId
    epoch: Epoch


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Router → instance: done; tell me that you live every `heartbeat_s`."""

    heartbeat_s: float


class Unknown(msgspec.Struct, frozen=True, tag=True):
    """Router → instance: I do not know this instance and epoch; register again."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The request makes no sense to the receiver; repeating it cannot help."""

    reason: str


class Open(msgspec.Struct, frozen=True, tag=True):
    """Transfer engine → peer: under which transports can your memory be reached?"""

    epoch: Epoch
    """The epoch the caller believes it talks to."""


class Endpoint(msgspec.Struct, frozen=True):
    """How one transport of a process is reached, as that transport wrote it down."""

    transport: str
    address: str


class MemoryRange(msgspec.Struct, frozen=True):
    """One registered region of the answering process."""

    region_id: int
    address: int
    num_bytes: int


class Opened(msgspec.Struct, frozen=True, tag=True):
    """Peer → transfer engine: my life's epoch, my transports and my memory."""

    epoch: Epoch
    endpoints: tuple[Endpoint, ...]
    regions: tuple[MemoryRange, ...]


Message = Register | Heartbeat | Deregister | Accepted | Unknown | Refused | Open | Opened


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    version: int
    body: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
_envelope = msgspec.msgpack.Decoder(_Envelope)
_body: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The bytes of one message, version first."""
    return _encoder.encode(_Envelope(WIRE_VERSION, msgspec.Raw(_encoder.encode(message))))


def decode(data: bytes) -> Message:
    """The message in `data`. Raises WireMismatch for another version or anything malformed."""
    try:
        envelope = _envelope.decode(data)
        if envelope.version != WIRE_VERSION:
            raise WireMismatch(f"the peer speaks wire version {envelope.version}, this is {WIRE_VERSION}")
        return _body.decode(envelope.body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireMismatch(f"malformed control message: {error}") from error
