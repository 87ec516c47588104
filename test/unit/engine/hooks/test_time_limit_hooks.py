"""The hooks that bound the time of stop patterns and grammars, around SGLang's own classes."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
import xgrammar
from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar, XGrammarGrammarBackend
from sglang.srt.disaggregation.utils import prepare_abort
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_MATCHED_STR, FINISHED_MATCHED_REGEX, Req

from memserve.engine.hooks import time_limits
from memserve.engine.hooks.time_limits import (
    TimeLimit,
    accept_token,
    blame_client,
    blame_client_early,
    check_stops,
    fill_mask,
    refuse_empty,
)

END = 258


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limits, "decides_alone", lambda: True)


def request(text: str, *patterns: str, stops: tuple[str, ...] = ()) -> Any:
    """A request of SGLang whose answer is `text`, one token a character."""
    req = Req.__new__(Req)
    req.rid, req.output_ids, req.decoded_text = "job-1", list(text), ""
    req.finished_reason = req.finished_len = req.to_finish = req.grammar = None
    req.tokenizer = SimpleNamespace(decode="".join)
    req.sampling_params = SimpleNamespace(
        stop_strs=list(stops), stop_regex_strs=list(patterns), stop_str_max_len=9, stop_regex_max_len=512
    )
    return req


def check(req: Any, new_accepted_len: int = 1) -> bool:
    return check_stops(Req._check_str_based_finish, req, new_accepted_len)


@pytest.mark.parametrize("pattern", [r"(.+)+\x00", r"([\s\S]+)+\x00", r"(.*a){20}\x00", r"(a|aa)+$\x00"])
def test_a_pattern_that_backtracks_ends_its_request_soon(pattern: str) -> None:
    req = request("abc " * 128, pattern)
    began = time.monotonic()
    for _ in range(20_000):  # without a bound on the sum, a fast pattern of these would never end
        if check(req):
            break
        limit = TimeLimit.of(req, 0, 0)
        limit.spend(0.0005)  # what a slow pattern takes at each step
    assert time.monotonic() - began < 5
    assert isinstance(req.finished_reason, FINISH_ABORT)
    assert req.finished_reason.status_code == 400
    assert "stop_regex" in req.finished_reason.message


@pytest.mark.parametrize(
    ("text", "pattern", "accepted", "length"),
    [
        ("one. two", r"\.", 1, 8),
        ("one. two", r"\d", 1, None),
        ("one. two", r"\.", 6, 4),
        ("a1b", r"\d$", 2, 2),
        ("a1b", r"\d$", 1, None),
        ("", "a", 1, None),
    ],
)
def test_a_pattern_finds_what_sglangs_own_check_finds(
    text: str, pattern: str, accepted: int, length: int | None
) -> None:
    req, by_sglang = request(text, pattern), request(text, pattern)
    assert check(req, accepted) is (length is not None)
    assert Req._check_str_based_finish(by_sglang, accepted) is (length is not None)
    assert req.finished_len == by_sglang.finished_len == length
    assert type(req.finished_reason) is type(by_sglang.finished_reason)
    assert req.sampling_params.stop_regex_strs == [pattern]


def test_a_stop_string_goes_before_a_pattern() -> None:
    req = request("one. two", "two", stops=(". ",))
    assert check(req)
    assert isinstance(req.finished_reason, FINISH_MATCHED_STR)
    req = request("one. two", "two", stops=("no",))
    assert check(req)
    assert isinstance(req.finished_reason, FINISHED_MATCHED_REGEX)


def test_ranks_that_must_decide_alike_use_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limits, "decides_alone", lambda: False)
    req = request("one. two", "two")
    assert check(req)
    assert not hasattr(req, "memserve_time_limit")


def backend() -> Any:
    vocab = [bytes([i]) for i in range(256)] + [b"<a>", b"<b>", b"<eos>", b"<bos>"]
    info = xgrammar.TokenizerInfo(vocab, xgrammar.VocabType.RAW, vocab_size=260, stop_token_ids=[END])
    made = XGrammarGrammarBackend.__new__(XGrammarGrammarBackend)
    made.grammar_compiler = xgrammar.GrammarCompiler(info)
    made.vocab_size, made.override_stop_tokens, made.any_whitespace = 260, None, True
    made.max_whitespace_cnt = None
    return made


def test_a_grammar_that_matches_nothing_is_invalid() -> None:
    empty = backend().dispatch_json(json.dumps({"$ref": "#"}))
    assert isinstance(refuse_empty(empty), InvalidGrammarObject)
    good = backend().dispatch_regex("[ab]+")
    assert refuse_empty(good) is good


def test_a_grammar_without_a_next_token_is_the_clients_error() -> None:
    grammar = backend().dispatch_ebnf('root ::= "a" b\nb ::= "c" b')
    accept_token(XGrammarGrammar.accept_token, grammar, ord("a"))
    with pytest.raises(ValueError, match="not accepted"):
        accept_token(XGrammarGrammar.accept_token, grammar, ord("x"))
    assert not hasattr(grammar, "memserve_refusal")  # "c" was possible: not the grammar's fault

    grammar = backend().dispatch_json(json.dumps({"$ref": "#"}))
    with pytest.raises(ValueError, match="not accepted"):
        accept_token(XGrammarGrammar.accept_token, grammar, ord("x"))
    req = request("a")
    req.grammar, req.finished_reason = grammar, FINISH_ABORT("failed", 500, "InternalServerError")
    blame_client(None, req)
    assert req.finished_reason.status_code == 400
    assert "no next token" in req.finished_reason.message
    reasoner = SimpleNamespace(grammar=grammar)
    early = SimpleNamespace(grammar=reasoner, return_logprob=False)
    blame_client_early(prepare_abort, early, "failed", status_code=500)
    assert early.finished_reason.status_code == 400


def test_errors_of_requests_with_good_grammars_stay_as_they_are() -> None:
    req = request("a")
    req.grammar, req.finished_reason = backend().dispatch_regex("a"), FINISH_ABORT("failed", 500)
    blame_client(None, req)
    assert req.finished_reason.status_code == 500
    early = SimpleNamespace(grammar=None, return_logprob=False)
    blame_client_early(prepare_abort, early, "failed", 500)
    assert early.finished_reason.status_code == 500


def test_a_grammar_that_takes_too_long_ends_its_request_soon() -> None:
    grammar = backend().dispatch_regex("((a{0,500}){0,500}){0,500}b")
    mask = grammar.allocate_vocab_mask(260, 1, "cpu")

    def generate(num_tokens: int) -> None:
        for _ in range(num_tokens):
            fill_mask(XGrammarGrammar.fill_vocab_mask, grammar, mask, 0)
            accept_token(XGrammarGrammar.accept_token, grammar, ord("a"))

    began = time.monotonic()
    with pytest.raises(ValueError, match="too long"):
        generate(num_tokens=500)
    assert time.monotonic() - began < 10
    assert "too long" in grammar.memserve_refusal


def test_a_fast_grammar_is_not_limited_by_the_length_of_its_answer() -> None:
    grammar = backend().dispatch_regex("[ab]+")
    for _ in range(5000):
        accept_token(XGrammarGrammar.accept_token, grammar, ord("a"))


def test_a_failing_matcher_ends_its_request_only() -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the matcher failed")

    with pytest.raises(ValueError, match="the matcher failed"):
        accept_token(fail, backend().dispatch_regex("a"), 1)
