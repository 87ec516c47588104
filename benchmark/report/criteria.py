"""The criteria of the evaluation: the paper's gains, the project's aims, no loss to stock SGLang."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from report.evidence import Evidence
from report.measures import JUDGED
from report.summary import Comparison, Key

OURS = "pd-caching-3"
PAPER: dict[str, dict[str, float]] = {
    "sharegpt": {"ttft_mean": 0.58, "ttft_p99": 0.45, "jct_mean": 0.17, "jct_p99": 0.29},
    "loogle": {"ttft_mean": 0.56, "ttft_p99": 0.45, "jct_mean": 0.27, "jct_p99": 0.225},
    "react": {"ttft_mean": 0.78, "ttft_p99": 0.85, "jct_mean": 0.27, "jct_p99": 0.214},
}
"""How much lower with caching than PD-Basic, by workload. Source: MemServe (arXiv 2406.17565), evaluation."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """`OURS` must be lower than `against` by the share `reduction`, at the load `below`."""

    workload: str
    measure: str
    against: str
    reduction: float
    source: Literal["paper", "aim"]

    @property
    def key(self) -> str:
        """Where notes.json explains a miss."""
        return f"criteria/{self.workload}/{self.measure}/{self.against}"


@dataclass(frozen=True, slots=True)
class Judged:
    criterion: Criterion
    comparison: Comparison | None
    """None: not measured."""

    @property
    def met(self) -> bool | None:
        return None if self.comparison is None else -self.comparison.change >= self.criterion.reduction

    @property
    def clear(self) -> bool:
        """Whether the target is outside of the spread."""
        return self.comparison is not None and not self.comparison.ratio.holds(1 - self.criterion.reduction)


@dataclass(frozen=True, slots=True)
class Faceoff:
    """`subject` against one other system in one cell."""

    subject: Key
    other: Key
    comparisons: dict[str, Comparison]

    @property
    def worse(self) -> list[Comparison]:
        return [c for name in JUDGED if (c := self.comparisons.get(name)) and c.verdict == "worse"]

    @property
    def key(self) -> str:
        """Where notes.json explains a loss; a shorter key explains several."""
        cell = self.subject
        return f"cells/{self.other.system}/{cell.workload}/{cell.load or f'{cell.rate:g}'}"


CRITERIA = (
    *(
        Criterion(workload, measure, "pd-basic", gains[measure], "paper")
        for workload, gains in PAPER.items()
        for measure in ("ttft_mean", "ttft_p99", "jct_mean")
    ),
    Criterion("sharegpt", "ttft_mean", "pd-basic", 0.80, "aim"),
    Criterion("sharegpt", "ttft_p99", "pd-basic", 0.85, "aim"),
    Criterion("sharegpt", "ttft_mean", "pd-caching-2", 0.40, "aim"),
)


def judged(evidence: Evidence) -> list[Judged]:
    """Every criterion, in order; a workload is known by how its name begins."""
    return [Judged(one, _measured(evidence, one)) for one in CRITERIA]


def faceoffs(evidence: Evidence, part: str) -> list[Faceoff]:
    """The part's subject against each other system in every cell that both ran in."""
    subject = subject_of(evidence, part)
    keys = evidence.keys(part)
    return [
        Faceoff(ours, key, evidence.compared(ours, key))
        for key in keys
        if key.system != subject and subject and (ours := evidence.beside(key, subject))
    ]


def subject_of(evidence: Evidence, part: str) -> str:
    """Stated in run.json; else `OURS` if it is there or stock SGLang is; else the last system."""
    if any(key.system.startswith("stock") for key in evidence.keys(part)):
        return _stated(evidence, part, "subject") or OURS
    return _stated(evidence, part, "subject") or _present(evidence, part, OURS, last=True)


def baseline_of(evidence: Evidence, part: str) -> str:
    """Stated in run.json; else PD-Basic or stock PD if they are there; else the first system."""
    for name in ("pd-basic", "stock-pd"):
        if _present(evidence, part, name) == name:
            return _stated(evidence, part, "baseline") or name
    return _stated(evidence, part, "baseline") or _present(evidence, part, "")


def stock_faceoffs(evidence: Evidence) -> Iterator[Faceoff]:
    """`OURS` against stock SGLang, wherever both ran."""
    for part in evidence.parts():
        if subject_of(evidence, part) == OURS:
            yield from (one for one in faceoffs(evidence, part) if one.other.system.startswith("stock"))


def _measured(evidence: Evidence, criterion: Criterion) -> Comparison | None:
    for key in evidence.cells:
        if key.system == OURS and key.load == "below" and key.workload.lower().startswith(criterion.workload):
            other = evidence.beside(key, criterion.against)
            if other is not None:
                return evidence.compared(key, other).get(criterion.measure)
    return None


def _stated(evidence: Evidence, part: str, which: str) -> str:
    described = evidence.about.parts.get(part)
    name: str = getattr(described, which) if described else ""
    return name


def _present(evidence: Evidence, part: str, wanted: str, *, last: bool = False) -> str:
    systems = list(dict.fromkeys(key.system for key in evidence.keys(part)))
    if wanted in systems:
        return wanted
    return (systems[-1] if last else systems[0]) if systems else ""
