"""The frames of the `tcp` transport.

    initiator                                        owner of the memory
    HELLO    version, epochs, connection id, nonce →
                                                   ← WELCOME  epoch, nonce, proof of the key
    PROOF    of the key, over both nonces          →
                                                   ← REPLY    admitted, or why not
    then any number of
    REQUEST  operation, number of rows, bytes, and
             the first row                         →
    rows     region, offset, length: int64[n-1, 3] →
    bytes    (write)                               →
                                                   ← REPLY    done, or why not
                                                   ← bytes    (read, if the reply is good)

The proofs are HMAC-SHA256 under a key derived from the cluster key, with each end's role in them;
they authenticate the connection's two ends, and neither hide nor sign the bytes that follow.
Without a cluster key the proofs are zeros. Knows no socket options and no memory.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import MemServeError, OutOfBounds, StaleEpoch, TransferFailed, WireMismatch
from memserve.core.ids import Epoch
from memserve.transport.tcp.regions import Rows
from memserve.transport.tcp.stream import Stream, vectors_of

VERSION = 1
MAX_ROWS = 1 << 16
"""Copies of one request; a longer batch is several, each done or refused on its own."""

_MAGIC = b"memserve"
_HELLO = struct.Struct("<8sHxxxxxxQQq32s")
_WELCOME = struct.Struct("<8sHxxxxxxQ32s")
_REQUEST = struct.Struct("<BxxxIQqqq")
_REPLY = struct.Struct("<HH")
_PROOF_BYTES = 32
_MAX_REASON_BYTES = 1024


class TcpOperation(IntEnum):
    """The kind of a request. The first words of the rows of SETTLE are connection ids."""

    WRITE = 1
    READ = 2
    SETTLE = 3


_OPERATIONS = frozenset(TcpOperation)


class Status(IntEnum):
    """How a request ended."""

    DONE = 0
    OUT_OF_BOUNDS = 1
    FAILED = 2
    NOT_ADMITTED = 3


@dataclass(frozen=True, slots=True)
class HandshakeHello:
    """The first frame of the connecting process."""

    epoch: Epoch
    expected_epoch: Epoch
    connection_id: int


class Authenticator:
    """Makes and checks the two ends' proofs."""

    def __init__(self, key: ClusterKey | None) -> None:
        self._key = None if key is None else key.derive("tcp transport v1")

    def proof(self, role: bytes, transcript: bytes) -> bytes:
        """The HMAC of the transcript under the cluster key, for one end's role."""
        if self._key is None:
            return bytes(_PROOF_BYTES)
        return hmac.digest(self._key, role + transcript, hashlib.sha256)

    def check(self, role: bytes, transcript: bytes, proof: bytes) -> None:
        """Raises WireMismatch if `proof` is not the other end's."""
        if not hmac.compare_digest(self.proof(role, transcript), proof):
            raise WireMismatch("the other end holds another cluster key, or none")


def introduce(stream: Stream, hello: HandshakeHello, keys: Authenticator, deadline: float) -> None:
    """The initiator's half of the handshake.

    Raises WireMismatch for another version or key, StaleEpoch for another process,
    TransferFailed if the owner does not admit this one.
    """
    sent = _HELLO.pack(
        _MAGIC, VERSION, hello.epoch, hello.expected_epoch, hello.connection_id, secrets.token_bytes(32)
    )
    stream.send_bytes(sent, deadline)
    welcome = stream.receive_bytes(_WELCOME.size, deadline)
    proof = stream.receive_bytes(_PROOF_BYTES, deadline)
    magic, version, epoch, _ = _WELCOME.unpack(welcome)
    if magic != _MAGIC or version != VERSION:
        raise WireMismatch(f"{stream.name} is no memserve tcp transport of version {VERSION}")
    keys.check(b"owner", sent + welcome, proof)
    if epoch != hello.expected_epoch:
        raise StaleEpoch(stream.name, hello.expected_epoch, Epoch(epoch))
    stream.send_bytes(keys.proof(b"initiator", sent + welcome), deadline)
    receive_reply(stream, deadline)


def welcome(stream: Stream, epoch: Epoch, keys: Authenticator, deadline: float) -> HandshakeHello:
    """The owner's half, up to the last reply, which is the caller's to send. Raises WireMismatch."""
    received = stream.receive_bytes(_HELLO.size, deadline)
    magic, version, theirs, expected, connection_id, _ = _HELLO.unpack(received)
    if magic != _MAGIC or version != VERSION:
        raise WireMismatch(f"that is no memserve tcp transport of version {VERSION}")
    sent = _WELCOME.pack(_MAGIC, VERSION, epoch, secrets.token_bytes(32))
    stream.send_bytes(sent + keys.proof(b"owner", received + sent), deadline)
    keys.check(b"initiator", received + sent, stream.receive_bytes(_PROOF_BYTES, deadline))
    return HandshakeHello(Epoch(theirs), Epoch(expected), connection_id)


def request(operation: TcpOperation, rows: Rows, num_bytes: int) -> bytes:
    """A request in bytes, up to what it carries. There may be no rows."""
    if isinstance(rows, tuple):
        return _REQUEST.pack(operation, 1, num_bytes, *rows)
    first = rows[0].tolist() if len(rows) else (0, 0, 0)
    return _REQUEST.pack(operation, len(rows), num_bytes, *first) + rows[1:].tobytes()


def receive_request(stream: Stream, deadline: float) -> tuple[TcpOperation, Rows, int]:
    """The next request: operation, rows and bytes that follow. Raises WireMismatch for nonsense."""
    head = stream.receive_bytes(_REQUEST.size, deadline)
    code, num_rows, num_bytes, region_id, offset, length = _REQUEST.unpack(head)
    if code not in _OPERATIONS or num_rows > MAX_ROWS:
        raise WireMismatch(f"malformed request: operation {code}, {num_rows} rows")
    if num_rows == 1:
        return TcpOperation(code), (region_id, offset, length), num_bytes
    rows = np.empty((num_rows, 3), np.int64)
    if num_rows:
        rows[0] = region_id, offset, length
        stream.receive(vectors_of(rows[1:]), deadline)
    return TcpOperation(code), rows, num_bytes


def reply(status: Status, reason: str = "") -> bytes:
    """How a request ended, in bytes."""
    text = reason.encode()[:_MAX_REASON_BYTES]
    return _REPLY.pack(status, len(text)) + text


def receive_reply(stream: Stream, deadline: float) -> None:
    """Return if the request is done, else raise the error that the owner's reply stands for."""
    code, length = _REPLY.unpack(stream.receive_bytes(_REPLY.size, deadline))
    if code == Status.DONE:
        return
    if length > _MAX_REASON_BYTES:
        raise WireMismatch(f"malformed reply from {stream.name}")
    reason = stream.receive_bytes(length, deadline).decode(errors="replace")
    raise _error(code, stream.name, reason)


def _error(code: int, peer: str, reason: str) -> MemServeError:
    if code == Status.OUT_OF_BOUNDS:
        return OutOfBounds(f"{peer}: {reason}")
    return TransferFailed(peer, reason)
