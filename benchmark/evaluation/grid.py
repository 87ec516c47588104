"""Systems by workloads by rates by repeats: the cells of the evaluation that put load on whole systems.

All systems of a part run at once, idle but for one, and take turns in every cell: what the machine does
meanwhile, it does to all of them. Repeats have workloads of their own, the same for every system.
"""

from __future__ import annotations

import statistics
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from tqdm import tqdm

from figures import progress
from load.plan import Plan, closed_loop, open_loop
from load.records import Cell, Outcome, Session, Turn, Workload, read_runs, write_run
from load.run import run_once, run_undisturbed
from memserve.testing.cluster import ClusterFailed
from systems.base import Setting, System
from systems.catalogue import SYSTEMS
from workloads import Settings, make

REFERENCE = "pd-basic"
LOADS = {"below": 0.55, "near": 0.85, "over": 1.3}
"""Rates, as shares of what `REFERENCE` can serve."""
ACTIVE_SESSIONS = 6
WARMUP = 2
SATURATING, CALIBRATING = 8, 32
"""Concurrent requests, and all requests, of the saturation measurement."""
CALIBRATION_SEED = 1000
OVERHEAD_S = 3.5
"""Additional seconds of a run: flush, settling, and the last turns, which wait for each other."""
START_S = 25.0
"""Seconds to start one system, when several start together."""
RUNS = "runs.jsonl"


@dataclass(frozen=True, slots=True)
class Grid:
    """One part of the evaluation."""

    part: str
    systems: tuple[str, ...]
    workloads: Mapping[str, Settings]
    repeats: int
    loads: tuple[str, ...] = tuple(LOADS)


def done_in(directory: Path) -> set[Cell]:
    """The cells that a directory has."""
    return {run.cell for run in read_runs(directory / RUNS)}


def cells_of(grid: Grid, saturation: Mapping[str, float]) -> Iterator[Cell]:
    """All cells in the order of their runs: the first system of one repeat is the last of the next."""
    for repeat in range(grid.repeats):
        systems = grid.systems[::-1] if repeat % 2 else grid.systems
        for workload in grid.workloads:
            for load in grid.loads:
                rate = round(LOADS[load] * saturation[workload], 2)
                for system in systems:
                    yield Cell(grid.part, system, workload, rate, load, repeat)


def left_of(grid: Grid, saturation: Mapping[str, float], done: Container[Cell]) -> list[Cell]:
    """The cells that are not done yet, in order."""
    return [cell for cell in cells_of(grid, saturation) if cell not in done]


def without(grid: Grid, systems: Container[str]) -> Grid:
    """The grid with fewer systems."""
    return replace(grid, systems=tuple(each for each in grid.systems if each not in systems))


def estimate_s(grid: Grid, saturation: Mapping[str, float], done: Container[Cell]) -> float:
    """Seconds for the remaining cells of a grid, with the start of its servers."""
    left = left_of(grid, saturation, done)
    asking = sum(grid.workloads[cell.workload].requests / cell.rate + OVERHEAD_S for cell in left)
    return asking + START_S * len({cell.system for cell in left})


def plan_of(cell: Cell, settings: Settings) -> Plan:
    """The open-loop plan of a cell, from the seed of its repeat."""
    workload = make(cell.workload, replace(settings, seed=cell.repeat))
    return open_loop(workload, cell.rate, ACTIVE_SESSIONS, cell.repeat, WARMUP)


def unordered(workload: Workload, seed: int) -> Workload:
    """Its requests with nothing to wait for: what is to be answered before is made up."""
    draw = Random(seed)
    alone: list[Session] = []
    for session in workload.sessions:
        history: list[int] = []
        for turn in session.turns:
            prompt = (*history, *turn.new_tokens)
            alone.append(
                Session(f"{session.name}.{len(alone)}", (Turn(prompt, turn.num_output),), grows=False)
            )
            if session.grows:
                history = [*prompt, *draw.choices(turn.new_tokens, k=turn.num_output)]
    draw.shuffle(alone)
    return Workload(workload.name, tuple(alone))


class Bench:
    """The running systems of a grid."""

    def __init__(self, grid: Grid, setting: Setting, directory: Path) -> None:
        self._grid, self._setting, self._directory = grid, setting, directory
        self._stack = ExitStack()
        self.systems: dict[str, System] = {}
        self.unavailable: dict[str, str] = {}

    def start(self, names: set[str]) -> None:
        """Start these systems. A system that cannot start is left out, with its reason."""
        progress(f"{self._grid.part}: starting {', '.join(sorted(names))} (logs in {self._setting.logs})")
        started = {}
        for name in self._grid.systems:
            if name in names:
                started[name] = self._stack.enter_context(SYSTEMS[name].start(name, self._setting))
        for name, system in started.items():
            try:
                system.wait_ready()
                self.systems[name] = system
            except ClusterFailed as failure:
                self.unavailable[name] = str(failure)
                system.close()
                progress(f"{name} did not start and is left out: {str(failure).splitlines()[0]}")

    def saturation(self) -> dict[str, float]:
        """Saturation: requests per second of each workload that the reference serves in a closed loop."""
        system = self.systems[REFERENCE]
        found = {}
        for name, settings in self._grid.workloads.items():
            rates = []
            for seed in (CALIBRATION_SEED, CALIBRATION_SEED + 1):
                workload = unordered(make(name, replace(settings, seed=seed, requests=CALIBRATING)), seed)
                cell = Cell("saturation", system.name, name, 0.0, "", seed)
                run = run_once(system, cell, closed_loop(workload, SATURATING))
                rates.append(len(run.outcomes) / run.duration_s)
            found[name] = statistics.median(rates)
            progress(f"saturation of {system.name} under {name}: {found[name]:.2f} requests/s")
        return found

    def measure(self, saturation: Mapping[str, float], done: set[Cell]) -> None:
        """All cells that are not done yet."""
        left = left_of(without(self._grid, self.unavailable), saturation, done)
        total = sum(self._grid.workloads[cell.workload].requests for cell in left)
        with tqdm(total=total, desc=self._grid.part, unit=" requests", mininterval=5) as bar:
            for cell in left:
                bar.set_postfix_str(f"{cell.workload} {cell.load} {cell.system}", refresh=False)

                def count(_: Outcome) -> None:
                    bar.update()

                plan = plan_of(cell, self._grid.workloads[cell.workload])
                run = run_undisturbed(self.systems[cell.system], cell, plan, count)
                write_run(self._directory / RUNS, run)
                done.add(cell)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
