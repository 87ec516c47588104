"""`python -m memserve.simulation.make_trace`: seeded traces of well-known shapes, in Mooncake's format.

Knows sizes, turns and times of prompts; no text and no server.
Source of the shapes: MemServe (ShareGPT, LooGLE, ReAct); Mooncake's conversation trace, to whose
quantiles `conversation` is fitted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from random import Random

import msgspec

from memserve.core.errors import ConfigError
from memserve.simulation.traces import BLOCK_TOKENS, TraceLine


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a trace. Checked when built."""

    requests: int
    rate: float
    """Requests per second, on average."""
    sessions: int = 80
    """For loogle only; the other shapes make as many sessions as the requests need."""
    share_ratio: int = 3
    """For loogle only: sessions that ask about the same document."""
    block_tokens: int = BLOCK_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.requests, self.sessions, self.share_ratio, self.block_tokens) < 1:
            raise ConfigError("requests, sessions, share ratio and block tokens have to be at least 1")
        if not self.rate > 0:
            raise ConfigError("the rate has to be above 0 requests per second")


class _Ids:
    """Gives out new block ids."""

    def __init__(self) -> None:
        self._next = 0

    def take(self) -> int:
        self._next += 1
        return self._next - 1


class _Context:
    """A prompt that grows. Its whole blocks keep their ids; the last, partial one is new each time."""

    def __init__(self, ids: _Ids, block_tokens: int, blocks: Sequence[int] = ()) -> None:
        """`blocks`: whole blocks to begin with, which other prompts may share."""
        self._ids, self._block_tokens = ids, block_tokens
        self._blocks = list(blocks)
        self.num_tokens = len(self._blocks) * block_tokens

    def grow(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        while len(self._blocks) < self.num_tokens // self._block_tokens:
            self._blocks.append(self._ids.take())

    def shrink(self, num_tokens: int) -> None:
        """Go back to the first `num_tokens` tokens; growing from there makes new blocks."""
        self.num_tokens = min(self.num_tokens, num_tokens)
        del self._blocks[self.num_tokens // self._block_tokens :]

    def blocks(self) -> list[int]:
        """The whole blocks."""
        return list(self._blocks)

    def request(self, at_s: float, output_tokens: int, session: int) -> TraceLine:
        blocks = self.blocks()
        if self.num_tokens % self._block_tokens:
            blocks.append(self._ids.take())
        return TraceLine(round(at_s * 1e3), self.num_tokens, output_tokens, blocks, session)


Session = Callable[[Random, float, int], Iterator[TraceLine]]
"""(random, begin in seconds, number) -> the requests of one conversation."""


def conversation(shape: Shape) -> list[TraceLine]:
    """Chat with long prompts: quantiles, turns and reuse of Mooncake's conversation trace."""
    ids = _Ids()
    system = [ids.take()]

    def session(random: Random, at_s: float, number: int) -> Iterator[TraceLine]:
        context = _Context(ids, shape.block_tokens, system)
        first = min(max(random.lognormvariate(log(5900), 1.18), 890), 126_000)
        context.grow(max(int(first) - context.num_tokens, 1))
        goes_on = 0.34
        while True:
            output = _chat_answer(random)
            yield context.request(at_s, output, number)
            if random.random() > goes_on:
                return
            goes_on = min(goes_on + 0.1, 0.65)
            at_s += random.lognormvariate(log(123), 1.05)
            if random.random() < 0.1:  # edited: the conversation goes on from an earlier point
                context.shrink(max(int(context.num_tokens * random.random()), shape.block_tokens))
            typed = random.lognormvariate(log(30), 1.3)
            if random.random() < 0.25:  # pasted
                typed = random.lognormvariate(log(2400), 1.0)
            context.grow(output + int(typed) + 1)

    return _poisson_sessions(shape, session, mean_turns=1.63)


def sharegpt(shape: Shape) -> list[TraceLine]:
    """Short chat: 73% of conversations have several turns, 5.75 turns in the mean, prompts to 2.3K tokens."""
    ids = _Ids()

    def session(random: Random, at_s: float, number: int) -> Iterator[TraceLine]:
        context = _Context(ids, shape.block_tokens)
        turns = 1 if random.random() > 0.73 else 2 + int(random.expovariate(1 / 6.0))
        for _ in range(turns):
            context.grow(4 + int(random.lognormvariate(log(40), 1.1)))
            if context.num_tokens > 2300:
                context.shrink(0)  # the window is full: the client starts again with its last message
                context.grow(4 + int(random.lognormvariate(log(40), 1.1)))
            output = 1 + int(random.lognormvariate(log(150), 0.8))
            yield context.request(at_s, output, number)
            context.grow(output)
            at_s += random.lognormvariate(log(30), 0.8)

    return _poisson_sessions(shape, session, mean_turns=5.75)


def loogle(shape: Shape) -> list[TraceLine]:
    """Questions about long documents: 23.5K tokens (sd 6.1K), 91% of them shared, 16 tokens of answer.

    Every `share_ratio` sessions ask about one document. Sessions take turns at random.
    """
    random, ids = Random(shape.seed), _Ids()
    documents = []
    for _ in range(-(-shape.sessions // shape.share_ratio)):
        document = _Context(ids, shape.block_tokens)
        document.grow(int(max(random.gauss(23_500, 6100), 2000) * 0.91))
        documents.append(document)
    homes = [i // shape.share_ratio for i in range(shape.sessions)]
    random.shuffle(homes)
    lines, at_s = [], 0.0
    # Every session asks once before any session is drawn again: the trace has exactly shape.sessions.
    order = random.sample(range(shape.sessions), shape.sessions)
    order += random.choices(range(shape.sessions), k=max(shape.requests - shape.sessions, 0))
    order = order[: shape.requests]
    random.shuffle(order)
    for session in order:
        document = documents[homes[session]]
        context = _Context(ids, shape.block_tokens, document.blocks())
        context.grow(document.num_tokens - context.num_tokens + int(document.num_tokens * 0.09 / 0.91))
        lines.append(context.request(at_s, 16, session))
        at_s += random.expovariate(shape.rate)
    return _renumbered(lines)


def react(shape: Shape) -> list[TraceLine]:
    """Agents: all share a 6-shot prompt of 1,250 tokens, and grow it by thought, action and observation."""
    ids = _Ids()
    shots = _Context(ids, shape.block_tokens)
    shots.grow(1250)

    def session(random: Random, at_s: float, number: int) -> Iterator[TraceLine]:
        context = _Context(ids, shape.block_tokens, shots.blocks())
        context.grow(shots.num_tokens - context.num_tokens + 12 + int(random.expovariate(1 / 15)))
        for _ in range(random.randint(2, 7)):
            output = 30 + int(random.expovariate(1 / 35))
            yield context.request(at_s, output, number)
            context.grow(output + 20 + int(random.expovariate(1 / 90)))
            at_s += 1.0 + random.expovariate(1.0)  # the answer, and the tool

    return _poisson_sessions(shape, session, mean_turns=4.5)


def _chat_answer(random: Random) -> int:
    kind = random.random()
    if kind < 0.2:
        return 1 + int(random.lognormvariate(log(30), 1.2))
    if kind < 0.97:
        return max(int(random.gauss(380, 140)), 1)
    return int(random.lognormvariate(log(900), 0.3))


def _poisson_sessions(shape: Shape, session: Session, mean_turns: float) -> list[TraceLine]:
    """The first requests of sessions that begin as a Poisson process."""
    random = Random(shape.seed)
    lines: list[TraceLine] = []
    begin_s, number = 0.0, 0
    while len(lines) < shape.requests or lines[shape.requests - 1].timestamp > begin_s * 1e3:
        lines.extend(session(random, begin_s, number))
        begin_s += random.expovariate(shape.rate / mean_turns)
        number += 1
        if len(lines) >= shape.requests:
            lines.sort(key=lambda line: line.timestamp)
            del lines[shape.requests :]
    return _renumbered(lines)


def _renumbered(lines: list[TraceLine]) -> list[TraceLine]:
    """Block ids and sessions in order of appearance, times from 0."""
    blocks: dict[int, int] = {}
    sessions: dict[int | None, int] = {}
    return [
        msgspec.structs.replace(
            line,
            timestamp=line.timestamp - lines[0].timestamp,
            hash_ids=[blocks.setdefault(block, len(blocks)) for block in line.hash_ids],
            session_id=sessions.setdefault(line.session_id, len(sessions)),
        )
        for line in lines
    ]


SHAPES: dict[str, tuple[Callable[[Shape], list[TraceLine]], Shape]] = {
    "conversation": (conversation, Shape(requests=12_000, rate=3.4)),
    "sharegpt": (sharegpt, Shape(requests=5000, rate=10.0)),
    "loogle": (loogle, Shape(requests=250, rate=1.0)),
    "react": (react, Shape(requests=2000, rate=10.0)),
}

EXAMPLES = """\
shapes:
  conversation  chat with long prompts, as Mooncake's trace: 12,035 tokens in the mean, half of them
                under 7,000; block 0 is in every request; 37% of the blocks have been seen before
  sharegpt      short chat, 5.75 turns in the mean; give it --block-tokens 16, as most of its prompts
                are shorter than 512
  loogle        250 questions of 80 sessions about 27 documents of 23,500 tokens
  react         agents that share a 6-shot prompt; --block-tokens 64 shows its reuse

examples:
  python -m memserve.simulation.make_trace conversation -o trace.jsonl
  python -m memserve.simulation.make_trace loogle --rate 2 --seed 7 -o loogle.jsonl
  python -m memserve.simulation.make_trace sharegpt --block-tokens 16 -o short.jsonl
  python -m memserve.simulation --trace short.jsonl --block-tokens 16 --timed
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the trace that the command line describes; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m memserve.simulation.make_trace",
        description="Writes a trace for python -m memserve.simulation: one JSON object per request and line. "
        "The same arguments give the same trace.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shape", choices=SHAPES)
    for flag, kind, help in (
        ("requests", int, "number of requests"),
        ("rate", float, "requests per second, on average"),
        ("sessions", int, "number of sessions, for loogle (default: 80)"),
        ("share-ratio", int, "sessions per document, for loogle (default: 3)"),
        ("block-tokens", int, "tokens per block (default: 512)"),
        ("seed", int, "seed of all random draws (default: 0)"),
    ):
        parser.add_argument(f"--{flag}", type=kind, metavar="N", help=help)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: stdout")
    arguments = vars(parser.parse_args(argv))
    make, shape = SHAPES[arguments.pop("shape")]
    output = arguments.pop("output")
    try:
        shape = replace(shape, **{name: value for name, value in arguments.items() if value is not None})
        text = b"".join(msgspec.json.encode(line) + b"\n" for line in make(shape))
        if output is None:
            sys.stdout.buffer.write(text)
        else:
            output.write_bytes(text)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
