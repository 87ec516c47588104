"""The outcomes of the requests of each fault, as a table and as JSON lines."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .answers import Answer, Outcome

SHOWN = 3


@dataclass(slots=True)
class Row:
    """One fault and its requests."""

    stage: str
    kind: str
    target: str
    sent: int = 0
    right: int = 0
    error: int = 0
    left: int = 0
    lost: int = 0
    recovered_s: float | None = None
    """From the fault's end until every worker had answered right; None: not in time."""
    leaked: int = 0
    notes: list[str] = field(default_factory=list)

    def count(self, answers: Sequence[Answer], *, router_dies: bool) -> None:
        """Add the ends of these requests. A broken connection is clear only where the router itself dies."""
        ends = Counter(answer.outcome for answer in answers)
        self.sent = len(answers)
        self.right, self.left = ends[Outcome.RIGHT], ends[Outcome.LEFT]
        clear = {Outcome.ERROR, Outcome.BROKEN} if router_dies else {Outcome.ERROR}
        self.error = sum(ends[one] for one in clear)
        self.lost = self.sent - self.right - self.left - self.error
        bad = [one for one in answers if one.outcome not in (Outcome.RIGHT, Outcome.LEFT, *clear)]
        self.notes += [f"lost: {one.why}" for one in bad[:SHOWN]]
        self.notes += [f"error: {why} ({n})" for why, n in _common(answers, clear)]

    @property
    def is_good(self) -> bool:
        """No request was lost, nothing leaked, and all workers recovered."""
        return not self.lost and not self.leaked and self.recovered_s is not None


def _common(answers: Sequence[Answer], outcomes: set[Outcome]) -> list[tuple[str, int]]:
    return Counter(one.why for one in answers if one.outcome in outcomes).most_common(SHOWN)


def table(rows: Sequence[Row]) -> str:
    """All rows, with their sums."""
    head = ("stage", "fault", "at", "sent", "right", "error", "left", "lost", "recovered s", "leaked")
    lines = [
        (one.stage, one.kind, one.target, *_numbers(one), _seconds(one.recovered_s), str(one.leaked))
        for one in rows
    ]
    sums = [sum(int(line[i]) for line in lines) for i in (3, 4, 5, 6, 7, 9)]
    slowest = max((one.recovered_s for one in rows if one.recovered_s is not None), default=None)
    kinds = len({one.kind for one in rows})
    lines.append(
        ("", f"{len(rows)} faults of {kinds} kinds", "", *map(str, sums[:5]), _seconds(slowest), str(sums[5]))
    )
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *lines)
    )


def json_lines(rows: Sequence[Row]) -> str:
    """One object per row."""
    return "\n".join(json.dumps(dataclasses.asdict(one)) for one in rows)


def _numbers(row: Row) -> tuple[str, ...]:
    return tuple(str(n) for n in (row.sent, row.right, row.error, row.left, row.lost))


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
