"""One HTML file from what a run of the evaluation wrote; its headline tables as Markdown on stdout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # Run as a program: its own folder is on the path, and not the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from report import tables
from report.agreement import agreement_of
from report.criteria import judged
from report.evidence import Evidence, NothingMeasuredError, read_evidence
from report.page import render, unexplained

REPORT = "report.html"
TEACHING = """\
DIR holds what a run wrote; at least one of the first two must have a line:
  runs.jsonl     requests of serving runs, a load.records.Run per line
  figures.jsonl  single figures, as benchmark/figures.py prints them, each with its "part"
  run.json       conditions: machine, commit, versions, model, settings (with "slo":
                 {"ttft_s": 1, "tpot_s": 0.1} for goodput), workloads, systems, parts, …
  notes.json     prose by key, over what benchmark/report/notes.json has:
                   summary, limits, parts/PART, worse/PART,
                   criteria/WORKLOAD/FIGURE/AGAINST   why a target was missed
                   cells/SYSTEM/WORKLOAD/LOAD         why a cell loses to SYSTEM
                 a shorter key (cells/SYSTEM) explains all under it. Keys that
                 are wanted and lacking are listed on stderr.

examples:
  python benchmark/report/make.py results/first
  python benchmark/report/make.py results/first -o report.html --against results/second
"""


def make_report(directory: Path, output: Path | None = None, against: Path | None = None) -> Evidence:
    """Write the report of a run directory, by default to its report.html; what it was made from.

    Raises NothingMeasuredError if either directory has nothing to report.
    """
    evidence = read_evidence(directory)
    found = agreement_of(evidence, read_evidence(against)) if against else None
    (output or directory / REPORT).write_text(render(evidence, found), encoding="utf-8")
    return evidence


def headline_markdown(evidence: Evidence) -> str:
    """Criteria, and every system below saturation: what a README shows."""
    rows = judged(evidence)
    measured = any(row.comparison for row in rows)
    parts = [tables.criteria(rows, evidence).markdown()] if measured else []
    for table in tables.headline(evidence):
        parts += [f"**{table.caption}**", table.markdown()]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=TEACHING, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: DIR/report.html")
    parser.add_argument(
        "--against", type=Path, metavar="DIR2", help="a second run: say whether the two agree"
    )
    arguments = parser.parse_args()
    try:
        evidence = make_report(arguments.directory, arguments.output, arguments.against)
    except NothingMeasuredError as error:
        sys.exit(str(error))
    print(headline_markdown(evidence))
    for key in unexplained(evidence):
        print(f"notes.json has no cause for: {key}", file=sys.stderr)
    print(f"report: {arguments.output or arguments.directory / REPORT}", file=sys.stderr)


if __name__ == "__main__":
    main()
