"""Values that SGLang's scheduler cannot take are refused; ordinary ones pass."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.sampling.sampling_params import SamplingParams

from memserve.engine import request_limits as limits
from memserve.engine.grammar_limits import ANY_JSON, check_grammar, nesting

VOCAB = 260


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0},
        {"temperature": 2, "top_p": 0.1, "top_k": 40, "min_p": 0.05},
        {"logit_bias": {"5": -100, "259": 100.0}},
        {"stop_token_ids": [0, 259], "max_new_tokens": 2**40},
        {"stop": ["a" * 1024], "regex": "[a-z]{1,100}"},
        {"json_schema": json.dumps({"type": "object", "properties": {"a": {"type": "string"}}})},
        {"json_schema": ANY_JSON},
        {"ebnf": 'root ::= ("(" [(] "a"{1,9}){2}'},
    ],
    ids=str,
)
def test_ordinary_parameters_pass(params: dict[str, Any]) -> None:
    tokenizer = SimpleNamespace(encode=lambda text, **_: text)
    sampling = SamplingParams(**params)
    sampling.normalize(tokenizer)
    limits.check_sampling(sampling, VOCAB)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (math.nan, math.inf, 1e308, "1", True)],
        *[("top_p", value) for value in (math.nan, "x", 1e-50, 2)],
        *[("min_p", value) for value in (math.nan, "x", -1)],
        *[("top_k", value) for value in (2**40, 1.5, "x")],
        *[(f"{kind}_penalty", value) for kind in ("frequency", "presence") for value in (math.nan, 3, "1")],
        *[("repetition_penalty", value) for value in (math.nan, 0, 1e-50)],
        *[("min_new_tokens", value) for value in (2**40, "x", -1)],
        *[("max_new_tokens", value) for value in (2**70, "x", 1.5)],
        *[("stream_interval", value) for value in (2**40, "x")],
        *[("stop_token_ids", value) for value in ({260}, {-1}, {2**70})],
        *[("logit_bias", {"5": value}) for value in (1e39, math.nan, math.inf, "x", None)],
        *[("logit_bias", {key: 1}) for key in ("260", "-1", "a")],
        ("regex", "(" * 17 + "a" + ")" * 17),
        ("regex", "a" * 8193),
        ("regex", "((a{0,50}){0,50}){0,50}"),
        ("ebnf", 'root ::= (("a"{0,50}){0,50}){0,50}'),
        ("json_schema", '{"items":' * 65 + "{}" + "}" * 65),
        ("json_schema", '{"items":' * 20000 + "{}" + "}" * 20000),
        ("json_schema", "[" * 30000),
        ("json_schema", json.dumps({"type": "string", "pattern": "((a{0,50}){0,50}){0,50}"})),
        ("json_schema", json.dumps({"type": "string", "description": "x" * 65536})),
        ("structural_tag", json.dumps({"format": {"type": "regex", "pattern": "(" * 17}})),
    ],
    ids=lambda value: str(value)[:30],
)
def test_parameters_that_the_scheduler_cannot_take_are_refused(name: str, value: Any) -> None:
    params = SamplingParams()
    params.normalize(None)
    limits.check_sampling(params, VOCAB)
    setattr(params, name, value)
    with pytest.raises(ValueError, match=f"{name}|pattern|regex|invalid literal"):
        limits.check_sampling(params, VOCAB)


@pytest.mark.parametrize(
    ("strings", "patterns"),
    [(["a" * 1025], []), (["a" * 1000] * 5, []), ([], ["(["]), ([], ["a", "*"]), ([], ["(?P<a"])],
)
def test_stops_that_cost_too_much_or_do_not_compile_are_refused(
    strings: list[str], patterns: list[str]
) -> None:
    limits.check_stops(["\n\n"], ["[.!?]$"])
    with pytest.raises(ValueError, match="stop"):
        limits.check_stops(strings, patterns)


@pytest.mark.parametrize("params", [{"n": 10**9}, [{"n": 1}, {"n": 2**70}], {"n": "x"}, {"beam_width": 9999}])
def test_too_many_samples_are_refused_before_they_are_copied(params: Any) -> None:
    limits.check_samples({"n": 4})
    limits.check_samples(None)
    with pytest.raises(ValueError, match="must be an integer"):
        limits.check_samples(params)


def request(**fields: Any) -> SimpleNamespace:
    known: dict[str, Any] = {
        **{"top_logprobs_num": 0, "logprob_start_len": -1, "token_ids_logprob": None, "input_ids": [1, 2]},
        **{"bootstrap_room": None, "bootstrap_port": None, "disagg_prefill_dp_rank": None, "priority": None},
        **{"multi_item_delimiter_indices": None, "token_indices_to_pool": None, "input_embeds": None},
    }
    return SimpleNamespace(**(known | fields))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("top_logprobs_num", value) for value in (261, -1, 10**6, 2**70, "5", 1.5, True)],
        *[("token_ids_logprob", [value]) for value in (260, -1, 2**70, "x", None)],
        *[("logprob_start_len", value) for value in (-2, 2**40, "x")],
        *[("bootstrap_room", value) for value in (-1, 2**63, "x")],
        *[("bootstrap_port", value) for value in (-1, 65536, "x")],
        *[("disagg_prefill_dp_rank", value) for value in (2, -1, "x")],
        *[("priority", value) for value in (2**70, "x")],
        *[("token_indices_to_pool", [value]) for value in (2, -1, "x")],
        *[("multi_item_delimiter_indices", [value]) for value in (2, -1)],
        *[("input_embeds", value) for value in ([[1.0]], [[1.0, 2.0], [1.0]], [[1.0, math.nan]], [5])],
    ],
)
def test_fields_outside_the_vocabulary_the_prompt_or_the_server_are_refused(name: str, value: Any) -> None:
    ordinary = request(top_logprobs_num=128, token_ids_logprob=[259], bootstrap_room=2**63 - 1, priority=5)
    limits.check_request(ordinary, VOCAB, num_dp_ranks=2, hidden_size=2)
    limits.check_request(request(top_logprobs_num=260), VOCAB, num_dp_ranks=1, hidden_size=2)
    with pytest.raises(ValueError, match=name):
        limits.check_request(request(**{name: value}), VOCAB, num_dp_ranks=2, hidden_size=2)


@pytest.mark.parametrize(
    ("text", "depth", "repeats"),
    [
        ("(a{1,100}){1,100}", 1, 10000),
        ("[(]" * 30 + r"\(\{", 0, 1),
        ("a{3}b{4}", 0, 4),
        ("(a{3}|b{7}c){2}", 1, 14),
        ("(((", 3, 1),
        ("a{}{,5}", 0, 5),
    ],
)
def test_nesting_of_a_regex(text: str, depth: int, repeats: int) -> None:
    assert nesting(text, has_strings=False) == (depth, repeats)


def test_strings_of_a_grammar_nest_nothing() -> None:
    assert nesting('"((({9}" "\\"("{2}', has_strings=True) == (0, 2)
    check_grammar("ebnf", 'root ::= "' + "(" * 100 + '"')


def test_top_logprobs_of_a_pair_are_those_that_prefill_can_hand_over() -> None:
    with pytest.raises(ValueError, match="top_logprobs_num"):
        limits.check_request(
            request(top_logprobs_num=129, bootstrap_room=1), VOCAB, num_dp_ranks=1, hidden_size=2
        )
