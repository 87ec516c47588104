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

WIRE_VERSION = 10


class Role(StrEnum):
    """The part of an instance in serving requests."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"
    MEMORY = "memory"
    """Serves no requests: lends its DRAM to the other instances."""


class InstanceInfo(msgspec.Struct, frozen=True):
    """What the router needs to send requests to an instance."""

    instance_id: InstanceId
    epoch: Epoch
    role: Role
    url: str
    """Base URL of its HTTP server, without a trailing slash."""
    bootstrap_port: int | None = None
    """Where decode servers find a prefill's KV; None for other roles."""
    caching: CachingMode = CachingMode.FULL
    """A router refuses an instance whose value differs from that of the others."""
    roles: tuple[Role, ...] = ()
    """The other roles that the instance can take after a restart."""


class Load(msgspec.Struct, frozen=True):
    """The work of an instance at one moment, all its data-parallel ranks together."""

    num_running: int
    """Requests."""
    num_queued: int
    num_used_tokens: int
    """Of KV in HBM, for requests that run or wait."""
    max_tokens: int
    step_age_s: float
    """Age of the last step of the slowest rank's scheduler: shows a process that is alive but stuck."""


class Register(msgspec.Struct, frozen=True, tag=True):
    """Instance → router: the instance is ready to serve. Idempotent; a new epoch replaces the old one."""

    info: InstanceInfo
    is_draining: bool = False
    """A router, maybe an earlier one, has drained the instance."""


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Instance → router: the instance lives. A router that does not know it answers `Unknown`."""

    instance_id: InstanceId
    epoch: Epoch
    load: Load | None = None
    """None if the engine does not report it."""


class Deregister(msgspec.Struct, frozen=True, tag=True):
    """Instance → router: send no more requests."""

    instance_id: InstanceId
    epoch: Epoch
    has_crashed: bool = False
    """Its scheduler has ended by itself: the requests that it has will not be answered."""


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Router → instance: registered; send a heartbeat every `heartbeat_s`."""

    heartbeat_s: float
    is_draining: bool = False
    """The instance is draining, and has to tell a router that does not know it."""
    become: Role | None = None
    """The role to restart as, at the same address; None: stay."""


class Unknown(msgspec.Struct, frozen=True, tag=True):
    """Receiver → sender: the sender and epoch are not known; register, or say Hello, again."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The receiver cannot accept the request; repeating it does not help."""

    reason: str


class PoolInfo(msgspec.Struct, frozen=True):
    """What instances need to exchange blocks with one rank's memory pool."""

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
    """Pool → router: the pool can be reached. Answered `Members` or `Refused`. Idempotent."""

    info: PoolInfo


class TierBlocks(msgspec.Struct, frozen=True):
    """One tier of a pool at one moment."""

    tier: str
    """`hbm` or `dram`."""
    num_cached: int
    num_free: int | None = None
    """None if only the engine knows it."""
    num_total: int | None = None


class PoolHeartbeat(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: the pool lives and knows the members as of `version`. Answered `Members`, `Unknown`."""

    epoch: Epoch
    version: int
    tiers: tuple[TierBlocks, ...] = ()


class DeregisterPool(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: the pool leaves. Answered `Done`."""

    epoch: Epoch


class Members(msgspec.Struct, frozen=True, tag=True):
    """Router → pool: all pools of the cluster, the asking one included."""

    heartbeat_s: float
    version: int
    pools: tuple[PoolInfo, ...] | None
    """None: unchanged since the version in the heartbeat."""
    wants_prompt_keys: bool = False
    """The router knows prompts by their text, and wants their keys."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """The request has been carried out."""


class PromptKeys(msgspec.Struct, frozen=True, array_like=True):
    """The keys of a prompt that has arrived at a server."""

    rid: str
    keys: tuple[BlockKey, ...]
    """Of its whole pages."""


class PoolEvents(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: the changes of the pool's index; sometimes none. Answered `Done`, `SnapshotWanted`,
    `AuditWanted`, or `Unknown`."""

    epoch: Epoch
    events: tuple[CacheEvent, ...]
    """All since the last message, in the order of their numbers."""
    layout: str = ""
    """Hex digest of the layout, for a memory instance, which has a pool per layout; else empty."""
    prompts: tuple[PromptKeys, ...] = ()
    """Latest prompts of the pool's server since the last message, if the router wants them."""


class SnapshotWanted(msgspec.Struct, frozen=True, tag=True):
    """Router → pool: events are missing; send a snapshot."""


class AuditWanted(msgspec.Struct, frozen=True, tag=True):
    """Router → pool: carried out; send a snapshot as well, to be compared with the router's tree."""


class SnapshotPart(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: a part of the snapshot after event `sequence`. Answered `Done`, `Unknown`, or
    `SnapshotWanted` if a part before it has not arrived, or an audit has found that the tree is wrong."""

    epoch: Epoch
    sequence: int
    index: int
    """0, 1, 2, ...; 0 begins a snapshot."""
    is_last: bool
    chains: tuple[Stored, ...]
    is_audit: bool = False
    """Compare the snapshot with the tree, do not apply it."""
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
