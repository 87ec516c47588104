"""Load on servers and routers that run already, side by side: time to first token, to the last, between.

    python benchmark/bench_serving.py ours=http://127.0.0.1:30000 --rate 2 4
    python benchmark/bench_serving.py ours=http://127.0.0.1:30000 theirs=http://127.0.0.1:8000 --rate 4
    python benchmark/bench_serving.py ours=http://127.0.0.1:30000 --concurrency 8
    python benchmark/bench_serving.py ours=http://127.0.0.1:30000 --trace conversation.jsonl --speed 0.1

Anything with SGLang's /generate will do: MemServe's router, sglang-router, a server alone. Targets take
turns, run by run, so that they share each moment of the machine; caches are flushed before each run.
DIR gets runs.jsonl (a line per run, all its requests in it) and report.html; the same DIR goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from bench_model import FIRST_TOKEN, ROOT, VOCABULARY
from evaluation.conditions import write_conditions
from evaluation.grid import RUNS
from figures import commit, machine, progress
from load.address import Address
from load.plan import Plan, closed_loop, open_loop, traced
from load.records import Cell, Outcome, read_runs, write_run
from load.run import run_once
from memserve.core.errors import ConfigError
from report.make import make_report
from report.summary import Slo, group, summarize
from workloads import NAMES, Settings, make

PART = "serving"


def main() -> None:
    args = parser().parse_args()
    try:
        targets = [target_of(text, flushes=not args.keep_caches) for text in args.targets]
        base = settings_of(args)
        cells = list(cells_of(args, [target.name for target in targets]))
        run(args, {target.name: target for target in targets}, base, cells)
    except (ConfigError, ValueError) as error:
        sys.exit(f"bench_serving: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; the same command goes on where it was ({args.output})")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="+", metavar="NAME=URL", help="servers to load; several take turns")
    how = parser.add_argument_group("when requests come")
    which = how.add_mutually_exclusive_group()
    poisson = "requests per second, Poisson, in the order of each session (default: 1)"
    which.add_argument("--rate", type=float, nargs="+", default=[1.0], metavar="R", help=poisson)
    closed = "closed loop: so many sessions at once, each turn right after the answer"
    which.add_argument("--concurrency", type=int, nargs="+", metavar="N", help=closed)
    which.add_argument("--trace", type=Path, metavar="FILE", help="Mooncake's format, at its own times")
    how.add_argument("--speed", type=float, default=1.0, help="of the trace: 2 is twice as fast")
    how.add_argument("--active", type=int, default=8, metavar="N", help="sessions at once, with --rate")
    what = parser.add_argument_group("what they are (see show_workloads.py)")
    what.add_argument("--workload", choices=[name for name in NAMES if name != "trace"], default="sharegpt")
    what.add_argument("--requests", type=int, default=60, help="of a run (default: %(default)s)")
    what.add_argument("--scale", type=float, default=0.25, help="tokens of a prompt for one published")
    what.add_argument("--output-scale", type=float, help="tokens of an answer (default: as --scale)")
    what.add_argument("--max-context", type=int, default=32768, metavar="TOKENS")
    what.add_argument("--vocabulary", type=int, nargs=2, default=[FIRST_TOKEN, VOCABULARY],
                      metavar=("FIRST", "END"), help="token ids to draw from")  # fmt: skip
    what.add_argument("--seed", type=int, default=0, help="of the first repeat; each has its own")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--repeats", type=int, default=5, help="of each cell (default: %(default)s)")
    measuring.add_argument("--warmup", type=int, default=4, metavar="N",
                           help="first requests of a run, in no figure (default: %(default)s)")  # fmt: skip
    measuring.add_argument("--keep-caches", action="store_true", help="do not flush before each run")
    measuring.add_argument(
        "--slo-ttft", type=float, default=1.0, metavar="S", help="for goodput: first token"
    )
    measuring.add_argument("--slo-tpot", type=float, default=0.1, metavar="S", help="for goodput: per token")
    measuring.add_argument("-o", "--output", type=Path, default=ROOT / "results" / "serving", metavar="DIR")
    return parser


def target_of(text: str, *, flushes: bool) -> Address:
    """NAME=URL."""
    name, equals, url = text.partition("=")
    if not equals or not name or not url.startswith(("http://", "https://")):
        raise ConfigError(f"{text!r} is no target: write NAME=URL, as in ours=http://127.0.0.1:30000")
    return Address(name, url, flushes=flushes)


def settings_of(args: argparse.Namespace) -> Settings:
    low, high = args.vocabulary
    return Settings(
        requests=args.requests,
        seed=args.seed,
        scale=args.scale,
        output_scale=args.output_scale,
        max_context=args.max_context,
        vocabulary=(low, high),
        trace=args.trace,
    )


def cells_of(args: argparse.Namespace, names: list[str]) -> Iterator[Cell]:
    """The first system of one repeat is the last of the next."""
    workload = args.workload if args.trace is None else "trace"
    loads = [(0.0, f"{n} at once") for n in args.concurrency or ()]
    loads = loads or ([(0.0, "trace")] if args.trace else [(rate, "") for rate in args.rate])
    for repeat in range(args.repeats):
        for rate, load in loads:
            for name in names[::-1] if repeat % 2 else names:
                yield Cell(PART, name, workload, rate, load, repeat)


def plan_of(cell: Cell, args: argparse.Namespace, base: Settings) -> Plan:
    workload = make(cell.workload, replace(base, seed=base.seed + cell.repeat))
    if cell.load == "trace":
        return traced(workload, args.speed, args.warmup)
    if cell.load:
        return closed_loop(workload, int(cell.load.split()[0]), args.warmup)
    return open_loop(workload, cell.rate, args.active, cell.repeat, args.warmup)


def run(args: argparse.Namespace, targets: dict[str, Address], base: Settings, cells: list[Cell]) -> None:
    """What is not done yet, then the report."""
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / RUNS
    slo = Slo(args.slo_ttft, args.slo_tpot)
    said = {"slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}, "command": " ".join(sys.argv[1:])}
    write_conditions(args.output, machine=machine(), commit=commit(), settings=said)
    done = {run.cell for run in read_runs(path)}
    left = [cell for cell in cells if cell not in done]
    with tqdm(total=len(left) * args.requests, unit=" requests", mininterval=1) as bar:
        for cell in left:
            bar.set_description(f"{cell.system} {cell.load or f'{cell.rate:g}/s'}")

            def count(_: Outcome) -> None:
                bar.update()

            write_run(path, run_once(targets[cell.system], cell, plan_of(cell, args, base), count))
    for key, runs in group(read_runs(path)).items():
        summary = summarize(runs, slo)
        values = " ".join(f"{name}={one.value:.4g}" for name, one in summary.estimates.items())
        print(
            f"{key.system} {key.workload} {key.load or f'{key.rate:g}/s'}: {values} errors={summary.errors}"
        )
    make_report(args.output)
    progress(f"wrote {args.output / 'report.html'}")


if __name__ == "__main__":
    main()
