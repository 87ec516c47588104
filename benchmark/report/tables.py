"""Tables of the report as text, for HTML (by the template) and Markdown (here)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from report.agreement import Agreement
from report.criteria import OURS, Faceoff, Judged, baseline_of
from report.evidence import Evidence, Figure
from report.measures import JUDGED, MEASURES, number
from report.profile import profiles_of
from report.summary import Comparison, Estimate, Key

RESULTS = (*JUDGED, "throughput", "goodput", "reused_share", "kv_per_request")


class Field(NamedTuple):
    text: str
    small: str = ""
    """Beside it: mostly the range."""
    mark: str = ""
    """`better`, `worse`, `equal`, `unknown`, `met` or `missed`: a colour, never the only sign."""


MET = {True: Field("met", "", "met"), False: Field("missed", "", "missed"), None: Field("")}


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: list[list[Field]] = field(default_factory=list)
    caption: str = ""

    def markdown(self) -> str:
        head = ["| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        body = [
            "| " + " | ".join(" ".join(filter(None, one[:2])).replace("|", "/") for one in row) + " |"
            for row in self.rows
        ]
        return "\n".join([*head, *body])


def headline(evidence: Evidence) -> list[Table]:
    """Every system below saturation (or at the only load), a table per workload and part."""
    tables = []
    for rows in _headline_cells(evidence):
        workload, load, baseline = rows[0].workload, rows[0].load, baseline_of(evidence, rows[0].part)
        where = f"{load} saturation, " if load else ""
        caption = f"{workload}, {where}{_offered(rows[0].rate)}; marked against {evidence.title(baseline)}"
        names = (*JUDGED[:4], "tpot_mean", "reused_share")
        tables.append(_results(evidence, rows, names, caption, baseline))
    return tables


def profiles(evidence: Evidence) -> Table:
    """What the first tokens of the headline's cells are made of; a system's first part counts."""
    columns = (
        "workload",
        "system",
        "prompt, tokens",
        "computed",
        "of it",
        "TTFT mean, ms",
        "computing",
        "the rest",
    )
    table = Table(columns)
    cells: dict[tuple[str, str], Key] = {}
    for key in itertools.chain(*_headline_cells(evidence)):
        cells.setdefault((key.workload, key.system), key)
    for key, found in profiles_of({key: evidence.cells[key] for key in cells.values()}).items():
        figures = [
            number(found.prompt_tokens),
            number(found.computed_tokens),
            f"{found.computed_tokens / found.prompt_tokens:.0%}",
            *(number(1e3 * seconds) for seconds in (found.ttft_s, found.computing_s, found.rest_s)),
        ]
        table.rows.append([Field(key.workload), Field(evidence.title(key.system)), *map(Field, figures)])
    return table


def results(evidence: Evidence, part: str) -> list[Table]:
    """A table per workload and load."""
    keys = evidence.keys(part)
    tables = []
    for workload, rate, load in dict.fromkeys((key.workload, key.rate, key.load) for key in keys):
        some = [key for key in keys if (key.workload, key.rate, key.load) == (workload, rate, load)]
        caption = ", ".join(filter(None, (workload, f"{load} saturation" if load else "", _offered(rate))))
        tables.append(_results(evidence, some, RESULTS, caption, baseline_of(evidence, part)))
    return tables


def percentiles(evidence: Evidence, part: str) -> Table:
    """Mean, P50, P90 and P99 of all cells."""
    names = [name for name in MEASURES if name.startswith(("ttft", "jct", "tpot"))]
    table = Table(["workload", "load", "system", *(f"{MEASURES[name].title}, ms" for name in names)])
    for key in evidence.keys(part):
        found = evidence.summaries[key].estimates
        head = [Field(key.workload), Field(_load(key)), Field(evidence.title(key.system))]
        table.rows.append([*head, *(_estimate(name, found.get(name)) for name in names)])
    return table


def criteria(rows: Iterable[Judged], evidence: Evidence) -> Table:
    table = Table(["workload", "figure", f"{evidence.title(OURS)} against", "target", "measured", "verdict"])
    for row in rows:
        one = row.criterion
        source = "the paper" if one.source == "paper" else "our aim"
        target = Field(f"−{100 * one.reduction:.0f}%", f"({source})")
        table.rows.append(
            [
                Field(one.workload),
                Field(MEASURES[one.measure].title),
                Field(evidence.title(one.against)),
                target,
                _change(row.comparison, mark=False),
                _met(row),
            ]
        )
    return table


def matrix(faceoffs: Sequence[Faceoff], evidence: Evidence) -> Table:
    """The subject against every other system: rows by system and figure, a column per cell."""
    cells = list(
        dict.fromkeys((one.subject.workload, one.subject.rate, _load(one.subject)) for one in faceoffs)
    )
    found = {(one.other.system, one.subject.workload, one.subject.rate): one.comparisons for one in faceoffs}
    table = Table(["against", "figure", *(f"{workload} {load}" for workload, _, load in cells)])
    for other in dict.fromkeys(one.other.system for one in faceoffs):
        for nth, measure in enumerate(JUDGED):
            row = [
                _change(found.get((other, workload, rate), {}).get(measure)) for workload, rate, _ in cells
            ]
            head = Field(evidence.title(other), mark="group") if nth == 0 else Field("")
            table.rows.append([head, Field(MEASURES[measure].title), *row])
    return table


def losses(faceoffs: Iterable[Faceoff], evidence: Evidence) -> Table:
    """Cells in which the subject is worse, each with its cause as the notes have it."""
    table = Table(["workload", "load", "worse than", "in", "cause"])
    for one in faceoffs:
        if one.worse:
            figures = "; ".join(f"{MEASURES[c.measure].title} {_percent(c.change)}" for c in one.worse)
            cause = evidence.note(one.key) or f"not noted yet ({one.key})"
            table.rows.append(
                [
                    Field(one.subject.workload),
                    Field(_load(one.subject)),
                    Field(evidence.title(one.other.system)),
                    Field(figures, mark="worse"),
                    Field(cause),
                ]
            )
    return table


def figures(some: Sequence[Figure]) -> Table:
    """All figures of a part. Columns that nothing is in are left out."""
    table = Table(["figure", "value", "spread", "n", "baseline", "ratio", "promised", ""])
    for one in some:
        table.rows.append(
            [
                Field(one.name),
                Field("–" if one.value is None else number(one.value), one.unit),
                Field("" if not one.spread or one.n < 2 else f"{100 * one.spread:.0f}%"),
                Field(str(one.n)),
                Field("" if one.baseline is None else number(one.baseline)),
                Field("" if one.ratio is None else f"{number(one.ratio)}×"),
                Field(_promised(one)),
                MET[one.target_met],
            ]
        )
    kept = [n for n, _ in enumerate(table.columns) if n < 2 or any(row[n].text for row in table.rows)]
    return Table([table.columns[n] for n in kept], [[row[n] for n in kept] for row in table.rows])


def workloads(evidence: Evidence) -> Table:
    table = Table(["workload", "statistic", "ours", "published"])
    for name, statistics in evidence.about.workloads.items():
        for statistic, values in statistics.items():
            pair = list(values) if isinstance(values, list | tuple) else [values]
            ours, published = [*pair, None, None][:2]
            table.rows.append([Field(name), Field(statistic), Field(_plain(ours)), Field(_plain(published))])
    return table


def disagreements(found: Agreement) -> Table:
    table = Table(["what", "figure", "this run", "the other", "difference"])
    for pair in found.differing:
        measure = pair.measure
        table.rows.append(
            [
                Field(pair.what),
                Field(MEASURES[measure].title if measure else ""),
                _estimate(measure, pair.first),
                _estimate(measure, pair.second),
                Field(_percent(pair.change)),
            ]
        )
    return table


def _headline_cells(evidence: Evidence) -> list[list[Key]]:
    """The cells below saturation, or at the only load, of each workload in each part.

    Not of parts together: on a machine that others use too, only what was measured in turn compares.
    """
    found: dict[tuple[str, str], list[Key]] = {}
    for key in itertools.chain(*(evidence.keys(part) for part in ("steps", "stock"))):
        found.setdefault((key.part, key.workload), []).append(key)
    for place, some in found.items():
        load = "below" if any(key.load == "below" for key in some) else some[0].load
        found[place] = [key for key in some if key.load == load]
    return list(found.values())


def _results(
    evidence: Evidence, keys: Sequence[Key], names: Sequence[str], caption: str, baseline: str
) -> Table:
    """A row per system, marked against the baseline; figures that no system has are left out."""
    summaries = [evidence.summaries[key] for key in keys]
    shown = [name for name in names if any(name in one.estimates for one in summaries)]
    titles = [f"{MEASURES[name].title}, {MEASURES[name].unit}" for name in shown]
    table = Table(["system", *titles, "requests", "errors"], caption=caption)
    for key, summary in zip(keys, summaries, strict=True):
        other = evidence.beside(key, baseline) if baseline != key.system else None
        compared = evidence.compared(key, other) if other else {}
        row = [_estimate(name, summary.estimates.get(name), compared.get(name)) for name in shown]
        errors = Field(str(summary.errors), mark="worse" if summary.errors else "")
        counts = [Field(str(summary.requests), f"({summary.repeats} runs)"), errors]
        table.rows.append([Field(evidence.title(key.system)), *row, *counts])
    return table


def _estimate(name: str, estimate: Estimate | None, compared: Comparison | None = None) -> Field:
    if estimate is None:
        return Field("–")
    measure = MEASURES.get(name)
    show = measure.show if measure else number
    small = f"({show(estimate.low)}–{show(estimate.high)})" if estimate.n > 1 else ""
    return Field(show(estimate.value), small, compared.verdict if compared else "")


def _change(comparison: Comparison | None, *, mark: bool = True) -> Field:
    if comparison is None:
        return Field("–")
    ratio = comparison.ratio
    small = f"({_percent(ratio.low - 1)}…{_percent(ratio.high - 1)})" if ratio.n > 1 else ""
    return Field(_percent(comparison.change), small, comparison.verdict if mark else "")


def _promised(figure: Figure) -> str:
    """Of the ratio, or of the value where there is no baseline."""
    if figure.target is None:
        return ""
    side = "≈" if figure.target_met is None else "≥" if figure.higher_is_better else "≤"
    return f"{side} {figure.target:g}{'' if figure.ratio is None else '×'}"


def _met(row: Judged) -> Field:
    if row.met is None:
        return Field("not measured", "", "unknown")
    near = "" if row.clear else "(within the spread)"
    return Field("met", near, "met") if row.met else Field("missed", near, "missed")


def _percent(change: float) -> str:
    if change >= 9:
        return f"{change + 1:.0f}×"
    percent = round(100 * change)
    return f"{percent:+d}%".replace("-", "−") if percent else "±0%"


def _offered(rate: float) -> str:
    return f"{rate:.3g} requests/s offered" if rate else "each session after its answers"


def _load(key: Key) -> str:
    return key.load or f"{key.rate:g}/s"


def _plain(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(float(value))
    return "–" if value is None else str(value)
