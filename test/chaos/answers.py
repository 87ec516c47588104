"""Sends one request and classifies its end: right answer, clear error, or lost."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import aiohttp

from .requests import Ask, Json

CLEAR_STATUSES = {429, 502, 503, 504}
"""Statuses that may refuse a valid request."""


class Outcome(StrEnum):
    """The end of a request."""

    RIGHT = "right"
    ERROR = "error"
    """A status or a last event that names the error and says that a retry may succeed."""
    BROKEN = "broken"
    """The connection to the router broke: clear only if the router itself was killed."""
    LOST = "lost"
    """No end in time, an end without an error, or a different text."""
    LEFT = "left"
    """The client disconnected before the end, on purpose."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of one request."""

    outcome: Outcome
    why: str
    instances: frozenset[str]
    """The pair that served it, as far as the answer tells."""
    began_s: float
    ended_s: float
    decision: str = ""
    """The reason of its placement, as the router explains it."""


@dataclass(frozen=True, slots=True)
class Manner:
    """The behaviour of a client."""

    limit_s: float
    """Seconds after which a request without an end is lost."""
    pause_s: float = 0.0
    """Seconds between two reads of a stream."""
    leaves_after: int | None = None
    """Number of reads of a stream after which the client disconnects."""


class Lost(Exception):
    """The bytes are neither an answer nor a clear error."""


async def put(session: aiohttp.ClientSession, url: str, ask: Ask, *, stream: bool, manner: Manner) -> Answer:
    """Send one request, read its whole answer, and classify it."""
    began_s = time.monotonic()
    instances, decision = frozenset[str](), ""
    try:
        async with (
            asyncio.timeout(manner.limit_s),
            session.post(
                url + ask.path, json={**ask.body, "stream": stream}, headers={"x-memserve-explain": "1"}
            ) as response,
        ):
            decision = response.headers.get("x-memserve-decision", "{}")
            instances = _instances(decision)
            if stream and response.status == 200:
                body, left = await _read_stream(response, manner)
                if left:
                    return Answer(Outcome.LEFT, "", instances, began_s, time.monotonic())
            else:
                body = await response.read()
        outcome, why = judge(ask, stream, response.status, body)
    except TimeoutError:
        outcome, why = Outcome.LOST, f"no end within {manner.limit_s:g} s"
    except (aiohttp.ClientError, OSError) as error:
        outcome, why = Outcome.BROKEN, f"{type(error).__name__}: {error}"
    except (Lost, ValueError, KeyError, TypeError) as error:
        outcome, why = Outcome.LOST, f"{type(error).__name__}: {error}"
    return Answer(outcome, why, instances, began_s, time.monotonic(), decision)


async def answer_of(session: aiohttp.ClientSession, url: str, ask: Ask) -> tuple[str, ...]:
    """The texts of a whole answer. Raises Lost for anything else."""
    async with session.post(url + ask.path, json=ask.body) as response:
        body = await response.read()
        if response.status != 200:
            raise Lost(f"{response.status}: {body[:300]!r}")
    return _texts(json.loads(body))


def judge(ask: Ask, stream: bool, status: int, body: bytes) -> tuple[Outcome, str]:
    """Classify a complete response. Raises Lost, or a parser's exception for malformed bytes."""
    if status != 200:
        error = json.loads(body)["error"]
        if status not in CLEAR_STATUSES or not error["message"] or not error["retryable"]:
            raise Lost(f"status {status}: {body[:300]!r}")
        return Outcome.ERROR, f"{status}: {error['message']}"
    if not stream:
        texts = _texts(json.loads(body))
        if texts != ask.expected:
            raise Lost(f"expected {ask.expected!r}, got {texts!r}")
        return Outcome.RIGHT, ""
    return _judge_stream(ask, body)


def _judge_stream(ask: Ask, body: bytes) -> tuple[Outcome, str]:
    texts = [""] * len(ask.expected)
    events = _events(body)
    for event in events:
        if event == "[DONE]":
            if rest := list(events):
                raise Lost(f"after the end came {rest}")
            if tuple(texts) != ask.expected:
                raise Lost(f"expected {ask.expected!r}, streamed {texts!r}")
            return Outcome.RIGHT, ""
        said = json.loads(event)
        if "error" in said:
            rest = [one for one in events if one != "[DONE]"]
            begun = all(whole.startswith(part) for part, whole in zip(texts, ask.expected, strict=True))
            if rest or not begun or not said["error"]["retryable"]:
                raise Lost(f"after {texts!r} came {event}, then {rest}")
            return Outcome.ERROR, f"in the stream: {said['error']['message']}"
        _add(texts, said)
    raise Lost(f"the stream was cut after {texts!r}: {body[-100:]!r}")


def _add(texts: list[str], said: Json) -> None:
    if "text" in said:
        texts[said.get("index", 0)] = said["text"]
    for choice in said.get("choices", ()):
        piece = choice["text"] if "text" in choice else choice["delta"].get("content")
        texts[choice["index"]] += piece or ""


def _events(body: bytes) -> Iterator[str]:
    for event in body.decode().split("\n\n"):
        for line in event.split("\n"):
            if line.startswith("data:"):
                yield line[5:].strip()


def _texts(answer: Any) -> tuple[str, ...]:
    if isinstance(answer, list):
        return tuple(one["text"] for one in answer)
    if "text" in answer:
        return (answer["text"],)
    choices = sorted(answer["choices"], key=lambda one: int(one["index"]))
    return tuple(one["text"] if "text" in one else one["message"]["content"] for one in choices)


def _instances(explained: str) -> frozenset[str]:
    decision = json.loads(explained)
    return frozenset(decision[role] for role in ("prefill", "decode") if decision.get(role))


async def _read_stream(response: aiohttp.ClientResponse, manner: Manner) -> tuple[bytes, bool]:
    """The bytes received, and whether the client left before the end."""
    body, num_reads = b"", 0
    while chunk := await response.content.readany():
        body += chunk
        num_reads += 1
        if num_reads == manner.leaves_after:
            response.close()
            return body, True
        if manner.pause_s:
            await asyncio.sleep(manner.pause_s)
    return body, False
