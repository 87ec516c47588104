"""The report as one self-contained HTML file: its contents and their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import jinja2
from markupsafe import Markup

from report import tables
from report.agreement import Agreement
from report.criteria import Faceoff, Judged, baseline_of, faceoffs, judged, stock_faceoffs, subject_of
from report.evidence import Evidence
from report.figure_plots import figure_plots
from report.measures import JUDGED, MEASURES
from report.plots import distributions, rates, reductions, reuse
from report.summary import FEWEST_REPEATS
from report.tables import Table

KNOWN_PARTS = {
    "steps": (
        "Caching steps",
        "The paper's end-to-end comparison: one colocated server without and with its cache, prefill and "
        "decode apart without any cache (PD-Basic), then with prefill's cache (1), decode's too (2), and "
        "decode's KV returned to prefill (3). Same model, same requests, same machine.",
    ),
    "stock": (
        "Against stock SGLang",
        "What a user would run instead: SGLang's own prefill and decode servers behind sglang-router, as "
        "they come, with a radix cache at decode, and with HiCache offloading to a shared store.",
    ),
    "policies": (
        "Routing policies",
        "The same servers under the same requests; only the rule differs by which the router picks a "
        "prefill server.",
    ),
    "micro": (
        "The parts by themselves",
        "The memory, index and transfer calls, measured alone against what they are made of: memmove, a "
        "socket, a dict, recomputing.",
    ),
    "scale": (
        "Scale, simulated",
        "The router's own policy and tree code over simulated instances, whose speed is the fitted cost "
        "model's. Simulated, not measured: the deviation from a real small cluster is among the figures.",
    ),
    "overheads": (
        "Overheads",
        "What the pool, the checksums, the events and the router each cost when nothing is shared, so that "
        "nothing can be gained.",
    ),
}


@dataclass(frozen=True)
class Section:
    """A part, ready to be shown; what it does not have is empty."""

    name: str
    title: str
    what: str
    note: str | None
    subject: str
    baseline: str
    plots: list[Markup]
    matrix: Table | None
    losses: Table | None
    worse_note: str | None
    compared: int
    by_chance: str
    """How many of `compared` would be called worse if systems were equal."""
    results: list[Table]
    percentiles: Table | None
    figures: Table | None
    missed: list[str]


@dataclass(frozen=True)
class Tally:
    """A judged total in one line."""

    title: str
    good: int
    total: int


def render(evidence: Evidence, agreement: Agreement | None = None) -> str:
    """HTML. Parts of which nothing was measured are left out."""
    rows = judged(evidence) if any(key.part == "steps" for key in evidence.cells) else []
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.j2").render(
        about=evidence.about,
        conditions=conditions(evidence),
        workloads=tables.workloads(evidence),
        summary=evidence.note("summary"),
        limits=evidence.note("limits"),
        tallies=tallies(evidence, rows),
        criteria=tables.criteria(rows, evidence) if rows else None,
        missed=explanations(evidence, rows),
        headline=tables.headline(evidence),
        profiles=tables.profiles(evidence),
        sections=[section(evidence, part) for part in evidence.parts()],
        agreement=agreement,
        disagreements=tables.disagreements(agreement) if agreement else None,
        errors=sum(summary.errors for summary in evidence.summaries.values()),
        requests=sum(summary.requests for summary in evidence.summaries.values()),
        fewest=FEWEST_REPEATS,
    )


def section(evidence: Evidence, part: str) -> Section:
    described = evidence.about.parts.get(part)
    title, what = KNOWN_PARTS.get(part, (part, ""))
    keys = evidence.keys(part)
    some = [figure for figure in evidence.figures if figure.part == part]
    against = faceoffs(evidence, part)
    drawn = [draw(evidence, part) for draw in (rates, reductions, distributions, reuse) if keys]
    lost = tables.losses(against, evidence)
    repeats = [one.comparisons[name].ratio.n for one in against for name in JUDGED if name in one.comparisons]
    return Section(
        name=part,
        title=(described and described.title) or title,
        what=(described and described.what) or what,
        note=evidence.note(f"parts/{part}"),
        subject=evidence.title(subject_of(evidence, part)) if keys else "",
        baseline=evidence.title(baseline_of(evidence, part)) if keys else "",
        plots=[Markup(svg) for svg in (*drawn, *figure_plots(part, some)) if svg],
        matrix=tables.matrix(against, evidence) if against else None,
        losses=lost if against else None,
        worse_note=evidence.note(f"worse/{part}"),
        compared=len(repeats),
        by_chance=f"{sum(0.5**n for n in repeats if n >= FEWEST_REPEATS):.0f}",
        results=tables.results(evidence, part),
        percentiles=tables.percentiles(evidence, part) if keys else None,
        figures=tables.figures(some) if some else None,
        missed=[figure.name for figure in some if figure.target_met is False],
    )


def tallies(evidence: Evidence, rows: list[Judged]) -> list[Tally]:
    """The summary for a reader in a hurry."""
    found = []
    for source, title in (
        ("paper", "of the paper's gains are reached"),
        ("aim", "of our own aims are reached"),
    ):
        some = [row for row in rows if row.criterion.source == source]
        if some:
            found.append(Tally(title, sum(row.met is True for row in some), len(some)))
    stock = [one for one in stock_faceoffs(evidence) if one.comparisons]
    if stock:
        title = "cells (stock system, workload, load) in which ours is worse in nothing"
        found.append(Tally(title, sum(not one.worse for one in stock), len(stock)))
    promised = [figure for figure in evidence.figures if figure.target_met is not None]
    if promised:
        title = "single figures reach what was promised of them"
        found.append(Tally(title, sum(figure.target_met is True for figure in promised), len(promised)))
    return found


def explanations(evidence: Evidence, rows: list[Judged]) -> list[tuple[str, str]]:
    """Every missed criterion with its cause, or the key under which notes.json may have it."""
    found = []
    for row in rows:
        if row.met is False:
            one = row.criterion
            what = f"{one.workload}, {MEASURES[one.measure].title} against {evidence.title(one.against)}"
            what += f", −{100 * one.reduction:.0f}%"
            found.append((what, evidence.note(one.key) or f"not noted yet ({one.key})"))
    return found


def unexplained(evidence: Evidence) -> list[str]:
    """Keys that notes.json lacks: missed criteria and losing cells without a cause."""
    keys = [row.criterion.key for row in judged(evidence) if row.met is False]
    lost: list[Faceoff] = [one for part in evidence.parts() for one in faceoffs(evidence, part) if one.worse]
    return [key for key in dict.fromkeys([*keys, *(one.key for one in lost)]) if not evidence.note(key)]


def conditions(evidence: Evidence) -> list[tuple[str, list[tuple[str, str]]]]:
    """Machine, versions, model and settings, as name and value."""
    about = evidence.about
    what = {
        "machine": about.machine or _machines(evidence),
        "commit": about.commit or ", ".join(sorted({f.commit for f in evidence.figures if f.commit})),
        "model": about.model,
        "begun": about.begun,
        "ended": about.ended,
        "processor time that others on the host got": _stolen(evidence),
    }
    groups: Mapping[str, Mapping[str, object]] = {
        "Run": {name: value for name, value in what.items() if value},
        "Versions": about.versions,
        "Settings": about.settings,
        "Saturation": {name: _rate(value) for name, value in about.saturation.items()},
    }
    return [(title, list(_flat(values))) for title, values in groups.items() if values]


def _machines(evidence: Evidence) -> str:
    return "; ".join(sorted({figure.machine for figure in evidence.figures if figure.machine}))


def _stolen(evidence: Evidence) -> str:
    shares = [run.stolen for runs in evidence.cells.values() for run in runs if run.stolen is not None]
    if not shares:
        return ""
    return f"{median(shares):.1%} of what a run wanted (median), {max(shares):.1%} at most"


def _rate(value: object) -> object:
    return f"{value:.3g} requests/s" if isinstance(value, int | float) else value


def _flat(values: Mapping[str, object], above: str = "") -> list[tuple[str, str]]:
    """Nested settings, a line each, names joined by dots."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{above}{name}.")
        elif isinstance(value, list | tuple):
            found.append((f"{above}{name}", ", ".join(map(str, value))))
        else:
            found.append((f"{above}{name}", str(value)))
    return found
