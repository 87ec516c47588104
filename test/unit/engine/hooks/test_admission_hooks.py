"""The hooks that refuse a request before SGLang's scheduler sees it, around SGLang's own functions."""

from __future__ import annotations

import asyncio
from array import array
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from memserve.engine.hooks import admission
from memserve.engine.hooks.admission import check_wire, create_request, keep_state, normalize, tokenize

MANAGER = SimpleNamespace(model_config=SimpleNamespace(vocab_size=260, hidden_size=64))


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = SimpleNamespace(num_dp_ranks=1)
    resolve = admission.pkgutil.resolve_name
    monkeypatch.setattr(
        admission.pkgutil,
        "resolve_name",
        lambda name: (lambda: parallel) if name == admission.PARALLEL_STATE else resolve(name),
    )


def tokenized(**fields: Any) -> TokenizedGenerateReqInput:
    sampling = fields.pop("sampling_params", {})
    params = SamplingParams(**sampling)
    params.normalize(SimpleNamespace(encode=lambda text, **_: list(text)))
    known: dict[str, Any] = {
        **{"rid": "a", "input_text": "hi", "input_ids": array("q", [1, 2]), "input_embeds": None},
        **{"mm_inputs": None, "token_type_ids": None, "sampling_params": params, "return_logprob": False},
        **{"logprob_start_len": -1, "top_logprobs_num": 0, "token_ids_logprob": None, "stream": False},
    }
    return TokenizedGenerateReqInput(**(known | fields))


def created(**fields: Any) -> Any:
    return create_request(lambda *_: tokenized(**fields), MANAGER, body=None)


def test_an_ordinary_request_passes_unchanged() -> None:
    request = created(sampling_params={"stop_regex": "[.!?]$", "logit_bias": {"5": 1.0}})
    assert list(request.input_ids) == [1, 2]
    assert request.input_text == "hi"
    assert request.sampling_params.stop_regex_max_len == 1


def test_an_unbounded_stop_regex_looks_at_a_bounded_end() -> None:
    assert created(sampling_params={"stop_regex": "a.*b"}).sampling_params.stop_regex_max_len == 512


@pytest.mark.parametrize(
    "fields",
    [
        {"positional_embed_overrides": {"a": 1}},
        {"disagg_prefill_dp_rank": 5},
        {"bootstrap_room": "x"},
        {"bootstrap_room": 2**70},
        {"top_logprobs_num": 10**6},
        {"token_ids_logprob": [-1]},
        {"lora_id": 7},
        {"extra_key": ["a"]},
        {"rid": ["a", "b"]},
        {"session_params": {"id": 5}},
        {"stream": "yes"},
        {"sampling_params": {"stop_token_ids": [261]}},
        {"sampling_params": {"stop_token_ids": ["x"]}},
        {"sampling_params": {"logit_bias": {"5": 1e39}}},
        {"sampling_params": {"logit_bias": [1]}},
        {"sampling_params": {"stop_regex": "(["}},
        {"sampling_params": {"stop_regex": 5}},
        {"sampling_params": {"stop": 5}},
        {"sampling_params": {"stream_interval": "a"}},
        {"sampling_params": {"skip_special_tokens": "x"}},
        {"sampling_params": {"custom_params": [1]}},
        {"sampling_params": {"json_schema": {"type": "object"}}},
        {"sampling_params": {"temperature": float("nan")}},
        {"sampling_params": {"no_such_parameter": 1}},
    ],
    ids=str,
)
def test_a_request_that_the_scheduler_cannot_take_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        created(**fields)


def test_wire_check_fails_as_the_scheduler_would() -> None:
    check_wire(tokenized())
    with pytest.raises(msgspec.ValidationError):
        check_wire(tokenized(positional_embed_overrides={"a": 1}))


@pytest.mark.parametrize("params", [{"n": 10**9}, {"n": "x"}, [1, 2], "x", 5], ids=str)
def test_a_body_that_sglang_cannot_normalize_is_refused(params: Any) -> None:
    normalize(GenerateReqInput.normalize_batch_and_arguments, GenerateReqInput(text="a"))
    with pytest.raises(ValueError, match=r"."):
        normalize(
            GenerateReqInput.normalize_batch_and_arguments,
            GenerateReqInput(text="a", sampling_params=params),
        )


@pytest.mark.parametrize("error", [TypeError("a"), OverflowError("b"), KeyError("c"), AttributeError("d")])
def test_errors_of_sglangs_parsing_become_the_clients(error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    async def fail_later(*_: Any) -> None:
        raise error

    with pytest.raises(ValueError, match="invalid request"):
        keep_state(fail)
    with pytest.raises(ValueError, match="invalid request"):
        asyncio.run(tokenize(fail_later))


def test_errors_of_the_server_stay_the_servers() -> None:
    async def fail(*_: Any) -> None:
        raise OSError("no memory")

    with pytest.raises(OSError, match="no memory"):
        asyncio.run(tokenize(fail))
