"""A run directory, read: runs, figures, conditions and notes. Judges nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from load.records import Run, read_runs
from report.summary import Comparison, Key, Slo, Summary, compare, group, summarize

T = TypeVar("T")
NOTES = Path(__file__).parent / "notes.json"
ORDER = ("steps", "stock", "policies", "micro", "scale", "overheads")


class NothingMeasuredError(Exception):
    """The directory has nothing to report; the text names the missing part."""


class Figure(msgspec.Struct, frozen=True):
    """One line of figures.jsonl, as `figures.report` prints it, with its part."""

    name: str
    value: float | None = None
    unit: str = ""
    n: int = 1
    spread: float | None = None
    baseline: float | None = None
    ratio: float | None = None
    target: float | None = None
    machine: str = ""
    commit: str = ""
    part: str = "micro"
    better: str | None = None
    """`higher` or `lower`; None: told from the unit."""

    @property
    def higher_is_better(self) -> bool:
        if self.better is not None:
            return self.better == "higher"
        return "/s" in self.unit or (self.unit.startswith("of ") and self.unit != "of observed")

    @property
    def short(self) -> str:
        """The name without its part."""
        return self.name.removeprefix(f"{self.part}/")

    @property
    def target_met(self) -> bool | None:
        """Whether the promised ratio, or value where there is no baseline, was reached.

        None if nothing was promised: a simulation that is checked should be neither above nor below.
        """
        reached = self.value if self.baseline is None and self.ratio is None else self.ratio
        if self.target is None or reached is None or "check" in self.name.split("/"):
            return None
        return reached >= self.target if self.higher_is_better else reached <= self.target


class Described(msgspec.Struct, frozen=True):
    """A system or a part, in words."""

    title: str = ""
    what: str = ""
    baseline: str = ""
    """By part: the system that the others are compared with."""
    subject: str = ""
    """By part: the system whose losses are named."""


class About(msgspec.Struct, frozen=True):
    """run.json: the conditions. Any of it may be missing."""

    machine: Any = ""
    commit: str = ""
    versions: dict[str, Any] = {}
    model: Any = ""
    settings: dict[str, Any] = {}
    workloads: dict[str, dict[str, Any]] = {}
    systems: dict[str, Described] = {}
    parts: dict[str, Described] = {}
    saturation: dict[str, Any] = {}
    unavailable: dict[str, str] = {}
    begun: Any = ""
    ended: Any = ""

    def slo(self, workload: str) -> Slo | None:
        """settings.slo: {"ttft_s":…, "tpot_s":…}, of all workloads or by workload."""
        stated = self.settings.get("slo")
        if isinstance(stated, Mapping):
            stated = stated.get(workload, stated)
            if "ttft_s" in stated and "tpot_s" in stated:
                return Slo(float(stated["ttft_s"]), float(stated["tpot_s"]))
        return None


@dataclass(frozen=True)
class Evidence:
    """All inputs of a report."""

    cells: Mapping[Key, list[Run]]
    figures: tuple[Figure, ...]
    about: About
    notes: Mapping[str, str]

    @cached_property
    def summaries(self) -> dict[Key, Summary]:
        return {key: summarize(runs, self.about.slo(key.workload)) for key, runs in self.cells.items()}

    @cached_property
    def _compared(self) -> dict[tuple[Key, Key], dict[str, Comparison]]:
        return {}

    def parts(self) -> list[str]:
        """Those with anything measured, in the order of run.json, then of the evaluation."""
        present = {key.part for key in self.cells} | {figure.part for figure in self.figures}
        order = [*self.about.parts, *ORDER, *sorted(present)]
        return [part for part in dict.fromkeys(order) if part in present]

    def keys(self, part: str) -> list[Key]:
        """Of a part, by workload, rate and system: as run.json has them, else as they came."""
        systems = [*self.about.systems, *(key.system for key in self.cells)]
        workloads = [*self.about.workloads, *(key.workload for key in self.cells)]
        return sorted(
            (key for key in self.cells if key.part == part),
            key=lambda key: (workloads.index(key.workload), key.rate, systems.index(key.system)),
        )

    def beside(self, key: Key, system: str) -> Key | None:
        """Another system's cell of the same workload and rate; of the same part, if it is there."""
        other = key._replace(system=system)
        elsewhere = (one for one in self.cells if one._replace(part=key.part) == other)
        return other if other in self.cells else next(elsewhere, None)

    def compared(self, subject: Key, baseline: Key) -> dict[str, Comparison]:
        """Figures of one cell over another's, paired by repeat."""
        if (subject, baseline) not in self._compared:
            slo = self.about.slo(subject.workload)
            self._compared[subject, baseline] = compare(self.cells[subject], self.cells[baseline], slo)
        return self._compared[subject, baseline]

    def title(self, system: str) -> str:
        described = self.about.systems.get(system)
        return described.title if described and described.title else system

    def note(self, key: str) -> str | None:
        """The text under `key`, or under its longest prefix before a `/`."""
        while key:
            if key in self.notes:
                return self.notes[key]
            key = key.rpartition("/")[0]
        return None


def read_evidence(directory: Path) -> Evidence:
    """Read a run directory. Raises NothingMeasuredError, which says what is missing."""
    if not directory.is_dir():
        raise NothingMeasuredError(f"{directory}: no such directory; give the one that a run wrote into")
    runs = list(read_runs(directory / "runs.jsonl"))
    figures = read_figures(directory / "figures.jsonl")
    if not runs and not figures:
        raise NothingMeasuredError(
            f"{directory}: nothing measured yet: neither runs.jsonl nor figures.jsonl has a whole line"
        )
    about = directory / "run.json"
    conditions = _decoded(about, About) if about.is_file() else About()
    notes = read_notes(NOTES) | read_notes(directory / "notes.json")
    return Evidence(group(runs), figures, conditions, notes)


def read_figures(path: Path) -> tuple[Figure, ...]:
    """One per line; the last of a name in a part counts, and a line cut short does not."""
    figures: dict[tuple[str, str], Figure] = {}
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()] if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            figure = msgspec.json.decode(line, type=Figure)
        except msgspec.DecodeError as error:
            if number == len(lines):
                break
            raise NothingMeasuredError(f"{path}:{number}: not a figure: {error}") from error
        figures[figure.part, figure.name] = figure
    return tuple(figures.values())


def read_notes(path: Path) -> dict[str, str]:
    return _decoded(path, dict[str, str]) if path.is_file() else {}


def _decoded(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.convert(json.loads(path.read_text()), kind, strict=False)
    except ValueError as error:
        raise NothingMeasuredError(f"{path}: {error}; correct it or take it away") from error
