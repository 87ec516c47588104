"""Requests and results: a workload consists of sessions of turns, a run of one record per request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session."""

    new_tokens: tuple[int, ...]
    """Ids that follow the history; all of the prompt if the session does not grow."""
    num_output: int
    """Tokens to generate, exactly."""
    at_s: float | None = None
    """Arrival time, on the clock of its trace."""


@dataclass(frozen=True, slots=True)
class Session:
    """Requests in order: each is sent after the answer of the previous one."""

    name: str
    turns: tuple[Turn, ...]
    grows: bool = True
    """Whether a prompt contains all earlier turns with their answers, and then its new tokens."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Sessions, in the order of their beginnings."""

    name: str
    sessions: tuple[Session, ...]

    @property
    def num_requests(self) -> int:
        return sum(len(session.turns) for session in self.sessions)


class Cell(msgspec.Struct, frozen=True):
    """The identity of a run: system, workload, rate and repeat."""

    part: str
    """Part of the evaluation: `steps`, `policies`, …"""
    system: str
    workload: str
    rate: float
    """Requests per second offered; 0 if sessions follow their answers (closed loop)."""
    load: str
    """The rate in words: `below`, `near` or `over` saturation; else empty."""
    repeat: int


class Outcome(msgspec.Struct, frozen=True):
    """One request. Times in seconds; tokens counted by the server, or by us where it does not say."""

    session: str
    turn: int
    sent_s: float
    """Seconds from the start of the run."""
    ttft_s: float | None
    """Seconds from sending to the first token; None without one."""
    jct_s: float | None
    """Seconds from sending to the last token."""
    tpot_s: float | None
    """Mean time between tokens after the first; None with fewer than two."""
    prompt_tokens: int
    output_tokens: int
    reused_hbm: int | None = None
    """Prompt tokens that prefill found in device memory; None where a server does not tell tiers apart."""
    reused_dram: int | None = None
    """Blocks that were fetched from another instance before the dispatch lie there, too."""
    reused: int | None = None
    """Cached prompt tokens in all tiers; None if the server does not report them."""
    error: str | None = None
    warmup: bool = False
    """Sent to warm the system up: not in any figure."""


class Run(msgspec.Struct, frozen=True):
    """All requests of one run: a line of `runs.jsonl`."""

    cell: Cell
    duration_s: float
    """Seconds from the first request to the end of the last answer."""
    kv_bytes_moved: int | None
    """Bytes between the servers' memories; None if they do not report them."""
    outcomes: tuple[Outcome, ...]
    stolen: float | None = None
    """Share of the processor time wanted here that others on the same host got; None if unknown."""

    @property
    def measured(self) -> list[Outcome]:
        """All requests after the warm-up."""
        return [outcome for outcome in self.outcomes if not outcome.warmup]

    @property
    def answered(self) -> list[Outcome]:
        """Those of `measured` that did not fail."""
        return [outcome for outcome in self.measured if outcome.error is None]


def write_run(path: Path, run: Run) -> None:
    """Append one line; a line before it that was cut short stays a line of its own."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(msgspec.json.encode(run) + b"\n")


def read_runs(path: Path) -> Iterator[Run]:
    """The runs of a file, which need not exist. A line that was cut short is no run, and left out."""
    if path.is_file():
        for line in path.read_bytes().splitlines():
            with suppress(msgspec.DecodeError):
                yield msgspec.json.decode(line, type=Run)
