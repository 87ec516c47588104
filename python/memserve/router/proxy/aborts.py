"""Aborts by name: those that clients ask for, and those in answers that no client asked for.

    POST /abort_request ── RunningRequests ──> the request's `aborted` names ──> its legs (`Upstream.abort`)
    an answer that ends in an abort ── check_abort ──> passed on, if a name of the request was aborted

Event loop thread only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from memserve.router.cluster.instance import Instance
from memserve.router.errors import UpstreamError, UpstreamRejected, failure
from memserve.router.proxy.names import told_name, told_names
from memserve.router.request import GenerationRequest, JsonObject, decode_json

ABORT = b'"abort"'
"""A part of every answer and every event that reports an abort."""


class RunningRequests:
    """The requests under way, by their tenants' names for them. Two may have one name."""

    def __init__(self) -> None:
        self._by_name: defaultdict[str, list[GenerationRequest]] = defaultdict(list)

    @contextmanager
    def running(self, request: GenerationRequest) -> Iterator[None]:
        """`request` can be aborted inside the block."""
        names = _names(request)
        for name in names:
            self._by_name[name].append(request)
        try:
            yield
        finally:
            for name in names:
                self._by_name[name] = [one for one in self._by_name[name] if one is not request]
                if not self._by_name[name]:
                    del self._by_name[name]

    def abort(
        self, tenant: str | None, names: Sequence[str] | None
    ) -> list[tuple[GenerationRequest, str | None]]:
        """Mark the tenant's requests of these names as aborted; all of its requests for None.

        The marked requests, each with the name of its prompt that was meant; None: the whole request.
        `tenant` None: the requests of all tenants.
        """
        marked: list[tuple[GenerationRequest, str | None]] = []
        for name in list(self._by_name) if names is None else names:
            for request in self._by_name.get(name, ()):
                if tenant is not None and request.tenant != tenant:
                    continue
                parts = told_names(request)
                is_part = names is not None and len(parts) > 1 and name in parts
                request.aborted.update((name,) if is_part else parts)
                marked.append((request, name if is_part else None))
        return marked


def is_aborted(request: GenerationRequest) -> bool:
    """Whether the client has aborted all of the request."""
    return bool(request.aborted) and request.aborted >= told_names(request)


def check_abort(request: GenerationRequest, instance: Instance, answer: bytes) -> None:
    """Check a whole answer, or the payload of an event, of `instance`.

    Raises UpstreamRejected if it reports an abort for a client's error, and UpstreamError for an abort that
    no client asked for.
    """
    if ABORT not in answer:
        return
    for reason in _aborts_in(answer):
        status, said = reason.get("status_code"), str(reason.get("message") or "Aborted")
        if isinstance(status, int) and 400 <= status < 500:
            raise UpstreamRejected(status, failure(status, said).error)
        if not request.aborted:
            status = status if isinstance(status, int) and status >= 500 else 502
            message = f"it aborted the request, and no client asked for that: {said}"
            raise UpstreamError(instance.instance_id, instance.role, status, message)


def _aborts_in(answer: bytes) -> Iterator[JsonObject]:
    """The finish reasons of the parts that were aborted."""
    try:
        parsed: Any = decode_json(answer)
        for item in parsed if isinstance(parsed, list) else [parsed]:
            reasons = [one.get("finish_reason") for one in item.get("choices") or ()]
            reasons.append((item.get("meta_info") or {}).get("finish_reason"))
            for reason in reasons:
                if reason == "abort":
                    yield {}
                elif isinstance(reason, dict) and reason.get("type") == "abort":
                    yield reason
    except (msgspec.DecodeError, UnicodeDecodeError, AttributeError, TypeError):
        return


def _names(request: GenerationRequest) -> set[str]:
    """What an abort may call `request`; in a batch, also the common part of the prompts' names."""
    base = told_name(request, request.rid)
    return told_names(request) | ({base} if base else set())
