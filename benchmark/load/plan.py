"""When each request of a workload is sent: pure, and the same for every system and repeat.

Open loop: requests come at random times whatever the system does, as from many users; within a session
the next one still waits for the answer before it. Closed loop: so many sessions at once, each turn right
after the answer. A trace has times of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from load.records import Session, Workload


@dataclass(frozen=True, slots=True)
class Planned:
    """A session and the earliest time of each of its turns, in seconds from the run's begin."""

    session: Session
    at_s: tuple[float, ...]
    ranks: tuple[int, ...]
    """By turn: its place among all requests in the order of these times, from 0."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The sessions to send."""

    sessions: tuple[Planned, ...]
    at_once: int | None = None
    """Most concurrent sessions; None: no limit."""
    num_warmup: int = 0
    """The first requests, which are in no figure, because caches and code are cold."""

    @property
    def num_requests(self) -> int:
        return sum(len(each.at_s) for each in self.sessions)


def open_loop(workload: Workload, rate: float, active: int, seed: int, num_warmup: int = 0) -> Plan:
    """Poisson arrivals of `rate` requests per second, each the next turn of one of `active` sessions.

    A session that has ended is replaced by the next one. Raises ValueError for a rate or number below 1e-9.
    """
    if not rate > 0 or active < 1:
        raise ValueError("an open loop needs a rate above 0 and at least one active session")
    draw = Random(seed)
    waiting = list(range(len(workload.sessions)))[::-1]
    going = [waiting.pop() for _ in range(min(active, len(waiting)))]
    times: list[list[float]] = [[] for _ in workload.sessions]
    now = 0.0
    while going:
        now += draw.expovariate(rate)
        slot = draw.randrange(len(going))
        chosen = going[slot]
        times[chosen].append(now)
        if len(times[chosen]) == len(workload.sessions[chosen].turns):
            if waiting:
                going[slot] = waiting.pop()
            else:
                del going[slot]
    return _ranked(workload.sessions, times, None, num_warmup)


def closed_loop(workload: Workload, at_once: int, num_warmup: int = 0) -> Plan:
    """Sessions in order, a fixed number at once, without think time between turns."""
    if at_once < 1:
        raise ValueError("a closed loop needs at least one session at once")
    times = [[0.0] * len(session.turns) for session in workload.sessions]
    return _ranked(workload.sessions, times, at_once, num_warmup)


def traced(workload: Workload, speed: float, num_warmup: int = 0) -> Plan:
    """Each turn at its own time; a second of the trace takes 1 / `speed` seconds.

    Raises ValueError if a turn has no time.
    """
    if not speed > 0:
        raise ValueError("a trace's speed is above 0; 2 replays it twice as fast")
    times = []
    for session in workload.sessions:
        own = [turn.at_s for turn in session.turns if turn.at_s is not None]
        if len(own) != len(session.turns):
            raise ValueError(f"workload {workload.name} has no times of its own: give a rate instead")
        times.append([at_s / speed for at_s in own])
    first = min((each[0] for each in times if each), default=0.0)
    return _ranked(workload.sessions, [[at - first for at in each] for each in times], None, num_warmup)


def _ranked(
    sessions: Sequence[Session], times: Sequence[Sequence[float]], at_once: int | None, num_warmup: int
) -> Plan:
    order = sorted((at_s, number, turn) for number, own in enumerate(times) for turn, at_s in enumerate(own))
    ranks = {(number, turn): rank for rank, (_, number, turn) in enumerate(order)}
    planned = [
        Planned(session, tuple(own), tuple(ranks[number, turn] for turn in range(len(own))))
        for number, (session, own) in enumerate(zip(sessions, times, strict=True))
    ]
    return Plan(tuple(planned), at_once, num_warmup)
