"""Has broken streams continued: remembers what may be, and finds the tokens to go on from.

Decides nothing (`resume` does), sends nothing. Event loop thread only.
"""

from __future__ import annotations

from collections.abc import Sequence

from memserve.router.cluster.instance import Snapshot
from memserve.router.observe.metrics import RouterMetrics
from memserve.router.serving.api import Call
from memserve.router.serving.fitting import largest_room
from memserve.router.serving.relay import Outlet, Sink
from memserve.router.serving.resume import SAMPLES, Resumption, closing, resumption, why_not
from memserve.router.serving.transcript import Transcript, Unreadable
from memserve.router.text.token_records import KnownTokens
from memserve.router.text.tokenizers import Tokenizers

NEVER = "--resume never"


class Resumer:
    """See the module."""

    def __init__(self, tokenizers: Tokenizers, metrics: RouterMetrics, *, is_on: bool) -> None:
        self._tokenizers = tokenizers
        self._metrics = metrics
        self._is_on = is_on

    def outlet(self, call: Call, sink: Sink, ready: Snapshot) -> Outlet:
        """Where a stream of `call` goes, remembered if it could be continued; `ready` could serve it."""
        return Outlet(sink, Transcript(call) if self._why_not(call, ready) is None else None)

    def rest_of(self, call: Call, outlet: Outlet) -> bytes | None:
        """What a client that has the whole answer still has to be told; None if it has not."""
        try:
            return None if outlet.transcript is None else closing(call, outlet.transcript.seen())
        except Unreadable:
            return None

    async def resumed(
        self, call: Call, model: str | None, outlet: Outlet, ready: Snapshot
    ) -> Resumption | str:
        """How the stream goes on, or why it cannot. Counted."""
        reason = self._why_not(call, ready)
        if reason is None and outlet.transcript is None:
            reason = "its events are not SGLang's"
        if reason is None and outlet.transcript is not None:
            try:
                return await self._resumption(call, model, outlet.transcript, ready)
            except Unreadable as error:
                reason = str(error)
        self.count("refused")
        return str(reason)

    def count(self, outcome: str) -> None:
        """A stream that broke has ended so."""
        self._metrics.resumed.labels(outcome).inc()

    def _why_not(self, call: Call, ready: Snapshot) -> str | None:
        if not self._is_on:
            return NEVER
        reason = why_not(call, is_deterministic=False)
        if reason is SAMPLES and all(one.facts.is_deterministic for one in ready.all()):
            return why_not(call, is_deterministic=True)
        return reason

    async def _resumption(
        self, call: Call, model: str | None, transcript: Transcript, ready: Snapshot
    ) -> Resumption:
        tokens = await self._tokenizers.tokens_of(call, model)
        prompt: Sequence[int] | None = None
        if isinstance(tokens, KnownTokens) and tokens.replaceable and call.num_prompts is None:
            prompt = tokens.prompts[0]
        skips_special = _skips_special(call)

        def text_of(ids: Sequence[int]) -> str:
            return self._tokenizers.text_after(model, prompt or (), ids, skips_special=skips_special)

        return resumption(call, transcript.seen(), prompt, text_of, largest_room(ready))


def _skips_special(call: Call) -> bool:
    params = call.body.get("sampling_params")
    holder = params if isinstance(params, dict) else call.body
    return holder.get("skip_special_tokens") is not False
