"""Sends one streamed request to SGLang's `/generate`, and times it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

PREFIX = b"data: "
DONE = b"data: [DONE]"
REPORT = b": memserve "
"""The comment of MemServe's router at the end of a stream, with the prompt tokens that prefill had cached."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's answer. Seconds are those of `time.perf_counter`."""

    begun_s: float
    first_s: float | None
    ended_s: float
    output: tuple[int, ...]
    meta: dict[str, Any]
    report: dict[str, Any]
    error: str | None


class Client:
    """Sends requests to one server. The owner of the session closes it."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http, self._url = http, f"{url}/generate"

    async def generate(self, tokens: list[int], num_output: int, session: str) -> Answer:
        """Never raises for a server's fault: refusals, broken streams and malformed bytes become `error`."""
        params = {"max_new_tokens": num_output, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": tokens, "sampling_params": params, "stream": True}
        headers = {"x-session-id": session, "x-memserve-report": "1"}
        begun = time.perf_counter()
        seen = _Seen()
        error = None
        try:
            async with self._http.post(self._url, json=body, headers=headers) as response:
                if response.status != 200:
                    error = f"{response.status}: {(await response.text())[:200]}"
                else:
                    async for chunk in response.content.iter_any():
                        seen.feed(chunk)
                    error = seen.failure()
        except (TimeoutError, aiohttp.ClientError, OSError) as failure:
            error = repr(failure)
        except json.JSONDecodeError as failure:
            error = f"what came is no JSON: {failure}"
        ended = time.perf_counter()
        last = {} if error else seen.last()
        output = tuple(last.get("output_ids", ()))
        return Answer(begun, seen.first_s, ended, output, last.get("meta_info", {}), seen.report, error)


class _Seen:
    """Events of one stream. Only the last is parsed: each one has all the text so far."""

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.report: dict[str, Any] = {}
        self._rest = b""
        self._last = b""
        self._is_done = False

    def feed(self, chunk: bytes) -> None:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(REPORT):
                self.report = json.loads(line[len(REPORT) :])
            elif line.startswith(DONE):
                self._is_done = True
            elif line.startswith(PREFIX):
                self._last = line
                if self.first_s is None:
                    self.first_s = time.perf_counter()

    def failure(self) -> str | None:
        """The error of the ended stream."""
        if not self._is_done or not self._last:
            return "the stream ended before its end"
        if "error" in self.last():
            return str(self.last()["error"])[:200]
        return None

    def last(self) -> dict[str, Any]:
        parsed: Any = json.loads(self._last[len(PREFIX) :])
        return parsed if isinstance(parsed, dict) else {"error": "an event that is no object"}
