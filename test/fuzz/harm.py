"""Sends odd requests to a router with real servers, with an ordinary request beside them at all times.

A request does harm if a server ends, if it is answered with 5xx or a cut 200, or if the ordinary one waits.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import requests

from memserve.router.request import Api

from .values import Drawn

STALL_S = 2.0
OWN_LIMIT_S = 10.0
"""An odd request may ask for a long answer: the client then leaves."""
ORDINARY: Any = {
    "text": "Is anybody there?",
    "sampling_params": {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True},
}


@dataclass(frozen=True, slots=True)
class Harm:
    """What one request did."""

    kind: str
    detail: str
    drawn: Drawn

    def line(self) -> str:
        body = json.dumps(self.drawn.body)
        shown = body if len(body) < 400 else body[:200] + " ... " + body[-150:]
        return f"{self.kind}: {self.drawn.api} {shown}: {self.detail[:300]}"


@dataclass(slots=True)
class Tally:
    """The outcome of a run."""

    num_requests: int = 0
    num_ordinary: int = 0
    slowest_ordinary_s: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    harms: list[Harm] = field(default_factory=list)

    def summary(self) -> str:
        kinds = {
            kind: sum(one.kind == kind for one in self.harms) for kind in {one.kind for one in self.harms}
        }
        return (
            f"{self.num_requests} odd requests {dict(sorted(self.statuses.items()))}, "
            f"{self.num_ordinary} ordinary, "
            f"the slowest {self.slowest_ordinary_s:.2f} s; harm: {kinds or 'none'}"
        )


class Beside:
    """Sends an ordinary request after another, from a thread of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._began_s: float | None = None
        self._slowest_s, self._num, self._fault = 0.0, 0, ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def taken(self) -> tuple[float, int, str]:
        """Since the last call: the longest wait, also of the request that still waits; the count; a fault."""
        with self._lock:
            waiting_s = 0.0 if self._began_s is None else time.monotonic() - self._began_s
            seen = max(self._slowest_s, waiting_s), self._num, self._fault
            self._slowest_s, self._num, self._fault = 0.0, 0, ""
            return seen

    def close(self) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        session = requests.Session()
        while not self._ending.is_set():
            with self._lock:
                self._began_s = began_s = time.monotonic()
            fault = ""
            try:
                answer = session.post(f"{self._url}/generate", json=ORDINARY, timeout=30)
                if answer.status_code != 200 or answer.json()["meta_info"]["completion_tokens"] != 3:
                    fault = f"{answer.status_code} {answer.text[:200]}"
            except requests.RequestException as error:
                fault = repr(error)[:200]
            with self._lock:
                self._began_s = None
                self._slowest_s = max(self._slowest_s, time.monotonic() - began_s)
                self._num += 1
                self._fault = self._fault or fault
            self._ending.wait(0.02)


def run(
    url: str,
    drawn: Iterable[Drawn],
    find_ended: Callable[[bool], str | None],
    report: Callable[[str], None] = lambda _: None,
) -> Tally:
    """Send the requests one after another, and `report` harm as soon as it is seen.

    `find_ended` gives the name of a server that ended; with True, it waits until the cluster is ready.
    """
    tally, beside, session = Tally(), Beside(url), requests.Session()
    before: deque[Drawn] = deque(maxlen=3)
    try:
        for one in drawn:
            tally.num_requests += 1
            status, problem = _send(session, url, one)
            tally.statuses[status] = tally.statuses.get(status, 0) + 1
            slowest_s, num, fault = beside.taken()
            tally.num_ordinary += num
            tally.slowest_ordinary_s = max(tally.slowest_ordinary_s, slowest_s)
            if not problem and fault:
                problem = "ordinary request failed", fault
            if not problem and slowest_s > STALL_S:
                problem = "stall", f"{slowest_s:.1f} s"
            if ended := find_ended(problem is not None):
                problem = "server ended", f"{ended}, after {[other.fields for other in before]}"
            if problem:
                tally.harms.append(Harm(*problem, one))
                report(tally.harms[-1].line())
                beside.taken()  # what it saw before the cluster was ready again
            before.append(one)
    finally:
        beside.close()
    return tally


def _send(session: requests.Session, url: str, one: Drawn) -> tuple[str, tuple[str, str] | None]:
    """The status, and what is wrong with the answer."""
    headers, began_s = {"Content-Type": "application/json"}, time.monotonic()
    try:
        with session.post(
            url + one.api, data=one.raw(), headers=headers, stream=True, timeout=OWN_LIMIT_S
        ) as answer:
            data = b""
            for chunk in answer.iter_content(65536):
                data += chunk
                if time.monotonic() - began_s > OWN_LIMIT_S:
                    return "left", None
    except requests.Timeout:
        return "left", None if asks_for_much(one.body) else ("no answer in time", f"{OWN_LIMIT_S:g} s")
    except requests.RequestException as error:
        return "broken", ("connection broken", repr(error)[:200])
    status = str(answer.status_code)
    if answer.status_code >= 500 and answer.status_code != 501:
        return status, ("5xx", f"{status} {data.decode(errors='replace')[:300]}")
    if answer.status_code != 200:
        return status, None if _is_envelope(data) else (
            "no error object",
            data.decode(errors="replace")[:200],
        )
    cut = cut_of(one.api, data, answer.headers.get("content-type", ""))
    return status, None if cut is None else ("cut 200", cut)


def asks_for_much(body: dict[str, Any]) -> bool:
    """Whether the answer may be long."""
    params = body.get("sampling_params")
    objects = [body, *(params if isinstance(params, list) else [params])]
    names = ("max_new_tokens", "max_tokens", "max_completion_tokens", "n", "beam_width")
    return any(
        (
            isinstance(one, dict)
            and any(isinstance(one.get(name, 0), int | float) and one.get(name, 0) > 8 for name in names)
        )
        or (isinstance(one, dict) and "max_new_tokens" in one and one["max_new_tokens"] is None)
        for one in objects
    )


def _is_envelope(data: bytes) -> bool:
    try:
        return bool(json.loads(data)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return False


def cut_of(api: Api, data: bytes, content_type: str) -> str | None:
    """Why a 200 is no whole answer; None if it is."""
    if not content_type.startswith("text/event-stream"):
        try:
            answer = json.loads(data)
        except ValueError:
            return f"not JSON: {data[:200]!r}"
        results = (
            (answer if isinstance(answer, list) else [answer]) if api is Api.GENERATE else answer["choices"]
        )
        reasons = [_reason(one) for one in results]
    else:
        events = [line[5:].strip() for line in data.split(b"\n") if line.startswith(b"data:")]
        last: dict[int, str | None] = {}
        for event in map(json.loads, filter(lambda one: one != b"[DONE]", events)):
            if "error" in event:
                code = event["error"].get("code")
                return None if isinstance(code, int) and 400 <= code < 500 else f"error event {event}"
            for one in [event] if api is Api.GENERATE else event.get("choices") or ():
                last[one.get("index", 0)] = _reason(one) or last.get(one.get("index", 0))
        if not events or events[-1] != b"[DONE]":
            return f"no [DONE]: {data[-200:]!r}"
        reasons = list(last.values())
    wrong = [reason for reason in reasons if reason not in ("stop", "length", "tool_calls")]
    return f"finish reasons {wrong}" if wrong or not reasons else None


def _reason(result: dict[str, Any]) -> str | None:
    if "meta_info" not in result or "finish_reason" in result:
        reason: str | None = result.get("finish_reason")
        return reason
    told = result["meta_info"].get("finish_reason")
    if told and told.get("type") == "abort":
        return f"abort {told.get('status_code')} {told.get('message')}"
    return told["type"] if told else None
