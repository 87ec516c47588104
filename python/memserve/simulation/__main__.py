"""`python -m memserve.simulation`: tries routing policies on a trace."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from memserve.core.errors import ConfigError
from memserve.scheduling.cost_model.file import read_costs
from memserve.scheduling.cost_model.model import CostModel
from memserve.scheduling.policies import describe_policies
from memserve.simulation.report import Goal, figures, ideal_load
from memserve.simulation.simulation import SimulationConfig, simulate
from memserve.simulation.traces import BLOCK_TOKENS, Request, Trace, read_trace

HELP = """\
Replays a trace against simulated instances, with the router's prompt tree, policies and cost model.
The last line on stdout is one JSON object; progress goes to stderr.

A trace has one request per line, in the format of Mooncake's published traces:
  {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [0, 46, 47, ...]}
timestamp in ms; one hash id per 512 tokens, the last block partial; equal ids mean equal prefixes.
`python -m memserve.simulation.make_trace` writes such files.
"""

EXAMPLES = """\
modes:
  Without --timed nothing takes time: prompts are cached at once, and the load of an instance is the work
  placed there in the last 180 s. This mode shows hits and balance. With --timed the cost model gives the
  time of each prefill, transfer and decode step: this mode shows latency. --load 0.9 sets the arrival
  times so that the work an *ideal* cache would leave keeps the prefills busy for 90% of the time.

reading the result:
  block_hit_ratio   share of blocks that were cached where their prompt was computed; ideal_hit_ratio is
                    its upper bound
  work_imbalance    computed tokens, the busiest instance over the mean; 1 is even
  fetched_ratio     share of blocks moved between instances because that beats computing them (Eq. 2)
  goodput_per_s     requests per second that met --ttft-goal and --token-goal

examples:
  python -m memserve.simulation.make_trace conversation > trace.jsonl
  python -m memserve.simulation --trace trace.jsonl --instances 8 --capacity 3000000
  python -m memserve.simulation --trace trace.jsonl --instances 8 --policy round_robin
  python -m memserve.simulation --trace trace.jsonl --instances 8 --timed --load 0.9 --plots out/
  python -m memserve.simulation --trace trace.jsonl --instances 3 --decodes 1 --timed
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the simulation that the command line describes; the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    trace = read_trace(arguments.trace, arguments.block_tokens)
    costs = read_costs(arguments.costs)
    config = SimulationConfig(
        instances=arguments.instances,
        decodes=arguments.decodes,
        capacity_tokens=arguments.capacity,
        policy=arguments.policy,
        decode_policy=arguments.decode_policy,
        timed=arguments.timed,
        can_fetch=arguments.fetch,
        speed=_speed(arguments, trace, costs),
        staleness_s=arguments.staleness,
        event_loss=arguments.event_loss,
        cost_error=arguments.cost_error,
        seed=arguments.seed,
    )
    draw = _plotter(arguments.plots)
    outcome = simulate(trace, config, costs, _counted(trace.requests, quiet=arguments.quiet))
    result = figures(outcome, costs, Goal(arguments.ttft_goal, arguments.token_goal))
    for path in draw(outcome) if draw else ():
        print(f"wrote {path}", file=sys.stderr)
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(result).items()}
    print(json.dumps(rounded), flush=True)


def _speed(arguments: argparse.Namespace, trace: Trace, costs: CostModel) -> float:
    if arguments.load is None:
        return float(arguments.speed)
    if not arguments.timed:
        raise ConfigError("--load needs --timed: without it nothing takes time")
    if not arguments.load > 0 or not trace.duration_s:
        raise ConfigError("--load has to be above 0, and needs a trace with a duration")
    return float(arguments.load / ideal_load(trace, costs, max(arguments.instances, 1)))


def _plotter(folder: Path | None) -> Callable[..., list[Path]] | None:
    """The function that draws plots. Checks for its package before the simulation, not after."""
    if folder is None:
        return None
    from memserve.simulation.plots import check_plots, draw_plots

    check_plots(folder)
    return lambda outcome: draw_plots(outcome, folder)


def _counted(requests: Sequence[Request], *, quiet: bool) -> Iterable[Request]:
    """The requests, with a progress bar on stderr unless `quiet`."""
    if quiet:
        return requests
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar: pip install 'memserve[plots]'", file=sys.stderr)
        return requests
    bar: Iterable[Request] = tqdm(requests, desc="simulating", unit=" requests", file=sys.stderr)
    return bar


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m memserve.simulation",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--trace", type=Path, required=True, metavar="FILE", help="requests, one JSON object per line"
    )
    parser.add_argument(
        "--block-tokens",
        type=int,
        default=BLOCK_TOKENS,
        metavar="N",
        help="tokens per block of the trace (default: 512)",
    )
    _add_cluster_flags(parser)
    _add_routing_flags(parser)
    _add_time_flags(parser)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of all random draws (default: 0)"
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw PNG files into DIR")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    cluster = parser.add_argument_group("the cluster")
    cluster.add_argument(
        "--instances", type=int, default=4, metavar="N", help="prefill instances (default: 4)"
    )
    cluster.add_argument(
        "--decodes",
        type=int,
        default=0,
        metavar="N",
        help="decode instances; 0: every instance does prefill and decode (default: 0)",
    )
    cluster.add_argument(
        "--capacity", type=int, metavar="TOKENS", help="cache size of each instance (default: unlimited)"
    )
    cluster.add_argument(
        "--costs",
        default="gpu",
        metavar="gpu|cpu|FILE",
        help="the cost model; FILE is an output of benchmark/fit_cost_model.py (default: gpu)",
    )


def _add_routing_flags(parser: argparse.ArgumentParser) -> None:
    routing = parser.add_argument_group("routing")
    routing.add_argument(
        "--policy",
        default="prompt_tree",
        metavar="NAME",
        help=f"{describe_policies()}; or MODULE:FUNCTION (default: prompt_tree)",
    )
    routing.add_argument(
        "--decode-policy", default="prompt_tree", metavar="NAME", help="for decodes (default: prompt_tree)"
    )
    routing.add_argument(
        "--fetch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fetch KV from other instances where Eq. 2 favours it",
    )
    routing.add_argument(
        "--staleness",
        type=float,
        default=0.0,
        metavar="S",
        help="delay of the cache events, in seconds (default: 0)",
    )
    routing.add_argument(
        "--event-loss",
        type=float,
        default=0.0,
        metavar="P",
        help="share of the cache events that are lost (default: 0)",
    )
    routing.add_argument(
        "--cost-error",
        type=float,
        default=1.0,
        metavar="X",
        help="with --timed: the router's first estimate of prefill costs is X times too high (default: 1)",
    )


def _add_time_flags(parser: argparse.ArgumentParser) -> None:
    time = parser.add_argument_group("time")
    time.add_argument(
        "--timed", action="store_true", help="simulate the time of prefills, transfers and decode steps"
    )
    clock = time.add_mutually_exclusive_group()
    clock.add_argument(
        "--speed",
        type=float,
        default=1.0,
        metavar="X",
        help="arrivals are X times faster than in the trace (default: 1)",
    )
    clock.add_argument(
        "--load", type=float, metavar="L", help="use the speed that gives this load; 1 is full"
    )
    time.add_argument(
        "--ttft-goal",
        type=float,
        default=10.0,
        metavar="S",
        help="time to first token that counts as good (default: 10)",
    )
    time.add_argument(
        "--token-goal",
        type=float,
        default=0.05,
        metavar="S",
        help="time between tokens that counts as good (default: 0.05)",
    )


if __name__ == "__main__":
    sys.exit(main())
