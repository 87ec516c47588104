"""Hooks that bound the time in which one request's stop patterns and grammar stop the scheduler.

A request may take its limit at once, and on average a small part of each step; over its limit it ends with
400. A pattern is stopped in the middle. A step of a grammar runs to its end, and the next is refused.

Ranks that process a request together must decide alike, and clocks differ. So a server of several ranks
measures nothing: `grammar_limits` bounds the form of grammars there, and a stop pattern is bounded only in
the text that it is matched with.
"""

from __future__ import annotations

import pkgutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import regex

from memserve.engine import request_seams as seams
from memserve.engine.hooks.containment import abort
from memserve.engine.sglang_internals import PARALLEL_STATE

PATTERN_LIMIT_S = (0.1, 0.0002)
GRAMMAR_LIMIT_S = (0.5, 0.002)
"""Larger than a pattern's: the mask of a large vocabulary takes up to some milliseconds for any grammar."""


@dataclass(slots=True)
class TimeLimit:
    """What one request may use of the scheduler's time, as it proceeds."""

    start_s: float
    step_s: float
    _used_s: float = 0.0

    def remaining_s(self) -> float:
        return self.start_s - self._used_s

    def spend(self, used_s: float) -> None:
        self._used_s += used_s

    def end_step(self) -> None:
        """Give back the share of one step."""
        self._used_s = max(0.0, self._used_s - self.step_s)

    @classmethod
    def of(cls, owner: Any, start_s: float, step_s: float) -> TimeLimit:
        """The limit of this request or grammar, created at its first use."""
        limit = getattr(owner, "memserve_time_limit", None)
        if limit is None:
            limit = owner.memserve_time_limit = cls(start_s, step_s)
        return limit


def place() -> None:
    """Register the hooks, in a process that has a scheduler."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(seams.STOP_CHECK, check_stops, HookType.AROUND)
    HookRegistry.register(seams.ACCEPT_TOKEN, accept_token, HookType.AROUND)
    HookRegistry.register(seams.FILL_MASK, fill_mask, HookType.AROUND)
    HookRegistry.register(seams.COMPILED, refuse_empty, HookType.AFTER)
    HookRegistry.register(seams.FINISH_STATE, blame_client, HookType.AFTER)
    HookRegistry.register(seams.PREPARE_ABORT, blame_client_early, HookType.AROUND)


def decides_alone() -> bool:
    """Whether this is the only rank that processes its requests."""
    parallel = pkgutil.resolve_name(PARALLEL_STATE)()
    return bool(parallel.tp_size == 1 and parallel.pp_size == 1)


def check_stops(original: Callable[..., Any], req: Any, new_accepted_len: int = 1) -> bool:
    """SGLang's check for stop strings, then a bounded one for stop patterns."""
    patterns = req.sampling_params.stop_regex_strs
    if not patterns or not decides_alone():
        return bool(original(req, new_accepted_len))
    req.sampling_params.stop_regex_strs = []
    try:
        if original(req, new_accepted_len):
            return True
    finally:
        req.sampling_params.stop_regex_strs = patterns
    limit = TimeLimit.of(req, *PATTERN_LIMIT_S)
    try:
        found = find_stop(req, patterns, new_accepted_len, limit)
    except TimeoutError:
        abort(req, "stop_regex takes too long to match: use a simpler pattern", HTTPStatus.BAD_REQUEST)
        return True
    limit.end_step()
    if found is None:
        return False
    pattern, req.finished_len = found
    req.finished_reason = pkgutil.resolve_name(seams.FINISH_REGEX)(matched=pattern)
    return True


def find_stop(
    req: Any, patterns: list[str], new_accepted_len: int, limit: TimeLimit
) -> tuple[str, int] | None:
    """The first pattern that matches the answer's end, and the length in tokens of the answer with it.

    Speculative decoding accepts several tokens at once, and the end may lie behind each of them. Raises
    TimeoutError when the limit is used up.
    """
    length = len(req.output_ids)
    window = req.output_ids[length - req._stop_match_tail_len(new_accepted_len) :]
    ends = range(max(1, len(window) - max(1, new_accepted_len) + 1), len(window) + 1)
    texts = [(end, req.tokenizer.decode(window[:end])) for end in ends]
    for pattern in patterns:
        for end, text in texts:
            if limit.remaining_s() <= 0:
                raise TimeoutError
            began = time.thread_time()
            try:
                matched = regex.search(pattern, text, timeout=limit.remaining_s())
            finally:
                limit.spend(time.thread_time() - began)
            if matched:
                return pattern, length - len(window) + end
    return None


def accept_token(original: Callable[..., Any], grammar: Any, token: int) -> Any:
    """Raise ValueError, on which SGLang aborts the request, for a grammar that cannot go on."""
    began = time.thread_time()
    try:
        result = original(grammar, token)
    except ValueError:
        if is_dead_end(grammar):
            grammar.memserve_refusal = "the grammar allows no next token"
        raise
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if decides_alone():
        limit = TimeLimit.of(grammar, *GRAMMAR_LIMIT_S)
        limit.spend(time.thread_time() - began)
        if limit.remaining_s() <= 0:
            grammar.memserve_refusal = "the grammar takes too long to match: use a simpler one"
            raise ValueError(grammar.memserve_refusal)
        limit.end_step()
    return result


def fill_mask(original: Callable[..., Any], grammar: Any, *args: Any, **kwargs: Any) -> None:
    """Count the time of a mask; the next token is refused if it is too much."""
    began = time.thread_time()
    original(grammar, *args, **kwargs)
    TimeLimit.of(grammar, *GRAMMAR_LIMIT_S).spend(time.thread_time() - began)


def refuse_empty(compiled: Any, *_: Any, **__: Any) -> Any:
    """Refuse a grammar that allows no first token, as a schema that only refers to itself."""
    if is_dead_end(compiled):
        return pkgutil.resolve_name(seams.INVALID_GRAMMAR)("the grammar matches no text")
    return compiled


def is_dead_end(grammar: Any) -> bool:
    """Whether the grammar allows no next token."""
    import torch

    if grammar.is_terminated():
        return False
    mask = torch.full((1, (grammar.vocab_size + 31) // 32), -1, dtype=torch.int32)
    grammar.matcher.fill_next_token_bitmask(mask, 0)
    return not bool(mask.any())


def refusal_of(req: Any) -> str | None:
    """Why the request's own grammar, which a grammar for its reasoning may wrap, ended it."""
    grammar = getattr(req.grammar, "grammar", None) or req.grammar
    return getattr(grammar, "memserve_refusal", None)


def blame_client(_: Any, req: Any, *__: Any, **___: Any) -> None:
    """Answer 400, not 500, to a request that its own grammar ended."""
    refusal = refusal_of(req)
    if refusal is not None and type(req.finished_reason) is pkgutil.resolve_name(seams.FINISH_ABORT):
        abort(req, refusal, HTTPStatus.BAD_REQUEST)


def blame_client_early(
    original: Callable[..., Any], req: Any, error_message: str, status_code: Any = None
) -> Any:
    """As `blame_client`, for a prefill server."""
    refusal = refusal_of(req)
    if refusal is not None:
        return original(req, refusal, HTTPStatus.BAD_REQUEST)
    return original(req, error_message, status_code)
