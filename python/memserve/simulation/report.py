"""The figures of a simulation. Knows no files and no plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memserve.core.ids import InstanceId
from memserve.scheduling.cost_model.model import CostModel
from memserve.simulation.instance import SimulatedRequest
from memserve.simulation.simulation import Outcome
from memserve.simulation.traces import Trace


@dataclass(frozen=True, slots=True)
class Goal:
    """Limits that a request has to meet to count as goodput."""

    first_token_s: float = 10.0
    token_s: float = 0.05


@dataclass(frozen=True, slots=True)
class Figures:
    """The result of one run. Times are None in untimed mode."""

    policy: str
    decode_policy: str
    instances: int
    decodes: int
    capacity_tokens: int | None
    speed: float
    seed: int
    requests: int
    block_hit_ratio: float
    """Share of blocks that were cached where their prompt was computed, including fetched blocks."""
    ideal_hit_ratio: float
    """The same for a single unlimited cache."""
    fetched_ratio: float
    """Share of blocks that were first moved between instances."""
    work_imbalance: float
    """Computed tokens per prefill: maximum over mean."""
    resyncs: int
    load: float | None = None
    """Work that an ideal cache would leave, over the capacity of the prefills while requests arrive."""
    ttft_mean_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    token_mean_s: float | None = None
    """Mean time between the tokens of an answer, averaged over requests."""
    latency_mean_s: float | None = None
    latency_p99_s: float | None = None
    requests_per_s: float | None = None
    goodput_per_s: float | None = None
    """Requests per second that met the goal."""
    goodput_ratio: float | None = None
    prediction_error: float | None = None
    """Relative error of the router's latest predictions; None if it began with the true costs."""


def figures(outcome: Outcome, costs: CostModel, goal: Goal = Goal()) -> Figures:
    """Sum up a run with its `costs`."""
    config, trace, jobs = outcome.config, outcome.trace, outcome.jobs
    num_blocks = trace.num_blocks
    untimed = Figures(
        policy=config.policy,
        decode_policy=config.decode_policy,
        instances=config.instances,
        decodes=config.decodes,
        capacity_tokens=config.capacity_tokens,
        speed=config.speed,
        seed=config.seed,
        requests=len(jobs),
        block_hit_ratio=sum(job.hit_blocks for job in jobs) / num_blocks,
        ideal_hit_ratio=trace.ideal_hit_ratio(),
        fetched_ratio=sum(job.fetched_blocks for job in jobs) / num_blocks,
        work_imbalance=imbalance(work_by_instance(jobs, outcome.prefills)),
        resyncs=outcome.num_resyncs,
    )
    return _with_times(untimed, outcome, costs, goal) if config.timed else untimed


def work_by_instance(jobs: Sequence[SimulatedRequest], prefills: Sequence[InstanceId]) -> list[int]:
    """Computed tokens of each of `prefills`."""
    work = dict.fromkeys(prefills, 0)
    for job in jobs:
        work[job.prefill] += job.work_tokens
    return list(work.values())


def imbalance(work: Sequence[int]) -> float:
    """Maximum over mean; 1 if there was no work."""
    return max(work) * len(work) / sum(work) if sum(work) else 1.0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def first_token_times(outcome: Outcome) -> list[float]:
    """Seconds to the first token, in order of arrival."""
    speed = outcome.config.speed
    return [job.first_token_s - job.request.arrival_s / speed for job in outcome.jobs]


def ideal_load(trace: Trace, costs: CostModel, instances: int) -> float:
    """At speed 1, the work that an ideal cache would leave, over the capacity of `instances` meanwhile."""
    work_s = sum(
        costs.exec_s(request.prompt_tokens, min(depth * trace.block_tokens, request.prompt_tokens - 1))
        for request, depth in zip(trace.requests, trace.ideal_depths(), strict=True)
    )
    return work_s / (instances * trace.duration_s) if trace.duration_s else math.inf


def _with_times(untimed: Figures, outcome: Outcome, costs: CostModel, goal: Goal) -> Figures:
    speed, jobs = outcome.config.speed, outcome.jobs
    firsts = first_token_times(outcome)
    latencies = [job.end_s - job.request.arrival_s / speed for job in jobs]
    gaps = [(job.end_s - job.first_token_s) / max(job.request.output_tokens - 1, 1) for job in jobs]
    good = sum(
        first <= goal.first_token_s and gap <= goal.token_s for first, gap in zip(firsts, gaps, strict=True)
    )
    duration_s = max(job.end_s for job in jobs) - jobs[0].request.arrival_s / speed
    return replace(
        untimed,
        load=ideal_load(outcome.trace, costs, untimed.instances) * speed,
        ttft_mean_s=sum(firsts) / len(firsts),
        ttft_p50_s=percentile(firsts, 0.5),
        ttft_p99_s=percentile(firsts, 0.99),
        token_mean_s=sum(gaps) / len(gaps),
        latency_mean_s=sum(latencies) / len(latencies),
        latency_p99_s=percentile(latencies, 0.99),
        requests_per_s=len(jobs) / duration_s if duration_s else None,
        goodput_per_s=good / duration_s if duration_s else None,
        goodput_ratio=good / len(jobs),
        prediction_error=outcome.learned.error if outcome.learned.num_observed else None,
    )
