"""Remembers what clients receive of streams, and has broken streams continued. Event loop thread only.

instance ── relay ──> ResumableStream ──> the client: whole events only, so that a stream can end, or be
                        └─> StreamState       continued, wherever an instance leaves off

Decides nothing (`recovery_policy` does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from memserve.router.cluster.instance import ClusterSnapshot, Instance
from memserve.router.proxy.aborts import ABORT, check_abort
from memserve.router.proxy.capacity import largest_capacity
from memserve.router.proxy.names import has_several_ids, with_one_id, with_told_names
from memserve.router.proxy.recovery_policy import (
    SAMPLES,
    PromptTokens,
    Resumption,
    closing_events,
    not_resumable,
    plan_resumption,
)
from memserve.router.proxy.relay import Sink, Write
from memserve.router.proxy.stream_splicer import (
    Received,
    StreamSplicer,
    Unreadable,
    note_native,
    note_openai,
)
from memserve.router.request import Api, GenerationRequest, decode_json
from memserve.router.sse import EventSplitter, data_of
from memserve.router.tokenization.token_records import KnownTokens
from memserve.router.tokenization.tokenizers import Tokenizers

NEVER = "--resume never"
MAX_EVENT_BYTES = 1 << 20
"""A stream with a longer event is passed on as it comes, and not remembered."""
FOLD_BYTES = 128 << 10
"""Unread chunks of a stream, in bytes, at which they are read."""
MAX_BYTES = 4 << 20
"""A stream with a longer answer, in bytes, is forgotten."""

_LAST_CHUNKS = 3
"""Chunks kept of a stream whose events are whole: its last event, a comment and the end."""
_DONE = b"[DONE]"


class StreamState:
    """The part of a stream that a client has received. Chunks are read when there are many, or it breaks."""

    def __init__(self, request: GenerationRequest) -> None:
        self._is_native = request.api is Api.GENERATE
        self._is_single = request.num_prompts is None and request.num_samples == 1
        self._chunks: list[bytes] = []
        self._size = 0
        self._received = Received()
        self._unreadable: str | None = None

    def note(self, chunk: bytes) -> None:
        """The client gets `chunk`, which ends where an event ends."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size > FOLD_BYTES:
            if self._is_single and self._received.is_incremental is False:
                del self._chunks[:-_LAST_CHUNKS]
                self._size = 0
            else:
                self._fold()
        elif self._is_native and self._received.is_incremental is None and len(self._chunks) >= _LAST_CHUNKS:
            self._fold()  # two events tell whether they are whole or incremental

    def received(self) -> Received:
        """All of it. Raises Unreadable."""
        self._fold()
        if self._unreadable is not None:
            raise Unreadable(self._unreadable)
        return self._received

    def _fold(self) -> None:
        chunks, self._chunks, self._size = self._chunks, [], 0
        if self._unreadable is not None:
            return
        try:
            self._read(b"".join(chunks))
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, IndexError):
            self._unreadable = "its events are not SGLang's"
        except Unreadable as error:
            self._unreadable = str(error)
        if self._unreadable is not None:
            self._received = Received()

    def _read(self, events: bytes) -> None:
        received = self._received
        note = note_native if self._is_native else note_openai
        for event in events.split(b"\n\n"):
            data = data_of(event)
            if data == _DONE:
                received.is_done = True
            elif data.startswith(b"{"):
                note(received, decode_json(data))
        size = sum(len(part) for choice in received.choices.values() for part in choice.parts.values())
        if size > MAX_BYTES:
            raise Unreadable("it was longer than is remembered")


class ResumableStream:
    """The client's end of one stream, which several servers may feed in turn."""

    def __init__(self, sink: Sink, state: StreamState | None) -> None:
        """`state` is told of what the client gets."""
        self._sink = sink
        self._state = state
        self._rest = b""
        self._check: Callable[[bytes], None] = lambda _: None

    @property
    def state(self) -> StreamState | None:
        """None if the stream is not remembered; its events may show that it cannot be."""
        return self._state

    async def write(self, chunk: bytes) -> None:
        """Send the events that `chunk` completes. Raises ClientLeft, and as `check_abort`."""
        if self._rest or not chunk.endswith(b"\n\n"):
            chunk = self._cut(chunk)
        if ABORT in chunk:
            await self._write_until_abort(chunk)
        else:
            await self._send(chunk)

    async def _write_until_abort(self, chunk: bytes) -> None:
        splitter = EventSplitter()
        for event in splitter.feed(chunk):
            self._check(data_of(event))
            await self._send(event)
        await self._send(splitter.rest())

    async def _send(self, chunk: bytes) -> None:
        if chunk:
            if self._state is not None:
                self._state.note(chunk)
            await self._sink.write(chunk)

    async def end(self) -> None:
        """Send an incomplete last event: the stream is over. Raises ClientLeft."""
        rest, self._rest = self._rest, b""
        if rest:
            await self._sink.write(rest)

    def writer(self, request: GenerationRequest, instance: Instance, splicer: StreamSplicer | None) -> Write:
        """Where the next attempt, `request` on `instance`, writes to.

        An incomplete event of the last attempt is dropped. The writer raises as `write` and `check_abort`.
        """
        self._rest = b""
        self._check = partial(check_abort, request, instance)
        write_events = partial(self._write_with_one_id, request) if has_several_ids(request) else self.write
        if not request.mark:
            return write_events
        splitter = EventSplitter()

        async def write(chunk: bytes) -> None:
            for event in splitter.feed(chunk):
                self._check(data_of(event))
                own = with_told_names(request.mark, event)
                if splicer is not None:
                    own = splicer.rewrite(own)
                if own:
                    await write_events(own)

        return write

    async def _write_with_one_id(self, request: GenerationRequest, events: bytes) -> None:
        await self.write(with_one_id(request, events))

    def _cut(self, chunk: bytes) -> bytes:
        """The whole events; the rest is kept."""
        chunk = self._rest + chunk
        # Events that end in another way, or never: pass on the bytes as they come.
        if b"\r\n\r\n" in chunk or len(chunk) > MAX_EVENT_BYTES:
            self._state, self._rest = None, b""
            return chunk
        end = chunk.rfind(b"\n\n") + 2
        if end == 1:
            self._rest = chunk
            return b""
        self._rest = chunk[end:]
        return chunk[:end]


class StreamRecovery:
    """Opens streams, and plans how broken streams continue."""

    def __init__(self, tokenizers: Tokenizers, *, is_on: bool) -> None:
        self._tokenizers = tokenizers
        self._is_on = is_on

    def open(self, request: GenerationRequest, sink: Sink, ready: ClusterSnapshot) -> ResumableStream:
        """A stream of `request` to `sink`, remembered if it could be continued; `ready` can serve it."""
        return ResumableStream(
            sink, StreamState(request) if self._not_resumable(request, ready) is None else None
        )

    def closing_events(self, request: GenerationRequest, stream: ResumableStream) -> bytes | None:
        """The events that a client lacks which has the whole answer; None if it has not."""
        try:
            return None if stream.state is None else closing_events(request, stream.state.received())
        except Unreadable:
            return None

    async def resume(
        self, request: GenerationRequest, model: str | None, stream: ResumableStream, ready: ClusterSnapshot
    ) -> Resumption | str:
        """The plan for continuing the stream, or why it cannot be continued."""
        if stream.state is None:
            return self._not_resumable(request, ready) or "its events are not SGLang's"
        reason = not_resumable(request, is_deterministic=_are_deterministic(ready))
        if reason is not None:
            return reason
        try:
            received = stream.state.received()
            return plan_resumption(request, received, await self._prompt_tokens(request, model, ready))
        except Unreadable as error:
            return str(error)

    def _not_resumable(self, request: GenerationRequest, ready: ClusterSnapshot) -> str | None:
        if not self._is_on:
            return NEVER
        reason = not_resumable(request, is_deterministic=False)
        if reason is SAMPLES and ready.all() and _are_deterministic(ready):
            return not_resumable(request, is_deterministic=True)
        return reason

    async def _prompt_tokens(
        self, request: GenerationRequest, model: str | None, ready: ClusterSnapshot
    ) -> PromptTokens:
        if request.api is not Api.GENERATE or request.num_prompts is not None:
            return PromptTokens()
        known = await self._tokenizers.tokens_of(request, model)
        if not isinstance(known, KnownTokens) or not known.replaceable:
            return PromptTokens()
        params = request.body.get("sampling_params")
        skips_special = not isinstance(params, dict) or params.get("skip_special_tokens") is not False
        prompt = known.prompts[0]

        def detokenize(ids: Sequence[int]) -> str:
            return self._tokenizers.text_after(model, prompt, ids, skips_special=skips_special)

        return PromptTokens(prompt, detokenize, largest_capacity(ready))


def _are_deterministic(ready: ClusterSnapshot) -> bool:
    return all(one.server_info.is_deterministic for one in ready.all())
