"""Every error that MemServe raises on purpose, ordered by what the caller can do about it.

MemServeError
├── Retryable            the same call may succeed later, or elsewhere
│   ├── OutOfBlocks      a tier is full of blocks that cannot be evicted; nothing has changed
│   ├── PeerDeclined     another instance's pool has no use or no room for the blocks now; nothing has changed
│   ├── TransferTimeout  bytes may still be in flight: the memory is not free yet
│   └── InstanceLost     the other process is gone
├── Rejected             the caller must change the request
│   ├── BadRequest       an HTTP request we refuse (4xx), with the field at fault
│   ├── BlockStateError  blocks that are not the caller's, or not in that state; nothing has changed
│   ├── OutOfBounds      a copy that leaves its region; nothing was moved
│   ├── LayoutMismatch   the peer's blocks are of another model, shape or precision
│   └── WireMismatch     the peer speaks another protocol version, or holds another key
├── TransferFailed       the transport gave up; what has landed is undefined
├── StaleEpoch           the peer restarted: its addresses are void
├── ConfigError          a flag, file or environment the user has to change
└── InvariantViolated    our bug: log the state and end the process
"""

from __future__ import annotations


class MemServeError(Exception):
    """Base of every error raised on purpose by this package."""


class Retryable(MemServeError):
    """The same call may succeed later, or on another instance."""


class OutOfBlocks(Retryable):
    """A tier has too few free and evictable blocks. Nothing was allocated or evicted."""

    def __init__(self, wanted: int, free: int, evictable: int) -> None:
        super().__init__(f"{wanted} blocks wanted, {free} free and {evictable} evictable")
        self.wanted = wanted
        self.free = free
        self.evictable = evictable


class PeerDeclined(Retryable):
    """Another instance's pool declined a request, as it may at any time. Nothing has changed there."""

    def __init__(self, peer: str, reason: str, *, parent_unknown: bool = False) -> None:
        super().__init__(f"{peer}: {reason}")
        self.peer = peer
        self.reason = reason
        self.parent_unknown = parent_unknown
        """The parent of the blocks is not cached there: the pool may accept the whole chain from its root."""


class TransferTimeout(Retryable):
    """A copy did not complete in `timeout_s`; its bytes may still land later.

    The memory it was writing to must be quarantined until the peer is fenced or known dead.
    """

    def __init__(self, peer: str, timeout_s: float) -> None:
        super().__init__(f"no completion from {peer} within {timeout_s:g} s")
        self.peer = peer
        self.timeout_s = timeout_s


class InstanceLost(Retryable):
    """The process at the other end has ended, or never existed."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"{peer}: {reason}")
        self.peer = peer
        self.reason = reason


class Rejected(MemServeError):
    """The caller must change the request; repeating it cannot help."""


class BadRequest(Rejected):
    """An HTTP request that is refused before it is dispatched."""

    def __init__(self, message: str, *, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.status = status


class BlockStateError(Rejected):
    """A block that the caller may not use in this way: freed, cached, foreign, or named twice."""


class OutOfBounds(Rejected):
    """A copy reaches outside a registered region. Raised before a byte moves."""


class LayoutMismatch(Rejected):
    """Blocks of two pools cannot be exchanged; the text names each field that differs."""


class WireMismatch(Rejected):
    """The peer speaks another version of a protocol, or holds another cluster key."""


class TransferFailed(MemServeError):
    """The transport gave up on a copy; which of its bytes landed is undefined."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"{peer}: {reason}")
        self.peer = peer
        self.reason = reason


class StaleEpoch(MemServeError):
    """The peer is another process than before: the addresses of the earlier process are void."""

    def __init__(self, peer: str, expected: int, actual: int | None) -> None:
        now = "gone" if actual is None else f"epoch {actual:016x}"
        super().__init__(f"{peer}: epoch {expected:016x} expected, the process there is now {now}")
        self.peer = peer
        self.expected = expected
        self.actual = actual


class ConfigError(MemServeError):
    """The user has to change a setting. The text is one line and names the setting."""


class InvariantViolated(MemServeError):
    """A state that must not occur: a bug in MemServe."""
