"""Runs one request on a prefill and a decode server: both legs complete, or none.

    client ──> router ──body──> prefill ──KV──> decode ──> router ──> client
                     └──body────────────────────>┘
The same body goes to both at once. Decode's answer is the answer. If a leg fails, or the client leaves,
the other leg is closed and aborted at once: SGLang would let it wait.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec

from memserve.router.cluster.instance import Instance, Pair
from memserve.router.errors import UpstreamDisconnected, UpstreamError
from memserve.router.proxy.merge import LogprobMerger, cache_report, leg_bodies, merge_answers
from memserve.router.proxy.relay import Write, relay
from memserve.router.proxy.upstream import Upstream
from memserve.router.request import GenerationRequest, decode_json, encode_json
from memserve.router.sse import data_of, events_of

T = TypeVar("T")
OnPrefilled = Callable[[Any], None]
"""Receives prefill's parsed answer as soon as it has come."""

# Raised by reading an answer of an unexpected shape.
_PARSE_ERRORS = (msgspec.DecodeError, ValueError, LookupError, TypeError, AttributeError)


class PairRunner:
    """Runs requests on pairs. Event loop thread only."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def answer(self, request: GenerationRequest, pair: Pair, on_prefilled: OnPrefilled) -> bytes:
        """The whole answer. Raises what `Upstream.leg` raises, for either leg."""
        for_prefill, for_decode = leg_bodies(request, pair, _draw_room)
        async with self._prefilling(request, pair.prefill, for_prefill, on_prefilled) as prefill:
            answer = await unless_fails(prefill, self._upstream.fetch(pair.decode, request, for_decode))
            try:
                return merge_answers(request, await prefill, answer)
            except _PARSE_ERRORS as error:
                raise malformed(pair.decode, error) from error

    async def stream(
        self, request: GenerationRequest, pair: Pair, on_prefilled: OnPrefilled, write: Write
    ) -> None:
        """Write decode's events as they come: unchanged bytes, unless prefill's results are added.

        Raises as `Upstream.leg`; before the first `write` if the request was refused or not begun.
        """
        for_prefill, for_decode = leg_bodies(request, pair, _draw_room)
        async with self._prefilling(request, pair.prefill, for_prefill, on_prefilled) as prefill:
            await unless_fails(prefill, self._relay(request, pair.decode, for_decode, prefill, write))
            await asyncio.wait((prefill,), timeout=1.0)  # Decode has ended: its answer is due.

    @asynccontextmanager
    async def _prefilling(
        self, request: GenerationRequest, instance: Instance, body: bytes, on_prefilled: OnPrefilled
    ) -> AsyncIterator[asyncio.Task[Any]]:
        """A task with prefill's parsed answer; the leg is aborted if the block is left before."""

        async def prefill() -> Any:
            answer = parsed(instance, await self._upstream.fetch(instance, request, body))
            on_prefilled(answer)
            return answer

        task = asyncio.create_task(prefill())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait((task,))
            if not task.cancelled():
                task.exception()  # retrieve it: it was raised above, or does not matter

    async def _relay(
        self,
        request: GenerationRequest,
        decode: Instance,
        body: bytes,
        prefill: asyncio.Task[Any],
        write: Write,
    ) -> None:
        async with self._upstream.leg(decode, request, body) as leg:
            if request.wants_input_logprobs or request.wants_report:
                write = _Rewriter(request, prefill, write).write
            await relay(leg, write)


class _Rewriter:
    """Adds prefill's results to a stream."""

    def __init__(self, request: GenerationRequest, prefill: asyncio.Task[Any], write: Write) -> None:
        self._call = request
        self._prefill = prefill
        self._write = write
        self._merger: LogprobMerger | None = None

    async def write(self, chunk: bytes) -> None:
        for event in events_of(chunk):
            await self._write(await self._rewritten(event))

    async def _rewritten(self, event: bytes) -> bytes:
        if data_of(event) == b"[DONE]":
            return await self._report() + event
        if not self._call.wants_input_logprobs:
            return event
        if self._merger is None:
            self._merger = LogprobMerger(self._call, await asyncio.shield(self._prefill))
        return self._merger.rewrite(event)

    async def _report(self) -> bytes:
        """The report as a comment, which other clients ignore."""
        if not self._call.wants_report:
            return b""
        report = cache_report(self._call, await asyncio.shield(self._prefill))
        return b": memserve " + encode_json(report) + b"\n\n"


async def unless_fails(prefill: asyncio.Task[Any], decode: Coroutine[Any, Any, T]) -> T:
    """The result of `decode`. If `prefill` fails first, raises its error and cancels `decode`.

    If both have failed and one connection was lost, raises that loss: it is why the other leg failed.
    """
    task = asyncio.create_task(decode)
    try:
        await asyncio.wait((task, prefill), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            prefill.result()
        return await task
    except UpstreamError:
        for leg in (task, prefill):
            if (
                leg.done()
                and not leg.cancelled()
                and isinstance(lost := leg.exception(), UpstreamDisconnected)
            ):
                raise lost from None
        raise
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
        if not task.cancelled():
            task.exception()  # retrieve it: it was raised above, or does not matter


def parsed(instance: Instance, answer: bytes) -> Any:
    """An instance's answer as JSON values. Raises UpstreamError if it is not JSON."""
    try:
        return decode_json(answer)
    except _PARSE_ERRORS as error:
        raise malformed(instance, error) from error


def malformed(instance: Instance, error: Exception) -> UpstreamError:
    """The error of an instance whose 200 holds no answer."""
    message = f"its answer has an unexpected shape: {error!r}"
    return UpstreamError(instance.instance_id, instance.role, 502, message)


def _draw_room() -> int:
    """A new rendezvous number; SGLang's are signed 64-bit numbers."""
    return secrets.randbits(63)
