"""Has broken streams continued: remembers what may be, and finds the tokens to go on from.

Decides nothing (`resume` does). Event loop thread only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from memserve.core.errors import MemServeError
from memserve.router.cluster.instance import ClusterSnapshot
from memserve.router.errors import UpstreamDisconnected
from memserve.router.observability.metrics import RouterMetrics
from memserve.router.proxy.capacity import largest_capacity
from memserve.router.proxy.proof import LEAST_TOKENS, TIMEOUT_S, num_proven, question
from memserve.router.proxy.recovery_policy import (
    SAMPLES,
    Resumption,
    Tokens,
    closing,
    openai_text,
    resumption,
    why_not,
)
from memserve.router.proxy.relay import ResumableStream, Sink
from memserve.router.proxy.stream_state import StreamState, Unreadable
from memserve.router.request import GenerationRequest
from memserve.router.tokenization.token_records import KnownTokens
from memserve.router.tokenization.tokenizers import Tokenizers

logger = logging.getLogger(__name__)

Ask = Callable[[GenerationRequest], Awaitable[bytes]]
NEVER = "--resume never"


class StreamRecovery:
    """See the module."""

    def __init__(self, tokenizers: Tokenizers, metrics: RouterMetrics, *, is_on: bool) -> None:
        self._tokenizers = tokenizers
        self._metrics = metrics
        self._is_on = is_on

    def outlet(self, call: GenerationRequest, sink: Sink, ready: ClusterSnapshot) -> ResumableStream:
        """Where a stream of `call` goes, remembered if it could be continued; `ready` could serve it."""
        return ResumableStream(sink, StreamState(call) if self._why_not(call, ready) is None else None)

    def rest_of(self, call: GenerationRequest, outlet: ResumableStream) -> bytes | None:
        """What a client that has the whole answer still has to be told; None if it has not."""
        try:
            return None if outlet.transcript is None else closing(call, outlet.transcript.seen())
        except Unreadable:
            return None

    async def resumed(
        self,
        call: GenerationRequest,
        model: str | None,
        outlet: ResumableStream,
        ready: ClusterSnapshot,
        ask: Ask,
    ) -> Resumption | str:
        """How the stream goes on, or why it cannot; counted. `ask` gives the answer of one of `ready`.

        Raises UpstreamDisconnected if that one was lost with the question.
        """
        if outlet.transcript is None:
            reason = self._why_not(call, ready) or "its events are not SGLang's"
        elif (lacks := why_not(call, is_deterministic=_are_deterministic(ready))) is not None:
            reason = lacks
        else:
            try:
                return await self._resumption(call, model, outlet.transcript, ready, ask)
            except Unreadable as error:
                reason = str(error)
        self.count("refused")
        return reason

    def count(self, outcome: str) -> None:
        """A stream that broke has ended so."""
        self._metrics.resumed.labels(outcome).inc()

    def _why_not(self, call: GenerationRequest, ready: ClusterSnapshot) -> str | None:
        if not self._is_on:
            return NEVER
        reason = why_not(call, is_deterministic=False)
        if reason is SAMPLES and ready.all() and _are_deterministic(ready):
            return why_not(call, is_deterministic=True)
        return reason

    async def _resumption(
        self,
        call: GenerationRequest,
        model: str | None,
        transcript: StreamState,
        ready: ClusterSnapshot,
        ask: Ask,
    ) -> Resumption:
        seen = transcript.seen()
        known = await self._tokenizers.tokens_of(call, model)
        if not isinstance(known, KnownTokens) or not known.replaceable or call.num_prompts is not None:
            return resumption(call, seen, Tokens())
        prompt, skips_special = known.prompts[0], _skips_special(call)

        def text_of(ids: Sequence[int]) -> str:
            return self._tokenizers.text_after(model, prompt, ids, skips_special=skips_special)

        proven = await self._proven(call, model, openai_text(call, seen), prompt, ask)
        return resumption(call, seen, Tokens(prompt, text_of, largest_capacity(ready), proven))

    async def _proven(
        self, call: GenerationRequest, model: str | None, text: str | None, prompt: Sequence[int], ask: Ask
    ) -> Sequence[int]:
        """The tokens at the begin of a greedy answer of which only the `text` is known."""
        if text is None or why_not(call, is_deterministic=False) is not None:
            return ()
        ids = await self._tokenizers.ids_of(model, text)
        if len(ids) < LEAST_TOKENS:
            return ()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer = await ask(question(call, prompt, ids))
        except UpstreamDisconnected as lost:
            if lost.was_sent:  # whoever counts what this request does to servers has to know
                raise
            return ()
        except (TimeoutError, MemServeError) as error:
            logger.info("tokens not proven rid=%s reason=%s", call.rid, error)
            return ()
        return ids[: num_proven(ids, answer)]


def _are_deterministic(ready: ClusterSnapshot) -> bool:
    return all(one.server_info.is_deterministic for one in ready.all())


def _skips_special(call: GenerationRequest) -> bool:
    params = call.body.get("sampling_params")
    holder = params if isinstance(params, dict) else call.body
    return holder.get("skip_special_tokens") is not False
