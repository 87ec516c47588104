"""Every control message between processes, and how it becomes bytes.

A request gets exactly one answer. A message added, or a field, bumps WIRE_VERSION; two versions
do not talk to each other. Knows no sockets.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from memserve.core.block_keys import BlockKey
from memserve.core.cache_events import CacheEvent, Stored
from memserve.core.caching import CachingMode
from memserve.core.errors import WireMismatch
from memserve.core.ids import Epoch, InstanceId
from memserve.wire.peer_messages import FromPool, ToPool

WIRE_VERSION = 9


class Role(StrEnum):
    """What an instance does for a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"
    MEMORY = "memory"
    """Serves no requests: lends its DRAM to the others."""


class InstanceInfo(msgspec.Struct, frozen=True):
    """What the router must know of an instance to send it requests."""

    instance_id: InstanceId
    epoch: Epoch
    role: Role
    url: str
    """Base URL of its HTTP server, without a trailing slash."""
    bootstrap_port: int | None = None
    """Where decode servers find a prefill's KV; None for other roles."""
    caching: CachingMode = CachingMode.FULL
    """A router refuses an instance whose value is not that of the others."""
    roles: tuple[Role, ...] = ()
    """What else it can become, by starting anew."""


class Load(msgspec.Struct, frozen=True):
    """What an instance has to do at one moment, all its data-parallel ranks together."""

    num_running: int
    """Requests."""
    num_queued: int
    num_used_tokens: int
    """Of KV in HBM, for requests that run or wait."""
    max_tokens: int
    step_age_s: float
    """Since its scheduler last came round, the slowest rank's: alive but stuck is visible here."""


class Register(msgspec.Struct, frozen=True, tag=True):
    """Instance → router: I am ready to serve. Idempotent; a new epoch replaces the old one."""

    info: InstanceInfo
    is_draining: bool = False
    """A router has said so, which may have been another one."""


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Instance → router: still here. Answered `Unknown` by a router that has forgotten it."""

    instance_id: InstanceId
    epoch: Epoch
    load: Load | None = None
    """None where the engine does not tell."""


class Deregister(msgspec.Struct, frozen=True, tag=True):
    """Instance → router: send me nothing more."""

    instance_id: InstanceId
    epoch: Epoch


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Router → instance: done; tell me that you live every `heartbeat_s`."""

    heartbeat_s: float
    is_draining: bool = False
    """You are; say so to any router that has forgotten it."""
    become: Role | None = None
    """End, and start anew as this, at the same address."""


class Unknown(msgspec.Struct, frozen=True, tag=True):
    """Router → instance: I do not know this instance and epoch; register again."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The request makes no sense to the receiver; repeating it cannot help."""

    reason: str


class PoolInfo(msgspec.Struct, frozen=True):
    """What instances must know of one rank's memory pool to exchange blocks with it."""

    instance_id: InstanceId
    epoch: Epoch
    """Of the process that holds the pool."""
    role: Role
    caching: CachingMode
    address: str
    """`host:port` of its control server."""
    layout: str
    """Digest of its blocks' layout, in hex; empty for a pool that takes any."""
    bootstrap: str = ""
    """`host:port` by which requests name this prefill to decode; empty for other roles."""
    block_bytes: int = 0
    """Of the KV of one block, on all ranks together; 0 for a pool that takes any."""
    rank: int = 0
    """Tensor-parallel. The ranks of one instance hold the same blocks, and rank 0 tells of them."""


class RegisterPool(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: I can be reached. Answered `Members`, or `Refused`. Idempotent."""

    info: PoolInfo


class TierBlocks(msgspec.Struct, frozen=True):
    """One tier of a pool at one moment."""

    tier: str
    """`hbm` or `dram`."""
    num_cached: int
    num_free: int | None = None
    """None where only the engine knows."""
    num_total: int | None = None


class PoolHeartbeat(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: still here, and I know the members as of `version`. Answered `Members`, `Unknown`."""

    epoch: Epoch
    version: int
    tiers: tuple[TierBlocks, ...] = ()


class DeregisterPool(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: I am going. Answered `Done`."""

    epoch: Epoch


class Members(msgspec.Struct, frozen=True, tag=True):
    """Router → pool: all pools of the cluster, the asking one included."""

    heartbeat_s: float
    version: int
    pools: tuple[PoolInfo, ...] | None
    """None: unchanged since the version that was named."""
    wants_prompt_keys: bool = False
    """The router knows prompts by their text, and wants to be told of their keys."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """It is so now."""


class PromptKeys(msgspec.Struct, frozen=True, array_like=True):
    """A prompt that has come to a server, as its cache knows it."""

    rid: str
    keys: tuple[BlockKey, ...]
    """Of its whole pages."""


class PoolEvents(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: what changed in my index; nothing, now and then. Answered `Done`, `SnapshotWanted`,
    `AuditWanted`, or `Unknown`."""

    epoch: Epoch
    events: tuple[CacheEvent, ...]
    """All since the last message, in the order of their numbers."""
    layout: str = ""
    """Of a memory instance, which has a pool for each layout: which one, as a digest in hex; else empty."""
    prompts: tuple[PromptKeys, ...] = ()
    """Prompts that have come to the pool's server since; only where they are wanted, and the latest."""


class SnapshotWanted(msgspec.Struct, frozen=True, tag=True):
    """Router → pool: events are missing here; send all that you have."""


class AuditWanted(msgspec.Struct, frozen=True, tag=True):
    """Router → pool: done, and send a snapshot: not that it is needed, but to see how true the tree is."""


class SnapshotPart(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: part of all that was cached after event `sequence`. Answered `Done`, `Unknown`, or
    `SnapshotWanted` if a part before it has not arrived, or an audit has found that the tree is wrong."""

    epoch: Epoch
    sequence: int
    index: int
    """0, 1, 2, ...; 0 begins anew."""
    is_last: bool
    chains: tuple[Stored, ...]
    is_audit: bool = False
    """To be compared, not taken in."""
    layout: str = ""
    """As in `PoolEvents`."""


ToRouter = Register | Heartbeat | Deregister
PoolToRouter = RegisterPool | PoolHeartbeat | DeregisterPool | PoolEvents | SnapshotPart
FromRouter = Accepted | Unknown | Members | SnapshotWanted | AuditWanted
Message = ToRouter | PoolToRouter | FromRouter | ToPool | FromPool | Done | Refused


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
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireMismatch(f"malformed control message: {error}") from error
