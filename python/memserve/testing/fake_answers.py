"""The answers of a fake worker, in the formats of SGLang and OpenAI. Knows no sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from memserve.wire.messages import Role

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Script:
    """The behaviour of a fake worker."""

    tokens: tuple[str, ...] = ("Hello", ",", " world")
    prompt_tokens: int = 5
    cached_tokens: int = 0
    status: int = 200
    """HTTP status; a status other than 200 is answered at once, with `message`."""
    message: str = "scripted failure"
    drop_before: int | None = None
    """Reset the connection before this token; 0: before any byte."""
    continues: bool = False
    """As a greedy model: answer a prompt that ends with ids of the first tokens with the remaining ones."""
    gates: Mapping[int, asyncio.Event] = field(default_factory=dict)
    """By token number (one past the last: the end of the stream): an event that the token waits for."""


FIRST_ID = 1000
"""The id of a script's first token; the next tokens have the next ids."""


def num_parts(body: Json) -> int | None:
    """Number of prompts in a body that has a list of them; None for a single prompt."""
    for name in ("text", "input_ids", "prompt"):
        value = body.get(name)
        if isinstance(value, list) and value and isinstance(value[0], str | list):
            return len(value)
    return None


class Answers:
    """The answer to one request, whole or token by token."""

    def __init__(self, path: str, body: Json, script: Script, role: Role) -> None:
        self._path = path
        self._body = body
        self._script = script
        self._role = role
        self._parts = num_parts(body)
        self._start = _num_repeated(body, len(script.tokens)) if script.continues else 0
        tokens = script.tokens[self._start :]
        # A prefill server answers with the one token that it computed.
        self._tokens = tokens[:1] if role is Role.PREFILL else tokens
        self.num_tokens = len(self._tokens)

    def whole(self) -> Json | list[Json]:
        """The answer to a request that does not stream."""
        if self._path == "/generate":
            items = [self._native(part, self.num_tokens) for part in range(self._parts or 1)]
            return items[0] if self._parts is None else items
        choices = [
            self._choice(part, "".join(self._tokens), range(self.num_tokens))
            for part in range(self._parts or 1)
        ]
        return {
            "id": self._rid(0),
            "object": "whole",
            "model": "fake",
            "choices": choices,
            "usage": self._usage(),
        }

    def events(self, number: int) -> Iterator[bytes]:
        """The events for token `number`, one per prompt."""
        for part in range(self._parts or 1):
            if self._path == "/generate":
                item = self._native(part, number + 1)
                if self._parts is not None:
                    item["index"] = part
                yield _event(item)
            else:
                choice = self._choice(part, self._tokens[number], range(number, number + 1))
                yield _event({"id": self._rid(part), "object": "chunk", "choices": [choice]})

    def end(self) -> bytes:
        """The last events of a stream."""
        options = self._body.get("stream_options") or {}
        usage = b""
        if options.get("include_usage"):
            usage = _event({"id": self._rid(0), "object": "chunk", "choices": [], "usage": self._usage()})
        return usage + b"data: [DONE]\n\n"

    def _native(self, part: int, num_tokens: int) -> Json:
        finished = num_tokens == self.num_tokens
        meta: Json = {
            "id": self._rid(part),
            "finish_reason": {"type": "stop"} if finished else None,
            "prompt_tokens": self._script.prompt_tokens + self._start,
            "completion_tokens": num_tokens,
            "cached_tokens": self._script.cached_tokens,
        }
        if self._body.get("return_logprob"):
            known = self._role is not Role.DECODE
            meta["input_token_logprobs"] = [[-0.5, 7, f"in{part}"]] if known else []
            meta["output_token_logprobs"] = [[-0.1, i, self._tokens[i]] for i in range(num_tokens)]
        first = FIRST_ID + self._start
        ids = list(range(first, first + num_tokens))
        return {"text": "".join(self._tokens[:num_tokens]), "output_ids": ids, "meta_info": meta}

    def _choice(self, part: int, text: str, numbers: range) -> Json:
        last = numbers.stop == self.num_tokens
        choice: Json = {"index": part, "finish_reason": "stop" if last else None, "logprobs": None}
        if self._path == "/v1/completions":
            choice["text"] = text
            if self._body.get("logprobs"):
                choice["logprobs"] = self._logprobs(part, numbers)
        elif self._body.get("stream"):
            choice["delta"] = {"role": "assistant", "content": text}
        else:
            choice["message"] = {"role": "assistant", "content": text}
        return choice

    def _logprobs(self, part: int, numbers: range) -> Json:
        tokens = [self._tokens[i] for i in numbers]
        if self._body.get("echo") and self._role is not Role.DECODE and numbers.start == 0:
            tokens = [f"in{part}", *tokens]
        count = len(tokens)
        return {
            "tokens": tokens,
            "token_logprobs": [-0.1] * count,
            "top_logprobs": [None] * count,
            "text_offset": [-1] * count,
        }

    def _usage(self) -> Json:
        prompt = self._script.prompt_tokens * (self._parts or 1)
        completion = self.num_tokens * (self._parts or 1)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._script.cached_tokens},
        }

    def _rid(self, part: int) -> str:
        rid = self._body.get("rid")
        return str(rid[part] if isinstance(rid, list) else rid)


def _num_repeated(body: Json, most: int) -> int:
    """Number of the script's tokens at the end of a prompt of ids."""
    ids = body.get("input_ids") or body.get("prompt")
    if not isinstance(ids, list):
        return 0
    said = range(FIRST_ID, FIRST_ID + most)
    return next((n for n in range(most, 0, -1) if ids[-n:] == list(said[:n])), 0)


def _event(item: Json) -> bytes:
    return b"data: " + json.dumps(item).encode() + b"\n\n"
