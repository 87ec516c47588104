"""The bounds that one request must keep, checked before SGLang's scheduler sees it.

SGLang checks some parameters and trusts the rest. A value that its tensors, kernels or matchers cannot take
raises in the scheduler, which ends the server; on CUDA a device assert does so without a way back. Each
check raises ValueError, which SGLang answers with 400. Knows the names of SGLang's parameters; calls
nothing of SGLang.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from memserve.engine.grammar_limits import check_grammar

_MAX_INT32 = 2**31 - 1
_MAX_INT64 = 2**63 - 1
_MAX_FLOAT32 = 3.4028234663852886e38
_MIN_FLOAT32 = 1.1754943508222875e-38
"""The smallest number that float32 holds with full precision; a smaller one may become zero."""
GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds that follow from costs; those of types and of the vocabulary are in the checks."""

    max_temperature: float = 1e6
    """With a larger one, tokens that a grammar forbids (at -1e30 after sanitizing) would become possible."""
    max_samples: int = 1024
    """Answers to one prompt: SGLang copies the prompt for each before any other check."""
    max_stop_chars: int = 1024
    max_stop_chars_in_all: int = 4096
    """SGLang compares each prefix of each stop string with the answer's end: quadratic in the length."""
    max_top_logprobs_of_pairs: int = 128
    """What prefill's buffer for decode holds; one more ends prefill. Source: SGLang, MetadataBuffers."""
    max_stop_regex_tokens: int = 512
    """The end of the answer that a stop_regex is matched with; SGLang decodes it again at each step."""


LIMITS = RequestLimits()


def check_samples(sampling_params: Any) -> None:
    """Refuse more samples than fit, in the parameters of one prompt or a list of them, still unparsed."""
    for params in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
        for name in ("n", "beam_width"):
            value = params.get(name) if isinstance(params, dict) else None
            if value is not None:
                _check_int(name, value, 1, LIMITS.max_samples)


def check_sampling(params: Any, vocab_size: int) -> None:
    """Refuse sampling parameters, normalized by SGLang, that its sampler or its stop checks cannot take."""
    _check_number("temperature", params.temperature, 0, LIMITS.max_temperature)
    _check_number("top_p", params.top_p, _MIN_FLOAT32, 1)
    _check_number("min_p", params.min_p, 0, 1)
    _check_number("frequency_penalty", params.frequency_penalty, -2, 2)
    _check_number("presence_penalty", params.presence_penalty, -2, 2)
    _check_number("repetition_penalty", params.repetition_penalty, _MIN_FLOAT32, 2)
    _check_int("top_k", params.top_k, 1, _MAX_INT32)
    _check_int("min_new_tokens", params.min_new_tokens, 0, _MAX_INT32)
    if params.max_new_tokens is not None:
        _check_int("max_new_tokens", params.max_new_tokens, 0, _MAX_INT64)
    if params.stream_interval is not None:
        _check_int("stream_interval", params.stream_interval, -1, _MAX_INT32)
    _check_token_ids("stop_token_ids", params.stop_token_ids or (), vocab_size)
    for key, bias in (params.logit_bias or {}).items():
        _check_token_ids("logit_bias", [int(key)], vocab_size)
        _check_number("logit_bias", bias, -_MAX_FLOAT32, _MAX_FLOAT32)
    check_stops(params.stop_strs or (), params.stop_regex_strs or ())
    for name in GRAMMARS:
        text = getattr(params, name)
        if text is not None:
            check_grammar(name, text)


def check_request(request: Any, vocab_size: int, num_dp_ranks: int, hidden_size: int) -> None:
    """Refuse fields of a tokenized request that are outside the vocabulary, the prompt or the server.

    `disagg_prefill_dp_rank` must be a rank of this server: decode would look for it at prefill in vain.
    """
    is_of_pair = request.bootstrap_room is not None
    most = min(vocab_size, LIMITS.max_top_logprobs_of_pairs) if is_of_pair else vocab_size
    _check_int("top_logprobs_num", request.top_logprobs_num or 0, 0, most)
    _check_int("logprob_start_len", request.logprob_start_len, -1, _MAX_INT32)
    _check_token_ids("token_ids_logprob", request.token_ids_logprob or (), vocab_size)
    for name, low, high in (
        ("bootstrap_room", 0, _MAX_INT64),
        ("bootstrap_port", 0, 65535),
        ("disagg_prefill_dp_rank", 0, num_dp_ranks - 1),
        ("priority", -_MAX_INT64, _MAX_INT64),
    ):
        value = getattr(request, name)
        if value is not None:
            _check_int(name, value, low, high)
    for name in ("multi_item_delimiter_indices", "token_indices_to_pool"):
        for index in getattr(request, name) or ():
            _check_int(name, index, 0, len(request.input_ids or ()) - 1)
    for row in request.input_embeds or ():
        if not isinstance(row, list) or len(row) != hidden_size:
            raise ValueError(
                f"input_embeds: each row must hold {hidden_size} numbers, as the model's hidden states"
            )
        for value in row:
            _check_number("input_embeds", value, -_MAX_FLOAT32, _MAX_FLOAT32)


def check_stops(strings: Sequence[str], patterns: Sequence[str]) -> None:
    """Refuse stop strings that are too long, and stop patterns that do not compile."""
    each, in_all = LIMITS.max_stop_chars, LIMITS.max_stop_chars_in_all
    if any(len(one) > each for one in strings) or sum(map(len, strings)) > in_all:
        raise ValueError(f"stop: at most {each} characters each and {in_all} in all are allowed")
    for pattern in patterns:
        try:
            regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(f"stop_regex {pattern!r} is invalid: {error}") from error


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {_short(value)}")


def _check_token_ids(name: str, token_ids: Iterable[Any], vocab_size: int) -> None:
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise ValueError(f"{name}: a token id must be in [0, {vocab_size - 1}], got {_short(token_id)}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} must be a finite number in [{low:g}, {high:g}], got {_short(value)}")


def _short(value: Any) -> str:
    return repr(value)[:80]
