"""The parts of the evaluation that are programs of their own: each prints figures, one JSON object a line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import progress
from memserve.testing.ending import end_with_parent, interrupt_on_signals

HERE = Path(__file__).resolve().parent.parent
FIGURES = "figures.jsonl"
COSTS = "costs.json"
"""The costs of the live instance, which one program writes for the next ones."""
POLICIES = ("least_load", "session", "longest_prefix", "prompt_tree")


@dataclass(frozen=True, slots=True)
class Program:
    """A script of this folder."""

    part: str
    name: str
    arguments: tuple[str, ...]
    estimate_s: float

    @property
    def key(self) -> str:
        return f"{self.part}/{self.name} {' '.join(self.arguments)}".strip()


def programs(parts: Sequence[str]) -> list[Program]:
    """The programs of these parts, in order."""
    quick = ("--quick",)
    everything = [
        Program("stock", "bench_stream", quick, 45),
        Program("micro", "bench_transfer", quick, 30),
        Program("micro", "bench_tree", quick, 30),
        Program("micro", "bench_mempool", quick, 60),
        Program("micro", "bench_dram_hit", (*quick, "--rounds", "7"), 180),
        Program("micro", "bench_fetch", quick, 90),
        Program("micro", "fit_cost_model", (*quick, "-o", COSTS), 90),
        Program("policies", "bench_routing", ("--policies", *POLICIES, "--seconds", "45"), 480),
        Program("policies", "bench_routing", ("--policies", "prompt_tree", "--seconds", "45",
                                              "--caching", "full", "--fetch", "never", "auto"), 270),
        Program("scale", "bench_scale", (*quick, "--costs", COSTS), 120),
        Program("scale", "bench_scale", (*quick, "--check-real"), 150),
        Program("overheads", "bench_overheads", quick, 150),
    ]  # fmt: skip
    return [each for each in everything if each.part in parts]


def finished(directory: Path) -> Mapping[str, str]:
    """The ended programs with their outcomes: `done`, or the reason of the failure."""
    path = directory / "programs.json"
    found: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def run_program(program: Program, directory: Path) -> str | None:
    """Run a program, keep its figures. Returns the reason of a failure, or None; progress goes to a log"""
    log = directory / "logs" / f"{program.key.replace('/', '-').replace(' ', '_')[:80]}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    script = HERE / f"{program.name}.py"
    arguments = [str(directory / COSTS) if each == COSTS else each for each in program.arguments]
    progress(f"{program.key} (log in {log})")
    interrupt_on_signals()
    with log.open("wb") as errors:
        ended = subprocess.run(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            check=False,
            preexec_fn=end_with_parent(),
        )
    lines = [line for line in ended.stdout.splitlines() if line.startswith(b"{")]
    failure = f"ended with status {ended.returncode}: see {log}" if ended.returncode else None
    if failure is None:
        with (directory / FIGURES).open("a") as file:
            for line in lines:
                figure: dict[str, Any] = json.loads(line)
                file.write(json.dumps({"part": program.part, **figure}) + "\n")
    done = {**finished(directory), program.key: failure or "done"}
    (directory / "programs.json").write_text(json.dumps(done, indent=1))
    return failure
