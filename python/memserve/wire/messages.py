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
from memserve.core.kv_layout import KVLayout

WIRE_VERSION = 2


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


class RegisterPool(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: I can be reached. Answered `Members`, or `Refused`. Idempotent."""

    info: PoolInfo


class PoolHeartbeat(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: still here, and I know the members as of `version`. Answered `Members`, `Unknown`."""

    epoch: Epoch
    version: int


class DeregisterPool(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: I am going. Answered `Done`."""

    epoch: Epoch


class Members(msgspec.Struct, frozen=True, tag=True):
    """Router → pool: all pools of the cluster, the asking one included."""

    heartbeat_s: float
    version: int
    pools: tuple[PoolInfo, ...] | None
    """None: unchanged since the version that was named."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: who I am, who I think you are, what my blocks are. Answered `Welcome`, `Refused`."""

    epoch: Epoch
    peer_epoch: Epoch
    data_epoch: Epoch
    """Under which my transports write to you: `epoch`, until I was fenced and began anew."""
    layout: KVLayout


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: how my memory for such blocks is reached. Of use only if `epoch` is the one you meant."""

    epoch: Epoch
    data_epoch: Epoch
    """Of my transports."""
    endpoints: tuple[Endpoint, ...]
    arena: MemoryRange
    slot_bytes: int
    is_fenced: bool = False
    """Your data epoch is refused here for good: say Hello under another."""


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: I would write the blocks of this chain that you lack. Answered `Reserved`, `Declined`.

    keys[0] comes after `parent`, or begins a prompt. `transfer_id` is the sender's, never used twice;
    a repeated request gets the same answer. `Unknown`, here and below: say Hello first.
    """

    epoch: Epoch
    transfer_id: int
    layout: bytes
    """Digest."""
    keys: tuple[BlockKey, ...]
    parent: BlockKey | None


class Allocate(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: reserve blocks that nobody indexes. Answered `Reserved`, `Declined`."""

    epoch: Epoch
    transfer_id: int
    layout: bytes
    num_blocks: int


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: write here, then commit or cancel."""

    num_known: int
    """So many blocks, from the front of the chain, are here already."""
    addrs: tuple[int, ...]
    """`BlockAddr` of a slot for each block after those."""


class Declined(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: not now; nothing has changed here."""

    reason: str
    parent_unknown: bool = False
    """Send the chain from its root and it may be taken."""


class Commit(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: all bytes of the reservation are in place. Answered `Committed`, `Declined`."""

    epoch: Epoch
    transfer_id: int
    checksums: tuple[int, ...]
    """Of each block written, in the order of the reserved addresses."""
    keys: tuple[BlockKey, ...] = ()
    """How to index blocks that were reserved by `Allocate`; none: they wait to be claimed."""
    parent: BlockKey | None = None


class Committed(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: so many blocks are in the index that were not; 0 for blocks nobody indexes."""

    num_new: int


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: the reservation will not be committed. Answered `Done`, also when it is unknown."""

    epoch: Epoch
    transfer_id: int
    settled: bool
    """No byte of mine can land any more; else the blocks stay in quarantine."""


class Locate(msgspec.Struct, frozen=True, tag=True):
    """Anyone → pool: how much of this chain do you hold? Answered `Located`."""

    layout: bytes
    keys: tuple[BlockKey, ...]


class Located(msgspec.Struct, frozen=True, tag=True):
    """Pool → anyone: so many blocks, from the front."""

    num_blocks: int


class AcquireLease(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: hold these while I read them. Answered `Leased`, an empty one if none is there."""

    epoch: Epoch
    lease_id: int
    """The reader's, never used twice; a repeated request gets the same answer."""
    layout: bytes
    keys: tuple[BlockKey, ...]


class Leased(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: where the longest prefix that is here can be read, and what its bytes sum to."""

    addrs: tuple[int, ...]
    checksums: tuple[int, ...]


class ReleaseLease(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: I have read them. Answered `Done`, also when the lease is unknown or has run out."""

    epoch: Epoch
    lease_id: int


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Router → pool: get what you lack of this chain from `holder`. Answered `Fetched`."""

    layout: bytes
    keys: tuple[BlockKey, ...]
    parent: BlockKey | None
    holder: str
    """`host:port` of the other pool's control server."""
    holder_epoch: Epoch
    timeout_s: float


class Fetched(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: so many blocks of the chain, from the front, are here now."""

    num_blocks: int
    reason: str = ""
    """Why it is not all of them."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """It is so now."""


class PoolEvents(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: what changed in my index. Answered `Done`, `SnapshotWanted`, or `Unknown`."""

    epoch: Epoch
    events: tuple[CacheEvent, ...]
    """All since the last message, in the order of their numbers."""


class SnapshotWanted(msgspec.Struct, frozen=True, tag=True):
    """Router → pool: events are missing here; send all that you have."""


class SnapshotPart(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: part of all that was cached after event `sequence`. Answered `Done`, `Unknown`,
    or `SnapshotWanted` if a part before it has not arrived."""

    epoch: Epoch
    sequence: int
    index: int
    """0, 1, 2, ...; 0 begins anew."""
    is_last: bool
    chains: tuple[Stored, ...]


ToRouter = Register | Heartbeat | Deregister
PoolToRouter = RegisterPool | PoolHeartbeat | DeregisterPool | PoolEvents | SnapshotPart
FromRouter = Accepted | Unknown | Members | SnapshotWanted
ToPool = Hello | Reserve | Allocate | Commit | Cancel | Locate | AcquireLease | ReleaseLease | Fetch
FromPool = Welcome | Reserved | Declined | Committed | Located | Leased | Fetched | Done
Message = ToRouter | PoolToRouter | FromRouter | Open | Opened | ToPool | FromPool | Refused


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
