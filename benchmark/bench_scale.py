"""Many instances: what routing is worth there, in simulation, and what one router carries.

    python benchmark/bench_scale.py [--quick] [--costs FILE] [--trace FILE]
    python benchmark/bench_scale.py --check-real [--quick]

*Policies at scale.* The simulator (memserve.simulation) runs the router's own tree, cost model,
load tracker and policies over a conversation-like trace, or --trace in Mooncake's format, with colocated
instances of --capacity tokens. Every number of instances gets the same load for each instance: the
trace's clock runs so that the work an ideal cache would leave keeps them busy for --load of the time.
Costs are --costs (a file that fit_cost_model.py wrote for a live instance; gpu and cpu are guesses).
A simulated request costs time in proportion to the instances, so that large clusters get fewer of
them: --per-instance for each instance, but no more than --most in all. `requests` says how many
there were, `speed` by how much the ten minutes of the trace, pauses between turns too, are shortened.
Small clusters are simulated over several traces; spread is between these.

    scale/64_instances/prompt_tree/ttft_mean     s; also ttft_p99, hit_ratio (of blocks), imbalance (the
    scale/64_instances/requests                  busiest instance's computed tokens over the mean)

*One router* (see scale_router.py): what a decision costs, by instances and blocks in its tree, on one
core of this machine; events a second; memory; and from these the largest cluster.

    scale/router/1000_instances/1000000_blocks/decision     us of processor; also decision_p99
    scale/router/1000_instances/1000000_blocks/events       blocks/s; .../tree_memory in MiB
    scale/router/largest_cluster/1_requests_per_s           instances, at that rate for each instance

*--check-real* does only this: how far off is the simulator? See scale_check.py.

--quick takes about a minute and a half, the default three to four (both cores), --check-real five.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

import scale_router
from figures import progress, report
from memserve.core.errors import ConfigError
from memserve.scheduling.cost_model.file import read_costs
from memserve.scheduling.policies import find_policy
from memserve.simulation.make_trace import Shape, conversation
from memserve.simulation.report import Figures, figures, ideal_load
from memserve.simulation.simulation import SimulationConfig, simulate
from memserve.simulation.traces import Trace, parse_trace, read_trace

INSTANCES = (8, 16, 64, 256, 1000)
POLICIES = ("round_robin", "least_load", "session", "longest_prefix", "prompt_tree")
"""The first is the others' baseline."""
NATURAL_S = 600.0
"""How long the trace takes by its own clock."""
SEVERAL = 64
"""Clusters up to this size are simulated over `SEEDS` traces."""
SEEDS = 3
UNITS = {"ttft_mean": "s", "ttft_p99": "s", "hit_ratio": "of blocks", "imbalance": "most over mean"}


@dataclass(frozen=True, slots=True)
class Job:
    """One simulation."""

    instances: int
    policy: str
    seed: int
    requests: int
    load: float
    capacity_tokens: int
    costs: str
    path: Path | None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests, fewer blocks in the tree")
    parser.add_argument("--instances", type=int, nargs="+", default=INSTANCES, metavar="N")
    parser.add_argument("--policies", nargs="+", default=POLICIES, metavar="POLICY")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="default: conversation of make_trace")
    parser.add_argument("--costs", default="gpu", metavar="gpu|cpu|FILE", help="(default: gpu)")
    parser.add_argument(
        "--load", type=float, default=0.7, help="1 is full, with an ideal cache (default: 0.7)"
    )
    parser.add_argument("--capacity", type=int, default=3_000_000, metavar="TOKENS", help="of an instance")
    parser.add_argument("--per-instance", type=int, metavar="N", help="requests (default: 120; --quick: 60)")
    parser.add_argument("--most", type=int, metavar="N", help="requests (default: 8000; --quick: 2500)")
    parser.add_argument("--check-real", action="store_true", help="the simulator against real servers, only")
    parser.add_argument("--model-path", type=Path, help="of --check-real; default: the bench model")
    args = parser.parse_args()
    if args.check_real:
        import scale_check

        scale_check.run(args.model_path, quick=args.quick)
        return
    try:
        read_costs(args.costs)
        if args.trace is not None:
            read_trace(args.trace)
        for name in args.policies:
            find_policy(name)
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    per_instance = args.per_instance or (60 if args.quick else 120)
    most = args.most or (2500 if args.quick else 8000)
    jobs = [
        Job(
            instances=count,
            policy=policy,
            seed=seed,
            requests=min(count * per_instance, most),
            load=args.load,
            capacity_tokens=args.capacity,
            costs=args.costs,
            path=args.trace,
        )
        for count in sorted(args.instances, reverse=True)
        for policy in args.policies
        for seed in range(SEEDS if count <= SEVERAL and args.trace is None else 1)
    ]
    show(jobs, list(simulated(jobs)))
    scale_router.run(args.instances, quick=args.quick)


def simulated(jobs: Sequence[Job]) -> Iterator[Figures]:
    """Each job's figures, in their order; the longest jobs come first, on all cores."""
    with ProcessPoolExecutor() as pool:
        for job, result in zip(jobs, pool.map(simulate_one, jobs), strict=True):
            progress(f"{job.instances} instances, {job.policy}: first tokens {result.ttft_mean_s:.3g} s")
            yield result


def simulate_one(job: Job) -> Figures:
    trace, costs = trace_of(job), read_costs(job.costs)
    speed = job.load / ideal_load(trace, costs, job.instances)
    config = SimulationConfig(
        instances=job.instances,
        capacity_tokens=job.capacity_tokens,
        policy=job.policy,
        timed=True,
        speed=speed,
        seed=job.seed,
    )
    return figures(simulate(trace, config, costs), costs)


def trace_of(job: Job) -> Trace:
    """So many requests, over ten minutes where we make them."""
    if job.path is not None:
        trace = read_trace(job.path)
        return Trace(trace.requests[: job.requests], trace.block_tokens)
    lines = conversation(Shape(job.requests, job.requests / NATURAL_S, seed=job.seed))
    return parse_trace([msgspec.json.encode(line) for line in lines], "conversation")


def show(jobs: Sequence[Job], results: Sequence[Figures]) -> None:
    """Figures by cluster and policy."""
    samples: dict[int, dict[str, list[Figures]]] = {}
    for job, result in zip(jobs, results, strict=True):
        samples.setdefault(job.instances, {}).setdefault(job.policy, []).append(result)
    for count, by_policy in sorted(samples.items()):
        first = next(iter(by_policy.values()))
        report(f"scale/{count}_instances/requests", [it.requests for it in first], "requests")
        report(f"scale/{count}_instances/speed", [it.speed for it in first], "x")
        report(f"scale/{count}_instances/ideal_hit_ratio", [it.ideal_hit_ratio for it in first], "of blocks")
        baseline = values_of(first)
        for policy, runs in by_policy.items():
            for name, values in values_of(runs).items():
                is_first = runs is first
                report(
                    f"scale/{count}_instances/{policy}/{name}",
                    values,
                    UNITS[name],
                    baseline=None if is_first else baseline[name],
                )


def values_of(runs: Sequence[Figures]) -> dict[str, list[float]]:
    return {
        "ttft_mean": [it.ttft_mean_s or 0.0 for it in runs],
        "ttft_p99": [it.ttft_p99_s or 0.0 for it in runs],
        "hit_ratio": [it.block_hit_ratio for it in runs],
        "imbalance": [it.work_imbalance for it in runs],
    }


if __name__ == "__main__":
    main()
