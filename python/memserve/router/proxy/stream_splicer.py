"""The events of a server that goes on with an answer, made to follow those that the client has. Pure.

    client has   The quick brown            sent
    continuing   └ kept ┘ brown fox jumps   from the prompt and `kept`, or from the prompt alone
    client gets               fox jumps     after what repeats was found to be the same

Source of the shapes: SGLang 0.5.23, tokenizer_manager.py and openai/serving_{chat,completions}.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from memserve.core.errors import Retryable
from memserve.router.proxy.stream_state import (
    IDS,
    TEXT,
    Choice,
    Parts,
    Path,
    Received,
    Unreadable,
    growing,
    note_native,
)
from memserve.router.request import JsonObject, encode_json
from memserve.router.sse import data_of, with_data

decode_json = msgspec.json.Decoder().decode


class Diverged(Retryable):
    """The server that went on with an answer began it otherwise."""

    def __init__(self) -> None:
        super().__init__("the answer could not be continued: another server answers differently")


@dataclass(frozen=True, slots=True)
class AcceptedPrefix:
    """What of the answer was made a part of the prompt."""

    ids: tuple[int, ...] = ()
    text: str = ""


class StreamSplicer(Protocol):
    """Rewrites one stream, event by event."""

    def rewrite(self, event: bytes) -> bytes:
        """What the client gets for `event`: b"" if it has that. Raises Diverged."""


class NativeSplicer:
    """Of /generate."""

    def __init__(self, seen: Received, kept: AcceptedPrefix) -> None:
        """`seen` becomes this object's."""
        self._seen = seen
        self._kept = kept
        self._new = Received()

    def rewrite(self, event: bytes) -> bytes:
        return _rewritten(event, self._continue)

    def _continue(self, item: JsonObject) -> bool:
        """Make `item` follow on; False if it says nothing new."""
        index: Any = item.get("index", 0)
        sent = self._seen.choices.setdefault(index, Choice())
        if sent.is_finished:
            return False
        note_native(self._new, item)
        now = self._new.choices[index]
        ids, text = [*self._kept.ids, *now.ids], self._kept.text + now.parts[TEXT]
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
        if self._seen.is_incremental:
            item["text"], item["output_ids"] = text[len(told) :], ids[len(sent.ids) :]
            sent.parts = {TEXT: text, IDS: ids}
        else:
            item["text"], item["output_ids"] = text, ids
        return True

    def _meta(self, meta: JsonObject, first: JsonObject) -> JsonObject:
        """`meta_info` as if nothing had happened; `first` is what the first server said."""
        names = ("cached_tokens", "cached_tokens_details")
        told: JsonObject = {name: first[name] for name in names if name in first}
        num_kept = len(self._kept.ids)
        if num_kept:
            told["prompt_tokens"] = _plus(meta.get("prompt_tokens"), -num_kept)
            told["completion_tokens"] = _plus(meta.get("completion_tokens"), num_kept)
            reason = meta.get("finish_reason")
            if isinstance(reason, dict) and reason.get("type") == "length":
                told["finish_reason"] = {**reason, "length": _plus(reason.get("length"), num_kept)}
        return {**meta, **told}


class OpenAiSplicer:
    """Of OpenAI's endpoints."""

    def __init__(self, seen: Received, kept: AcceptedPrefix, field: Path, stops: Sequence[str]) -> None:
        """`seen` becomes this object's; `field` is where the text of `kept` would stand."""
        self._seen = seen
        self._num_kept = len(kept.ids)
        self._start: Parts = {field: kept.text} if kept.ids else {}
        self._stops = stops
        self._got: dict[int, Parts] = {}
        self._is_even: set[int] = set()
        """The choices that have come as far as they had."""

    def rewrite(self, event: bytes) -> bytes:
        return _rewritten(event, self._continue)

    def _continue(self, item: JsonObject) -> bool:
        choices: Any = item.get("choices") or []
        usage = item.get("usage")
        if not choices and usage and self._seen.has_usage:
            return False
        kept = [said for said in choices if self._is_news(said)]
        if choices and not kept:
            return False
        item.update(self._seen.head)
        item["choices"] = kept
        if self._num_kept and isinstance(usage, dict):
            item["usage"] = self._usage(usage)
        return True

    def _is_news(self, said: JsonObject) -> bool:
        """Take from `said` what the client has; False if nothing is left."""
        index: Any = said["index"]
        sent = self._seen.choices.setdefault(index, Choice())
        if sent.is_finished:
            return False
        if index in self._is_even:
            return True
        got = self._got.setdefault(index, dict(self._start))
        was_behind = bool(_missing(sent.parts, got))
        for holder, name, path in growing(said):
            holder[name], got[path] = _new_part(path, holder[name], sent.parts.get(path), got.get(path))
        missing = _missing(sent.parts, got)
        if said.get("finish_reason") is not None:
            # A stop string that was about to come is cut off at the end, and was not sent.
            if any(not isinstance(one, str) or not self._begins_a_stop(one) for one in missing):
                raise Diverged
            return True
        if not missing:
            self._is_even.add(index)
        delta = said.get("delta")
        if isinstance(delta, dict):
            _drop_names(delta)
            if sent.has_role and delta.get("role"):
                delta["role"], was_behind = None, True
        return not was_behind or any(True for _ in growing(said))

    def _begins_a_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)

    def _usage(self, usage: JsonObject) -> JsonObject:
        told = {
            **usage,
            "prompt_tokens": _plus(usage.get("prompt_tokens"), -self._num_kept),
            "completion_tokens": _plus(usage.get("completion_tokens"), self._num_kept),
        }
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(cached := details.get("cached_tokens"), int):
            prompt = told["prompt_tokens"]
            most = min(cached, prompt) if isinstance(prompt, int) else cached
            told["prompt_tokens_details"] = {**details, "cached_tokens": most}
        return told


def _rewritten(event: bytes, follow: Callable[[JsonObject], bool]) -> bytes:
    """`event` with its item as `follow` has changed it; b"" if that says nothing new. Raises Diverged."""
    data = data_of(event)
    if not data.startswith(b"{"):
        return event
    item = decode_json(data)
    if "error" in item:
        return event
    try:
        is_news = follow(item)
    except (Unreadable, KeyError, TypeError, AttributeError) as error:
        raise Diverged from error
    return with_data(event, encode_json(item)) if is_news else b""


def _new_part(path: Path, value: Any, sent: Any, got: Any) -> tuple[Any, Any]:
    """What of `value` comes after what was `sent`, and all that was got. Raises Diverged."""
    start = 0 if got is None else len(got)
    total = value if got is None else got + value
    if sent is None or start >= len(sent):
        return value, total
    same = sent[start : start + len(value)]
    if path[0] != "logprobs" and value[: len(same)] != same:
        raise Diverged
    return value[len(same) :], total


def _missing(sent: Parts, got: Parts) -> list[Any]:
    """The rest of each part that was sent, and has not come again yet."""
    rests = (part[len(got.get(path, ())) :] for path, part in sent.items() if path[0] != "logprobs")
    return [rest for rest in rests if rest]


def _drop_names(delta: JsonObject) -> None:
    """A tool call whose name the client has had its id too."""
    for tool in delta.get("tool_calls") or ():  # type: ignore[attr-defined]
        function = tool.get("function")
        if isinstance(function, dict) and function.get("name") == "":
            function["name"] = tool["id"] = None


def _plus(value: object, more: int) -> object:
    return value + more if isinstance(value, int) else value
