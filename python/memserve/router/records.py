"""Records and traces of requests: http writes them, observability keeps and exports them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from memserve.core.block_keys import BlockKey
from memserve.scheduling.assignment import Assignment
from memserve.scheduling.decision import Decision


class RequestRecord(msgspec.Struct, frozen=True, gc=False):
    """One request, after its end."""

    ended_s: float
    """Seconds since 1970."""
    path: str
    rid: str
    """Its name in the answer: the client's, or the router's, which the servers have too."""
    request_id: str
    """The client's name for it: its x-request-id, or a new one."""
    status: int
    seconds: float
    route: object
    """The instances that served it last, named by its str(); "-" if it was not dispatched."""
    reason: str
    """The error message; "-" if there was none."""
    attempts: int = 0
    first_token_s: float | None = None
    """From its begin to its first token, if known."""
    num_events: int = 0
    """Events of a stream that were sent to the client."""
    prompt_tokens: int | None = None
    """None if it was never dispatched."""
    cached_tokens: int | None = None
    """Prompt tokens that the prefill reported as cached."""
    unknown: str | None = None
    """Why its tokens were not known."""
    decision: Decision | None = None


class HotPrefix(msgspec.Struct, frozen=True):
    """A prefix that recent prompts share: at least `blocks` blocks, and up to half as many more."""

    key: BlockKey
    """The key of its last block."""
    blocks: int
    weight: float
    """Recent prompts that had it; prompts of one half-life ago count half."""
    by_text: bool
    """Its keys are of a text, whose tokens were not known."""
    sample: str | None
    """The beginning of one of its prompts, if samples are kept."""


class SeriesPoint(msgspec.Struct, frozen=True):
    """The rates of about one second; None where no event gives a value."""

    seconds: float
    """Its real length."""
    requests_s: float
    """Requests that ended, per second."""
    faults_s: float
    """Requests answered with a 5xx, per second."""
    first_token_p50_s: float | None
    first_token_p95_s: float | None
    hit_ratio: float | None
    """Cached share of the prompt tokens whose prefill reported it."""


class RequestTrace(Protocol):
    """The trace of one request."""

    def leg(self, instance: str, role: str) -> Mapping[str, str]:
        """A leg begins; returns headers for its server."""

    def left(self, instance: str, *, is_answered: bool) -> None:
        """A leg has ended."""

    def admitted(self) -> None:
        """The request has a slot."""

    def placed(self, placed: Assignment) -> None:
        """Instances are selected."""

    def end(self, ended: RequestRecord) -> None:
        """The request has ended."""


class Traces(Protocol):
    """Begins traces."""

    def begin(self, path: str, headers: Mapping[str, str]) -> RequestTrace | None:
        """The trace of a request that begins now; None if it is not traced."""
