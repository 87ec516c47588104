"""Prints statistics of the workloads beside the published ones.

    python benchmark/show_workloads.py                         # sharegpt, loogle, react, random
    python benchmark/show_workloads.py loogle --requests 40 --scale 0.25 --questions 8
    python benchmark/show_workloads.py --requests 1000 --scale 1 --json > workloads.json

    python -m memserve.simulation.make_trace conversation --requests 200 -o trace.jsonl
    python benchmark/show_workloads.py trace --trace trace.jsonl --scale 0.125

Sends nothing. Sizes are the published ones times --scale; `off by` is the deviation of the workload. With
few requests the deviation may be large: a mean of 7 conversations is no statistic.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from memserve.core.errors import ConfigError
from workloads import NAMES, Settings, make, published
from workloads.statistics import compared, statistics_of, table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the statistics that the command line asks for; the exit status."""
    arguments = vars(_parser().parse_args(argv))
    names = arguments.pop("names")
    as_json = arguments.pop("json")
    arguments["vocabulary"] = tuple(arguments["vocabulary"])
    try:
        settings = Settings(**arguments)
        names = names or [name for name in NAMES if name != "trace" or settings.trace]
        report = {}
        for name in names:
            figures = statistics_of(make(name, settings))
            if as_json:
                report[name] = compared(figures, published(name, settings))
            else:
                print(table(name, figures, published(name, settings)), end="\n\n")
        if as_json:
            print(json.dumps(report, indent=1))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    ours = Settings()
    parser.add_argument(
        "names", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(NAMES)} (default: all; trace if given)"
    )
    for name, kind, help in (
        ("requests", int, "in all"),
        ("seed", int, "of all random draws"),
        ("scale", float, "tokens of a prompt here for one published"),
        ("max-context", int, "tokens that a prompt and its answer never exceed"),
        ("min-output", int, "tokens of an answer at least"),
        ("questions", int, "of loogle: about each document"),
        ("share-ratio", int, "of loogle: sessions that ask about one document"),
        ("block-tokens", int, "of trace: tokens per hash id, as it was written"),
    ):
        default = getattr(ours, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=kind, default=default, metavar="N", help=f"{help} (default: {default})"
        )
    parser.add_argument(
        "--output-scale", type=float, metavar="N", help="the same of an answer (default: --scale)"
    )
    parser.add_argument(
        "--vocabulary",
        type=int,
        nargs=2,
        default=ours.vocabulary,
        metavar=("FIRST", "END"),
        help="ids to draw tokens from, END not included (default: 10 250)",
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="in Mooncake's format")
    parser.add_argument("--json", action="store_true", help="for programs, in place of tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
