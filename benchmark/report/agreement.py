"""Agreement of two runs of the evaluation, within the spread that each states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from report.evidence import Evidence, Figure, read_evidence
from report.measures import MEASURES
from report.summary import Estimate, Key

Estimates = dict[tuple[str, str], Estimate]
"""By what was measured and which figure of it."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A figure that both runs have."""

    what: str
    """Part, system, workload and load; or part and name."""
    measure: str
    first: Estimate
    second: Estimate

    @property
    def agrees(self) -> bool | None:
        """Whether one's value is within the other's range; None if they differ and neither states one."""
        if self.first.holds(self.second.value) or self.second.holds(self.first.value):
            return True
        if self.first.n < 2 and self.second.n < 2:
            return None
        return False

    @property
    def change(self) -> float:
        """The second over the first, less one."""
        return self.second.value / self.first.value - 1 if self.first.value else float("inf")


@dataclass(frozen=True, slots=True)
class Agreement:
    pairs: tuple[Pair, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    @property
    def agreeing(self) -> int:
        return sum(pair.agrees is True for pair in self.pairs)

    @property
    def differing(self) -> list[Pair]:
        """The largest difference first."""
        return sorted((p for p in self.pairs if p.agrees is False), key=lambda p: -abs(p.change))

    @property
    def unstated(self) -> int:
        """They differ, but were measured once: undecided."""
        return sum(pair.agrees is None for pair in self.pairs)


def agreement(first: Path, second: Path) -> Agreement:
    """Hold two run directories against each other. Raises NothingMeasuredError as `read_evidence` does."""
    return agreement_of(read_evidence(first), read_evidence(second))


def agreement_of(first: Evidence, second: Evidence) -> Agreement:
    ours, theirs = _estimates(first), _estimates(second)
    pairs = tuple(
        Pair(*name, ours[name], theirs[name])
        for name in ours
        if name in theirs and (ours[name].value or theirs[name].value)
    )
    return Agreement(pairs, _only(ours, theirs), _only(theirs, ours))


def _estimates(evidence: Evidence) -> Estimates:
    found = {
        (_where(key), name): summary.estimates[name]
        for key, summary in evidence.summaries.items()
        for name in MEASURES
        if name in summary.estimates
    }
    for figure in evidence.figures:
        if figure.value is not None:
            found[f"{figure.part}: {figure.name}", ""] = _estimate(figure, figure.value)
    return found


def _where(key: Key) -> str:
    """Rates follow from a measured saturation and differ from run to run; loads do not."""
    return f"{key.part}: {key.system}, {key.workload}, {key.load or f'{key.rate:g} req/s'}"


def _estimate(figure: Figure, value: float) -> Estimate:
    """A figure states how wide its range is, not where it lies."""
    reach = abs(value) * (figure.spread or 0.0)
    return Estimate(value, value - reach, value + reach, figure.n)


def _only(some: Estimates, others: Estimates) -> tuple[str, ...]:
    there = {what for what, _ in others}
    return tuple(dict.fromkeys(what for what, _ in some if what not in there))
