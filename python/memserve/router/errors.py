"""The errors of a request, its legs and the router, and the HTTP answers that clients get for them.

A failure is the HTTP form of an error: status, message, whether to try again. Knows no sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import aiohttp
import msgspec

from memserve.core.errors import BadRequest, InstanceLost, MemServeError, Retryable
from memserve.core.ids import Epoch, InstanceId
from memserve.router.request import JsonObject, encode_json

CLIENT_LEFT_STATUS = 499
"""The status in logs of a request whose client left."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout",
    413: "request_too_large",
    429: "rate_limit_error",
    501: "not_implemented_error",
    502: "bad_gateway",
    503: "service_unavailable",
    504: "timeout",
}


class NoRoute(Retryable):
    """No colocated instance and no complete pair can take the request now."""


class UpstreamFault(Retryable):
    """An instance did not complete its leg of a request; another instance may."""

    kind = "fault"

    def __init__(self, instance_id: InstanceId, message: str) -> None:
        super().__init__(message)
        self.instance_id = instance_id
        self.num_attempts = 1
        """Attempts of the request so far, on this instance and others."""
        self.not_resumed_reason: str | None = None
        """Why no other instance continues the stream."""

    def __str__(self) -> str:
        tried = f" (attempt {self.num_attempts}, the last)" if self.num_attempts > 1 else ""
        resumed = (
            f"; the answer is not continued: {self.not_resumed_reason}" if self.not_resumed_reason else ""
        )
        return super().__str__() + tried + resumed


class UpstreamDisconnected(UpstreamFault):
    """The connection to an instance could not be made, or broke before the answer was complete."""

    kind = "lost"

    def __init__(
        self,
        instance_id: InstanceId,
        epoch: Epoch,
        role: str,
        reason: str,
        *,
        was_sent: bool = True,
        sent_s: float = 0.0,
    ) -> None:
        """`was_sent`: the instance had at least a part of the request, which may have ended it.

        `sent_s`: when it was sent, by time.monotonic.
        """
        super().__init__(instance_id, f"{_named(role, instance_id)} was lost: {reason}")
        self.epoch = epoch
        self.role = role
        self.reason = reason
        self.was_sent = was_sent
        self.sent_s = sent_s


class UpstreamError(UpstreamFault):
    """An instance answered with a server error (5xx)."""

    kind = "failed"

    def __init__(self, instance_id: InstanceId, role: str, status: int, message: str) -> None:
        super().__init__(instance_id, f"{_named(role, instance_id)} failed with {status}: {message}")
        self.status = status
        self.said = message
        """The server's message."""


def _named(role: str, instance_id: InstanceId) -> str:
    """An instance for a client, who does not see addresses: a server that registered none has its URL."""
    return f"the {role} server" + ("" if "://" in instance_id else f" {instance_id}")


class PoisonRequest(MemServeError):
    """Instances ended while they worked on the request: no other instance gets it."""

    def __init__(self, role: str, instances: Sequence[InstanceId]) -> None:
        names = ", ".join(_named(role, one) for one in instances)
        lost = f"{len(instances)} {role} servers were lost while they worked on this request ({names})"
        if len(instances) == 1:
            lost = f"{names} crashed as soon as it had this request"
        super().__init__(
            f"{lost}: the request may be the cause and is not tried on another server; "
            "change it before you send it again"
        )


class RequestTimeout(Retryable):
    """A request took longer than its time limit."""


class UpstreamRejected(MemServeError):
    """An instance refused the request (4xx). The message is the instance's."""

    def __init__(self, status: int, error: JsonObject) -> None:
        super().__init__(str(error.get("message", "")))
        self.status = status
        self.error = error


class MalformedResponse(ConnectionError):
    """An instance's answer is not HTTP, or ends too early."""


class TokenizerMismatch(InstanceLost):
    """The instance serves, but not with the tokenizer or page size of the model's other instances."""


class ClientLeft(MemServeError):
    """The client no longer waits for the answer."""


class RequestAborted(MemServeError):
    """The client aborted the request by its name, and no server had it."""

    def __init__(self) -> None:
        super().__init__("the request was aborted through /abort_request")


class Overloaded(Retryable):
    """The request was not admitted: too many requests run, or its tenant's rate is used up."""

    def __init__(self, message: str, status: int, after_s: float) -> None:
        super().__init__(message)
        self.status = status
        self.after_s = after_s
        """Seconds after which another try may succeed."""


class ShuttingDown(Retryable):
    """The router is stopping and ends the requests that still run."""


CHALLENGE = 'Bearer realm="memserve"'
"""Says how to authenticate, with every 401 (RFC 9110, 15.5.2)."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The HTTP form of an error."""

    status: int
    error: JsonObject
    retry_after_s: int | None = None
    """Seconds after which another try may succeed, where that is known."""

    def headers(self) -> dict[str, str]:
        """The response headers."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | {"WWW-Authenticate": CHALLENGE} if self.status == 401 else headers

    def body(self) -> bytes:
        """JSON in the envelope that SGLang and OpenAI share."""
        return encode_json({"error": self.error})

    def event(self) -> bytes:
        """The same as an event of a stream."""
        return b"data: " + self.body() + b"\n\n"


def failure_of(error: MemServeError) -> Failure:
    """The failure that the client of a request with `error` gets."""
    if isinstance(error, ClientLeft | RequestAborted):
        return failure(CLIENT_LEFT_STATUS, str(error))
    if isinstance(error, UpstreamRejected):
        return Failure(error.status, error.error)
    if isinstance(error, BadRequest):
        return failure(error.status, error.message, field=error.field)
    if isinstance(error, UpstreamError):
        return failure(503 if error.status == 503 else 502, str(error), retryable=True)
    if isinstance(error, PoisonRequest):
        return failure(502, str(error), code="request_ended_servers")
    if isinstance(error, RequestTimeout):
        return failure(504, str(error), retryable=True)
    if isinstance(error, Overloaded):
        told = failure(error.status, f"{error}; try again later", retryable=True)
        return replace(told, retry_after_s=max(1, ceil(error.after_s)))
    told = failure(503, str(error), retryable=isinstance(error, Retryable))
    return replace(told, retry_after_s=1) if isinstance(error, Retryable) else told


def failure(
    status: int, message: str, *, field: str | None = None, code: str | None = None, retryable: bool = False
) -> Failure:
    """A failure in OpenAI's terms; `field` is the wrong field of the request."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "internal_error")
    error: JsonObject = {
        "message": message,
        "type": kind,
        "param": field,
        "code": code or status,
        "retryable": retryable,
    }
    return Failure(status, error)


def refusal(status: int, body: bytes) -> UpstreamRejected:
    """The error for an instance's 4xx; `body` has any of SGLang's shapes."""
    return UpstreamRejected(status, _error_object(status, body))


def message_of(status: int, body: bytes) -> str:
    """The message in an instance's error body."""
    return str(_error_object(status, body)["message"])


def _error_object(status: int, body: bytes) -> JsonObject:
    """SGLang writes {"error": {"message"}}, {"error": "…"}, {"object": "error", "message"} or text."""
    try:
        parsed = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        parsed = body.decode(errors="replace").strip()[:1000] or f"status {status}"
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
    own: JsonObject = error if isinstance(error, dict) and "message" in error else {"message": str(error)}
    fallback = failure(status, "", retryable=status == 429).error
    return {**fallback, **{key: own[key] for key in ("message", "type", "param", "code") if key in own}}


def describe(error: BaseException) -> str:
    """`error` in a few words, for a log line or an answer."""
    if isinstance(error, InstanceLost):
        return error.reason
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect ({error.os_error.strerror or error.os_error})"
    if isinstance(error, MalformedResponse):
        return str(error)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError | OSError):
        return "the connection broke"
    return str(error) or type(error).__name__
