"""Joins two servers' streams of one answer: what the client has received, and the events that still follow.

    client has   The quick brown              received
    next server  └ accepted ┘ brown fox jumps from the prompt and the accepted tokens, or from the prompt
    client gets               fox jumps       after the repeated part was compared

An event is a JSON object with fields that grow from event to event:

    /generate   text, output_ids              whole in every event, or with --incremental-streaming-output
                                              only the new part; completion_tokens tells the two apart
    OpenAI's    text, delta.content, …        only the new part
Pure.
Source: SGLang 0.5.23, tokenizer_manager.py (_handle_batch_output), openai/serving_{chat,completions}.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from memserve.core.errors import Retryable
from memserve.router.request import JsonObject, decode_json, encode_json
from memserve.router.sse import data_of, with_data

TEXT, IDS = ("text",), ("output_ids",)
Path: TypeAlias = tuple[str | int, ...]
"""Where in an event a growing field stands."""
Parts: TypeAlias = dict[Path, Any]
"""The received value of each growing field, joined: text, or a list."""


class Unreadable(Exception):
    """The received events do not tell the answer so far."""


class Diverged(Retryable):
    """The server that continues an answer does not repeat its beginning."""

    def __init__(self) -> None:
        super().__init__("the answer could not be continued: another server answers differently")


@dataclass(slots=True)
class Choice:
    """One answer of a stream, as far as it was received."""

    parts: Parts = field(default_factory=dict)
    is_finished: bool = False
    has_role: bool = False
    meta: JsonObject = field(default_factory=dict)
    """`meta_info` of the newest event of /generate."""

    @property
    def ids(self) -> list[int]:
        """The ids of the generated tokens, where the stream tells them."""
        ids: list[int] = self.parts.get(IDS, [])
        return ids


@dataclass(slots=True)
class Received:
    """A stream, as far as a client has received it."""

    choices: dict[int, Choice] = field(default_factory=dict)
    head: JsonObject = field(default_factory=dict)
    """The fields that identify an OpenAI answer in each of its events: id, created."""
    is_incremental: bool | None = None
    """Whether events of /generate hold only the new part; None: not known yet."""
    has_usage: bool = False
    """The usage was received, in an event of its own after the answers."""
    is_done: bool = False


@dataclass(frozen=True, slots=True)
class AcceptedPrefix:
    """The beginning of the answer that became a part of the prompt."""

    ids: tuple[int, ...] = ()
    text: str = ""


def note_native(received: Received, event: JsonObject) -> None:
    """Add an event of /generate. Raises Unreadable, and what odd JSON raises."""
    index: Any = event.get("index", 0)
    choice = received.choices.setdefault(index, Choice())
    meta, ids = event["meta_info"], event.get("output_ids")
    if not isinstance(ids, list) or not isinstance(meta, dict):
        raise Unreadable("its events tell no token ids")
    count, known = meta["completion_tokens"], len(choice.ids)
    if len(ids) == count:
        if count > known > 0:
            received.is_incremental = False
        choice.parts = {TEXT: event.get("text") or "", IDS: ids}
    elif known + len(ids) == count:
        received.is_incremental = True
        choice.parts[TEXT] = choice.parts.get(TEXT, "") + (event.get("text") or "")
        choice.parts.setdefault(IDS, []).extend(ids)
    else:
        raise Unreadable("its events do not tell every token id")
    choice.meta = meta
    choice.is_finished = meta.get("finish_reason") is not None


def note_openai(received: Received, event: JsonObject) -> None:
    """Add an event of OpenAI's endpoints. Raises what odd JSON raises."""
    if not received.head:
        received.head = {name: event[name] for name in ("id", "created") if name in event}
    if not event.get("choices") and event.get("usage"):
        received.has_usage = True
    for said in event.get("choices") or ():  # type: ignore[attr-defined]
        choice = received.choices.setdefault(said["index"], Choice())
        for holder, name, path in _growing(said):
            choice.parts[path] = choice.parts[path] + holder[name] if path in choice.parts else holder[name]
        choice.has_role = choice.has_role or bool((said.get("delta") or {}).get("role"))
        choice.is_finished = choice.is_finished or said.get("finish_reason") is not None


def _growing(said: JsonObject) -> Iterator[tuple[JsonObject, str, Path]]:
    """The growing fields of one choice in an OpenAI event: holder, name, path."""
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


class StreamSplicer(Protocol):
    """Rewrites the next server's stream, event by event."""

    def rewrite(self, event: bytes) -> bytes:
        """The event for the client; b"" if it has all of it. Raises Diverged."""


class NativeSplicer:
    """Splices streams of /generate."""

    def __init__(self, received: Received, accepted: AcceptedPrefix) -> None:
        """`received` becomes this object's."""
        self._received = received
        self._accepted = accepted
        self._new = Received()

    def rewrite(self, event: bytes) -> bytes:
        return _rewritten(event, self._splice)

    def _splice(self, item: JsonObject) -> bool:
        """Make `item` follow the received events; False if it adds nothing."""
        index: Any = item.get("index", 0)
        sent = self._received.choices.setdefault(index, Choice())
        if sent.is_finished:
            return False
        note_native(self._new, item)
        now = self._new.choices[index]
        ids, text = [*self._accepted.ids, *now.ids], self._accepted.text + now.parts[TEXT]
        if ids[: len(sent.ids)] != sent.ids[: len(ids)]:
            raise Diverged
        if now.is_finished and len(ids) < len(sent.ids):
            raise Diverged
        if len(ids) <= len(sent.ids) and not now.is_finished:
            return False
        told: str = sent.parts.get(TEXT, "")
        if not now.is_finished and not text.startswith(told):
            raise Diverged
        item["meta_info"] = self._meta(now.meta, sent.meta)
        if self._received.is_incremental:
            item["text"], item["output_ids"] = text[len(told) :], ids[len(sent.ids) :]
            sent.parts = {TEXT: text, IDS: ids}
        else:
            item["text"], item["output_ids"] = text, ids
        return True

    def _meta(self, meta: JsonObject, first: JsonObject) -> JsonObject:
        """`meta_info` as an undisturbed server gives it; `first` is the first server's."""
        names = ("cached_tokens", "cached_tokens_details")
        told: JsonObject = {name: first[name] for name in names if name in first}
        num_accepted = len(self._accepted.ids)
        if num_accepted:
            told["prompt_tokens"] = _plus(meta.get("prompt_tokens"), -num_accepted)
            told["completion_tokens"] = _plus(meta.get("completion_tokens"), num_accepted)
            reason = meta.get("finish_reason")
            if isinstance(reason, dict) and reason.get("type") == "length":
                told["finish_reason"] = {**reason, "length": _plus(reason.get("length"), num_accepted)}
        return {**meta, **told}


class OpenAiSplicer:
    """Splices streams of OpenAI's endpoints, which the next server begins from the prompt."""

    def __init__(self, received: Received, stops: Sequence[str]) -> None:
        """`received` becomes this object's; `stops` are the request's stop strings."""
        self._received = received
        self._stops = stops
        self._repeated: dict[int, Parts] = {}
        self._caught_up: set[int] = set()
        """The choices that were repeated as far as the client has them."""

    def rewrite(self, event: bytes) -> bytes:
        return _rewritten(event, self._splice)

    def _splice(self, item: JsonObject) -> bool:
        choices: Any = item.get("choices") or []
        if not choices and item.get("usage") and self._received.has_usage:
            return False
        new = [said for said in choices if self._is_new(said)]
        if choices and not new:
            return False
        item.update(self._received.head)
        item["choices"] = new
        return True

    def _is_new(self, said: JsonObject) -> bool:
        """Take the received part out of `said`; False if nothing is left."""
        index: Any = said["index"]
        sent = self._received.choices.setdefault(index, Choice())
        if sent.is_finished:
            return False
        if index in self._caught_up:
            return True
        repeated = self._repeated.setdefault(index, {})
        was_behind = bool(_missing(sent.parts, repeated))
        for holder, name, path in _growing(said):
            new, repeated[path] = _new_part(path, holder[name], sent.parts.get(path), repeated.get(path))
            holder[name] = new
        missing = _missing(sent.parts, repeated)
        if said.get("finish_reason") is not None:
            # A beginning stop string may have been received, and is cut off at the end.
            if any(not isinstance(one, str) or not self._begins_a_stop(one) for one in missing):
                raise Diverged
            return True
        if not missing:
            self._caught_up.add(index)
        delta = said.get("delta")
        if isinstance(delta, dict):
            _drop_received_names(delta)
            if sent.has_role and delta.get("role"):
                delta["role"], was_behind = None, True
        return not was_behind or any(True for _ in _growing(said))

    def _begins_a_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


def _rewritten(event: bytes, splice: Callable[[JsonObject], bool]) -> bytes:
    """`event` with its item as `splice` changed it; b"" if it adds nothing. Raises Diverged."""
    data = data_of(event)
    if not data.startswith(b"{"):
        return event
    item = decode_json(data)
    if "error" in item:
        return event
    try:
        is_new = splice(item)
    except (Unreadable, KeyError, TypeError, AttributeError) as error:
        raise Diverged from error
    return with_data(event, encode_json(item)) if is_new else b""


def _new_part(path: Path, value: Any, sent: Any, repeated: Any) -> tuple[Any, Any]:
    """The part of `value` that comes after `sent`, and all that was repeated. Raises Diverged."""
    start = 0 if repeated is None else len(repeated)
    total = value if repeated is None else repeated + value
    if sent is None or start >= len(sent):
        return value, total
    same = sent[start : start + len(value)]
    if path[0] != "logprobs" and value[: len(same)] != same:
        raise Diverged
    return value[len(same) :], total


def _missing(sent: Parts, repeated: Parts) -> list[Any]:
    """The rest of each received part that was not repeated yet."""
    rests = (part[len(repeated.get(path, ())) :] for path, part in sent.items() if path[0] != "logprobs")
    return [rest for rest in rests if rest]


def _drop_received_names(delta: JsonObject) -> None:
    """A client that has a tool call's name has its id too."""
    for tool in delta.get("tool_calls") or ():  # type: ignore[attr-defined]
        function = tool.get("function")
        if isinstance(function, dict) and function.get("name") == "":
            function["name"] = tool["id"] = None


def _plus(value: object, more: int) -> object:
    return value + more if isinstance(value, int) else value
