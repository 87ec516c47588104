"""What a client has seen of a stream: enough for another server to go on with it. Knows no servers.

Chunks are only kept while a stream runs well; they are read when there are many of them, and when
somebody asks. An event is a JSON object with fields that grow from event to event:

    /generate   text, output_ids              whole each time, or with --incremental-streaming-output
                                              what is new; completion_tokens tells which of the two
    OpenAI's    text, delta.content, …        what is new
Source: SGLang 0.5.23, tokenizer_manager.py (_handle_batch_output), openai/serving_{chat,completions}.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec

from memserve.router.request import Api, GenerationRequest, JsonObject
from memserve.router.sse import data_of

FOLD_BYTES = 128 << 10
"""So many bytes of chunks are kept before they are read."""
MAX_BYTES = 4 << 20
"""What a stream may have said and still be remembered."""

_LAST_CHUNKS = 3
"""Of a stream whose every event is whole: its last one, a comment and the end."""
_DONE = b"[DONE]"

TEXT, IDS = ("text",), ("output_ids",)
Path: TypeAlias = tuple[str | int, ...]
"""Where in an event a field that grows stands."""
Parts: TypeAlias = dict[Path, Any]
"""What has come of each, joined: text, or a list."""

decode_json = msgspec.json.Decoder().decode


class Unreadable(Exception):
    """The stream is none that could be told from what was kept."""


@dataclass(slots=True)
class Choice:
    """One answer of a stream, as far as it has come."""

    parts: Parts = field(default_factory=dict)
    is_finished: bool = False
    has_role: bool = False
    meta: JsonObject = field(default_factory=dict)
    """`meta_info` of its newest event, from /generate."""

    @property
    def ids(self) -> list[int]:
        """The ids of the tokens that were generated, where the stream tells them."""
        ids: list[int] = self.parts.get(IDS, [])
        return ids


@dataclass(slots=True)
class Received:
    """A stream, as far as a client has got it."""

    choices: dict[int, Choice] = field(default_factory=dict)
    head: JsonObject = field(default_factory=dict)
    """What names the answer in every event of OpenAI's: id, created."""
    is_incremental: bool | None = None
    """Whether /generate tells only what is new in each event; None: not known yet."""
    has_usage: bool = False
    """What it used was told in an event of its own, after the answers."""
    is_done: bool = False


class StreamState:
    """Of one stream. `note` is all it costs while nothing goes wrong."""

    def __init__(self, call: GenerationRequest) -> None:
        self._is_native = call.api is Api.GENERATE
        self._is_single = call.num_prompts is None and call.num_samples == 1
        self._chunks: list[bytes] = []
        self._size = 0
        self._seen = Received()
        self._lost: str | None = None

    def note(self, chunk: bytes) -> None:
        """The client gets `chunk`, which ends where an event ends."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size > FOLD_BYTES:
            if self._is_single and self._seen.is_incremental is False:
                del self._chunks[:-_LAST_CHUNKS]
                self._size = 0
            else:
                self._fold()
        elif self._is_native and self._seen.is_incremental is None and len(self._chunks) >= _LAST_CHUNKS:
            self._fold()  # which of the two it is can be told from two events

    def seen(self) -> Received:
        """All of it. Raises Unreadable."""
        self._fold()
        if self._lost is not None:
            raise Unreadable(self._lost)
        return self._seen

    def _fold(self) -> None:
        chunks, self._chunks, self._size = self._chunks, [], 0
        if self._lost is not None:
            return
        try:
            self._read(b"".join(chunks))
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, IndexError):
            self._lost = "its events are not SGLang's"
        except Unreadable as error:
            self._lost = str(error)
        if self._lost is not None:
            self._seen = Received()

    def _read(self, events: bytes) -> None:
        seen = self._seen
        for event in events.split(b"\n\n"):
            data = data_of(event)
            if data == _DONE:
                seen.is_done = True
            elif data.startswith(b"{"):
                note = note_native if self._is_native else _note_openai
                note(seen, decode_json(data))
        size = sum(len(part) for choice in seen.choices.values() for part in choice.parts.values())
        if size > MAX_BYTES:
            raise Unreadable("it was longer than is remembered")


def note_native(seen: Received, event: JsonObject) -> None:
    """Add an event of /generate to what was seen. Raises Unreadable, and what odd JSON raises."""
    index: Any = event.get("index", 0)
    choice = seen.choices.setdefault(index, Choice())
    meta, ids = event["meta_info"], event.get("output_ids")
    if not isinstance(ids, list) or not isinstance(meta, dict):
        raise Unreadable("its events tell no token ids")
    count, known = meta["completion_tokens"], len(choice.ids)
    if len(ids) == count:
        if count > known > 0:
            seen.is_incremental = False
        choice.parts = {TEXT: event.get("text") or "", IDS: ids}
    elif known + len(ids) == count:
        seen.is_incremental = True
        choice.parts[TEXT] = choice.parts.get(TEXT, "") + (event.get("text") or "")
        choice.parts.setdefault(IDS, []).extend(ids)
    else:
        raise Unreadable("its events do not tell every token id")
    choice.meta = meta
    choice.is_finished = meta.get("finish_reason") is not None


def _note_openai(seen: Received, event: JsonObject) -> None:
    if not seen.head:
        seen.head = {name: event[name] for name in ("id", "created") if name in event}
    if not event.get("choices") and event.get("usage"):
        seen.has_usage = True
    for said in event.get("choices") or ():  # type: ignore[attr-defined]
        choice = seen.choices.setdefault(said["index"], Choice())
        for holder, name, path in growing(said):
            choice.parts[path] = choice.parts[path] + holder[name] if path in choice.parts else holder[name]
        choice.has_role = choice.has_role or bool((said.get("delta") or {}).get("role"))
        choice.is_finished = choice.is_finished or said.get("finish_reason") is not None


def growing(said: JsonObject) -> Iterator[tuple[JsonObject, str, Path]]:
    """The fields of one choice in an event of OpenAI's that add to those before: where, and their path."""
    for name in ("text", "token_ids"):
        if said.get(name):
            yield said, name, (name,)
    logprobs = said.get("logprobs")
    if isinstance(logprobs, dict):
        for name, value in logprobs.items():
            if isinstance(value, list) and value:
                yield logprobs, name, ("logprobs", name)
    delta = said.get("delta")
    if not isinstance(delta, dict):
        return
    for name in ("content", "reasoning_content"):
        if delta.get(name):
            yield delta, name, (name,)
    for number, tool in enumerate(delta.get("tool_calls") or ()):
        function = tool.get("function") or {}
        for name in ("name", "arguments"):
            if function.get(name):
                yield function, name, ("tool_calls", tool.get("index", number), name)
