"""Request traces in Mooncake's format: arrival times, and the 512-token blocks of each prompt.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [0, 46, 47, ...]}

`timestamp` in ms; one id per block, the last one partial; ids chain, so equal ids mean equal prefixes.
`session_id` names the conversation; for lines without it, the blocks tell the conversation.
Knows the file format and its errors only.
Source: kvcache-ai/Mooncake, FAST25-release/traces; session_id is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from memserve.core.block_keys import KEY_BYTES, BlockKey
from memserve.core.errors import ConfigError

BLOCK_TOKENS = 512


class TraceLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a trace file. Other fields are ignored."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]
    session_id: int | None = None


class Request(msgspec.Struct, frozen=True):
    """One request of a trace."""

    number: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    keys: tuple[BlockKey, ...]
    session: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival."""

    requests: tuple[Request, ...]
    block_tokens: int

    @property
    def duration_s(self) -> float:
        return self.requests[-1].arrival_s - self.requests[0].arrival_s

    @property
    def num_blocks(self) -> int:
        return sum(len(request.keys) for request in self.requests)

    def ideal_depths(self) -> Iterator[int]:
        """For each request, the number of its blocks that a single unlimited cache would have."""
        seen: set[BlockKey] = set()
        for request in self.requests:
            yield next((i for i, key in enumerate(request.keys) if key not in seen), len(request.keys))
            seen.update(request.keys)

    def ideal_hit_ratio(self) -> float:
        return sum(self.ideal_depths()) / self.num_blocks


def read_trace(path: Path, block_tokens: int = BLOCK_TOKENS) -> Trace:
    """The trace in `path`. Raises ConfigError with the line number and the error."""
    try:
        with path.open("rb") as file:
            return parse_trace(file, str(path), block_tokens)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def parse_trace(lines: Iterable[bytes], name: str, block_tokens: int = BLOCK_TOKENS) -> Trace:
    """As `read_trace`; errors call the source `name`. Blank lines are skipped."""
    decoder = msgspec.json.Decoder(TraceLine)
    sessions = _Sessions()
    parents: dict[int, int | None] = {}
    requests: list[Request] = []
    before_s = 0.0
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
            _check(line, block_tokens)
            _check_chain(line.hash_ids, parents)
            if line.timestamp / 1e3 < before_s:
                raise ValueError(f"timestamp {line.timestamp:g} is before the timestamp of the line above")
        except (ValueError, msgspec.DecodeError) as error:
            raise ConfigError(f"{name}, line {number}: {error}") from error
        before_s = line.timestamp / 1e3
        keys = tuple(BlockKey(block.to_bytes(KEY_BYTES, "big")) for block in line.hash_ids)
        session = sessions.of(line)
        requests.append(
            Request(len(requests), before_s, line.input_length, line.output_length, keys, session)
        )
    if not requests:
        raise ConfigError(f"{name}: the trace has no request")
    return Trace(tuple(requests), block_tokens)


def _check(line: TraceLine, block_tokens: int) -> None:
    if line.timestamp < 0:
        raise ValueError(f"timestamp {line.timestamp:g} is negative")
    if line.input_length < 1:
        raise ValueError(f"input_length {line.input_length}: a prompt has to have at least one token")
    if line.output_length < 0:
        raise ValueError(f"output_length {line.output_length} is negative")
    expected = -(-line.input_length // block_tokens)
    if len(line.hash_ids) != expected:
        raise ValueError(
            f"{len(line.hash_ids)} hash_ids, but {line.input_length} tokens are {expected} blocks "
            f"of {block_tokens}"
        )
    if any(not 0 <= block < 1 << 63 for block in line.hash_ids):
        raise ValueError("hash ids have to be from 0 to 2^63 - 1")
    if len(set(line.hash_ids)) != len(line.hash_ids):
        raise ValueError("a hash id is repeated")


def _check_chain(blocks: list[int], parents: dict[int, int | None]) -> None:
    before: int | None = None
    for block in blocks:
        if parents.setdefault(block, before) != before:
            raise ValueError(f"block {block} follows {before} here and {parents[block]} in an earlier line")
        before = block


class _Sessions:
    """Infers conversations from blocks: a prompt continues the conversation whose blocks it begins with.

    The first block does not count: it is the system prompt that all conversations share.
    """

    def __init__(self) -> None:
        self._of_block: dict[int, int] = {}
        self._next = 0

    def of(self, line: TraceLine) -> int:
        if line.session_id is not None:
            return line.session_id
        known = [self._of_block[block] for block in line.hash_ids[1:] if block in self._of_block]
        session = known[-1] if known else self._next
        self._next += not known
        for block in line.hash_ids[1:]:
            self._of_block.setdefault(block, session)
        return session
