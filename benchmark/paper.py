"""The whole evaluation with one command: every caching step, stock SGLang, policies, parts, scale, costs.

    python benchmark/paper.py                        # or: make bench
    python benchmark/paper.py --parts steps stock    # some of it
    python benchmark/paper.py -o results/second --against results/first

It first prints how long it will take. Run it again with the same directory to continue an interrupted run.
The machine should do nothing else meanwhile. At the end, DIR/report.html has all results.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_model import ROOT, make_model
from evaluation.conditions import FILE, PARTS, conditions, read_conditions, write_conditions
from evaluation.grid import LOADS, REFERENCE, Bench, Grid, done_in, estimate_s, left_of, without
from evaluation.programs import Program, finished, programs, run_program
from figures import progress
from report.make import headline_markdown, make_report
from systems.base import Setting
from workloads import Settings

STEPS = ("colocated", "colocated-cache", "pd-basic", "pd-caching-1", "pd-caching-2", "pd-caching-3")
STOCK = ("pd-caching-3", "stock-pd", "stock-pd-decode-cache", "stock-pd-hicache")
WORKLOADS = {
    "sharegpt": Settings(requests=14, scale=4.0, output_scale=0.1),
    "loogle": Settings(requests=12, scale=1 / 24, output_scale=0.25, questions=8),
    "react": Settings(requests=12, scale=0.8, output_scale=0.3),
}
"""Answers are scaled down more than prompts: a decode step costs a CPU as much as a GPU, a prompt's token
far more, and with answers as long as published everything would wait for decode alone."""
GUESSED_SATURATION = {"sharegpt": 2.4, "loogle": 3.2, "react": 2.9}
"""Requests per second, for an estimate of the time before it is measured."""
REPORT_S = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "results" / "paper", metavar="DIR",
                        help="where to write, and to go on (default: results/paper)")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)} (default: all)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="of each cell (default: %(default)s)")
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS), metavar="LOAD",
                        help=f"of {', '.join(LOADS)} PD-Basic's saturation (default: all)")  # fmt: skip
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--rates-of", type=Path, metavar="DIR", help="a run whose rates are used")
    parser.add_argument("--against", type=Path, metavar="DIR", help="an earlier run: do the two agree?")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        Evaluation(args).run()
    except KeyboardInterrupt:
        sys.exit(f"interrupted; the same command goes on where it was ({args.output})")


def saturation_in(directory: Path) -> dict[str, float]:
    """Requests per second by workload, as a run there has found them; empty if it has not."""
    found: dict[str, float] = read_conditions(directory).get("saturation", {})
    return found


class Evaluation:
    """What was asked for, in a directory that remembers what is done."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._directory: Path = args.output
        self._against: Path | None = args.against
        self._parts: Sequence[str] = args.parts
        self._workloads = {name: WORKLOADS[name] for name in args.workloads}
        self._unavailable: dict[str, str] = read_conditions(self._directory).get("unavailable", {})
        self._done = done_in(self._directory)
        loads = tuple(args.loads)
        grids = (
            Grid("steps", STEPS, self._workloads, args.repeats, loads),
            Grid("stock", STOCK, self._workloads, args.repeats, loads),
        )
        self._grids = [grid for grid in grids if grid.part in self._parts]
        self._saturation = saturation_in(self._directory)
        if args.rates_of is not None and not self._saturation:
            self._saturation = saturation_in(args.rates_of)

    def run(self) -> None:
        """Everything that is left, then the report."""
        for name in self._unavailable:
            progress(f"{name} did not start before and is left out ('unavailable' in {FILE} says so)")
        left = self._left_s()
        till = time.strftime("%H:%M", time.localtime(time.time() + left))
        progress(f"about {left / 60:.0f} minutes, till {till}")
        self._write()
        model = make_model()
        setting = Setting(model, self._directory / "logs")
        if self._grids and not self._saturation:
            self._calibrate(setting)
        for grid in self._grids:
            self._measure(grid, setting)
            self._report()
        for program in self._programs_left():
            failure = run_program(program, self._directory)
            if failure is not None:
                progress(f"{program.key}: {failure}")
        print(headline_markdown(self._report()))
        progress(f"wrote {self._directory / 'report.html'}")

    def _calibrate(self, setting: Setting) -> None:
        grid = Grid("saturation", (REFERENCE,), self._workloads, 1)
        with Bench(grid, setting, self._directory) as bench:
            bench.start({REFERENCE})
            self._saturation = bench.saturation()
        self._write()
        progress(f"about {self._left_s() / 60:.0f} minutes from here")

    def _measure(self, grid: Grid, setting: Setting) -> None:
        """A grid's cells, if any is left, by the systems that they need and that can be started here."""
        grid = without(grid, self._unavailable)
        needed = {cell.system for cell in left_of(grid, self._saturation, self._done)}
        if not needed:
            return
        with Bench(grid, setting, self._directory) as bench:
            bench.start(needed)
            self._unavailable |= bench.unavailable
            self._write()
            bench.measure(self._saturation, self._done)

    def _programs_left(self) -> list[Program]:
        """Those that did not end well are tried again."""
        done = finished(self._directory)
        return [each for each in programs(self._parts) if done.get(each.key) != "done"]

    def _left_s(self) -> float:
        saturation = GUESSED_SATURATION | self._saturation
        grids = [without(grid, self._unavailable) for grid in self._grids]
        cells = sum(estimate_s(grid, saturation, self._done) for grid in grids)
        return cells + sum(each.estimate_s for each in self._programs_left()) + REPORT_S

    def _write(self) -> None:
        stated = conditions(self._workloads, self._saturation, self._unavailable)
        write_conditions(self._directory, **stated)

    def _report(self) -> Any:
        return make_report(self._directory, against=self._against)


if __name__ == "__main__":
    main()
