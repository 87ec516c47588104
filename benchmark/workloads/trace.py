"""Traces in Mooncake's format, smaller: a block's tokens are drawn by its hash id.

Equal ids mean equal tokens, so prefixes are shared as in the file. A prompt keeps its time
(`Turn.at_s`, from the first request's) and is a session of its own: a trace says when requests came,
not what they waited for. Files: kvcache-ai/Mooncake, FAST25-release/traces, or `python -m
memserve.simulation.make_trace`, whose --block-tokens must be said here too.
"""

from __future__ import annotations

from itertools import islice

from load.records import Session, Turn, Workload
from memserve.core.errors import ConfigError
from memserve.simulation.traces import Request, Trace, read_trace
from workloads.draws import Draws
from workloads.settings import Settings
from workloads.statistics import Published


def make(settings: Settings) -> Workload:
    """The first `requests` of the file, or all if it has fewer.

    Raises ConfigError naming the line that is not in the format.
    """
    trace = _read(settings)
    block = settings.prompt(trace.block_tokens)
    cache: dict[bytes, tuple[int, ...]] = {}

    def tokens_of(key: bytes) -> tuple[int, ...]:
        if key not in cache:
            cache[key] = Draws("trace", settings.seed, key.hex()).tokens(block, settings.vocabulary)
        return cache[key]

    def session(request: Request) -> Session:
        num_output = min(settings.output(request.output_tokens), settings.max_context - 1)
        length = settings.prompt(request.prompt_tokens)
        length = min(length, len(request.keys) * block, settings.max_context - num_output)
        blocks = islice(request.keys, -(-length // block))
        tokens = tuple(token for key in blocks for token in tokens_of(key))[:length]
        turn = Turn(tokens, num_output, request.arrival_s - trace.requests[0].arrival_s)
        return Session(f"trace-{settings.seed}-{request.number}", (turn,), grows=False)

    return Workload("trace", tuple(session(request) for request in trace.requests))


def published(settings: Settings) -> tuple[Published, ...]:
    """What the file says of the same requests."""
    trace = _read(settings)
    num_prompt = sum(request.prompt_tokens for request in trace.requests) / len(trace.requests)
    num_output = sum(request.output_tokens for request in trace.requests) / len(trace.requests)
    longest = max(request.prompt_tokens for request in trace.requests)
    return (
        Published("prompt_mean", num_prompt * settings.scale, "the file"),
        Published("prompt_max", longest * settings.scale, "the file"),
        Published("output_mean", num_output * settings.answer_scale, "the file"),
        Published("reusable", trace.ideal_hit_ratio(), "the file, of blocks"),
    )


def _read(settings: Settings) -> Trace:
    if settings.trace is None:
        raise ConfigError(
            "which trace? give its file; "
            "python -m memserve.simulation.make_trace conversation -o FILE writes one"
        )
    trace = read_trace(settings.trace, settings.block_tokens)
    return Trace(trace.requests[: settings.requests], trace.block_tokens)
