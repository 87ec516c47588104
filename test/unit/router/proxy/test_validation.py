"""Requests that the router refuses before it sends anything."""

from __future__ import annotations

import ast
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.errors import BadRequest
from memserve.router.field_kinds import ModelLimits
from memserve.router.proxy.validation import read_body, read_request
from memserve.router.request import Api, GenerationRequest
from memserve.router.sglang_api import KINDS, SAMPLING_FIELDS, In, fields_of

LIMITS = ModelLimits(vocab_size=100, context_tokens=8)
HELLO = [{"role": "user", "content": "hello"}]


def read(api: Api, body: dict[str, Any], limits: ModelLimits = LIMITS) -> GenerationRequest:
    return read_request(api, body, limits, new_rid="new")


def nested(depth: int) -> Any:
    """An object in an object, `depth` times."""
    return {} if depth == 0 else {"properties": nested(depth - 1)}


def generate(**body: Any) -> GenerationRequest:
    return read(Api.GENERATE, body)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"  \n",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": 1} x',
        b'{"a": "\xff"}',
        b"[" * 10**6,
    ],
)
def test_body_that_is_not_a_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        read_body(raw)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "text"),
        ({"text": None}, "text"),
        ({"text": 5}, "text"),
        ({"text": []}, "text"),
        ({"text": ["a", 5]}, "text[1]"),
        ({"text": ""}, "text"),
        ({"text": ["a", ""]}, "text[1]"),
        ({"text": "a", "input_ids": [1]}, "input_ids"),
        ({"text": "a", "stream": "yes"}, "stream"),
        ({"text": "a", "stream": 1}, "stream"),
        ({"input_ids": "1 2"}, "input_ids"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[]]}, "input_ids[0]"),
        ({"input_ids": [[1], []]}, "input_ids[1]"),
        ({"input_ids": [[1], 2]}, "input_ids[1]"),
        ({"input_ids": [1, [2]]}, "input_ids[1]"),
        ({"input_ids": [1, 100]}, "input_ids[1]"),
        ({"input_ids": [-1, 5]}, "input_ids[0]"),
        ({"input_ids": [1, True]}, "input_ids[1]"),
        ({"input_ids": [1.0]}, "input_ids[0]"),
        ({"input_ids": [None]}, "input_ids[0]"),
        ({"input_ids": ["1"]}, "input_ids[0]"),
        ({"input_ids": [[1, 2], [3, 2**70]]}, "input_ids[1][1]"),
        ({"input_ids": [1] * 8}, "input_ids"),
        ({"input_ids": [[1], [1] * 8]}, "input_ids[1]"),
        ({"input_embeds": [1.0]}, "input_embeds"),
        ({"text": "a", "sampling_params": 5}, "sampling_params"),
        ({"text": "a", "sampling_params": [{}]}, "sampling_params"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": ["a"], "sampling_params": [5]}, "sampling_params[0]"),
        ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "sampling_params"),
        ({"text": "a", "sampling_params": {"max_tokens": 5}}, "sampling_params.max_tokens"),
        ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 1.5}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"max_new_tokens": True}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"temperature": math.inf}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"temperature": math.nan}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"top_p": 1.1}}, "sampling_params.top_p"),
        ({"text": "a", "sampling_params": {"n": 0}}, "sampling_params.n"),
        ({"text": "a", "sampling_params": {"n": 1000}}, "sampling_params.n"),
        ({"text": "a", "sampling_params": {"n": "2"}}, "sampling_params.n"),
        ({"text": "a", "rid": ""}, "rid"),
        ({"text": "a", "rid": 5}, "rid"),
        ({"text": "a", "rid": ["x"]}, "rid"),
        ({"text": ["a", "b"], "rid": ["x"]}, "rid"),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
    ],
)
def test_generate_body_with_a_wrong_field_is_refused(body: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(Api.GENERATE, body)
    assert caught.value.field == field
    assert field.split("[")[0].split(".")[-1] in caught.value.message


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"content": "hello"}]}, "messages[0]"),
        ({"messages": HELLO, "n": 0}, "n"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "max_completion_tokens": -5}, "max_completion_tokens"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature"),
        ({"messages": HELLO, "model": 5}, "model"),
        ({"messages": HELLO, "input_ids": [500]}, "input_ids[0]"),
        ({"messages": HELLO, "input_ids": [[5]]}, "input_ids"),
    ],
)
def test_chat_body_with_a_wrong_field_is_refused(body: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(Api.CHAT, body)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [5, 100]}, "prompt[1]"),
        ({"prompt": [[5], [-1]]}, "prompt[1][0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "echo": "yes"}, "echo"),
    ],
)
def test_completions_body_with_a_wrong_field_is_refused(body: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(Api.COMPLETIONS, body)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("body", "num_prompts", "num_samples"),
    [
        ({"text": "a"}, None, 1),
        ({"text": ["a"]}, 1, 1),
        ({"input_ids": [0, 99]}, None, 1),
        ({"input_ids": [[1], [2]]}, 2, 1),
        ({"input_embeds": [[0.5]]}, None, 1),
        ({"input_embeds": [[[0.5]]]}, 1, 1),
        ({"text": "a", "sampling_params": {"n": 3}}, None, 3),
        ({"text": "a", "sampling_params": {"n": 3, "beam_width": 4}}, None, 1),
        ({"text": ["a", "b"], "sampling_params": [{"n": 3}, {"n": 3}]}, 2, 3),
        ({"text": "a", "sampling_params": {"max_new_tokens": 0, "temperature": 0, "top_k": -1}}, None, 1),
        ({"text": "a", "sampling_params": {"max_new_tokens": None}, "stream": None}, None, 1),
        ({"text": "a", "some_new_field": 1}, None, 1),
    ],
)
def test_generate_body_with_valid_fields_is_accepted(
    body: dict[str, Any], num_prompts: int | None, num_samples: int
) -> None:
    call = read(Api.GENERATE, body)
    assert (call.num_prompts, call.num_samples) == (num_prompts, num_samples)
    assert call.body is body


def test_prompts_of_a_batch_have_sglangs_rids() -> None:
    assert generate(text="a").rids == ("new",)
    assert generate(text="a", rid="mine").rids == ("mine",)
    assert generate(text=["a", "b"]).rids == ("new_000000", "new_000001")
    assert generate(text=["a", "b"], rid="mine").rids == ("mine_0", "mine_1")
    assert generate(text=["a", "b"], rid=["x", "y"]).rids == ("x", "y")
    assert generate(text="a", rid="mine").has_client_rid
    assert not generate(text="a").has_client_rid


def test_empty_text_is_accepted_if_the_tokenizer_adds_a_token() -> None:
    assert read(Api.GENERATE, {"text": ""}, ModelLimits(takes_empty_text=True)).num_prompts is None


def test_unknown_limits_are_not_checked() -> None:
    unknown = ModelLimits()
    assert read(Api.GENERATE, {"input_ids": [10**6] * 1000}, unknown).num_prompts is None
    with pytest.raises(BadRequest):
        read(Api.GENERATE, {"input_ids": [-1]}, unknown)


names = st.sampled_from(["", "a", "n", "role", "temperature"])
scalars = st.none() | st.booleans() | st.integers(-200, 200) | st.floats() | names
json_values = (
    scalars
    | st.lists(scalars | st.lists(scalars, max_size=2) | st.dictionaries(names, scalars), max_size=3)
    | st.dictionaries(names, scalars, max_size=3)
)
fields = st.sampled_from(
    ["text", "input_ids", "prompt", "messages", "sampling_params", "stream", "n", "rid", "model", "echo"]
)


@given(st.sampled_from(list(Api)), st.dictionaries(fields, json_values))
def test_any_json_is_accepted_or_refused_with_a_reason(api: Api, body: dict[str, Any]) -> None:
    try:
        call = read(api, body)
    except BadRequest:
        return
    assert len(call.rids) == (1 if call.num_prompts is None else call.num_prompts)


def fields_of_class(path: str, name: str) -> list[str]:
    """The annotated fields of a class of SGLang, those of its bases first."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        pytest.skip("sglang is not installed")
    tree = ast.parse((Path(spec.origin).parent / "srt" / path).read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def fields(name: str) -> list[str]:
        if name not in classes:
            return []
        record = classes[name]
        bases = [field for base in record.bases if isinstance(base, ast.Name) for field in fields(base.id)]
        own = (node.target for node in record.body if isinstance(node, ast.AnnAssign))
        return bases + [target.id for target in own if isinstance(target, ast.Name)]

    return fields(name)


def test_sampling_fields_equal_sglangs() -> None:
    names = fields_of_class("sampling/sampling_params.py", "SamplingParams")
    public = names[: names.index("stop_strs")]
    assert set(public) == SAMPLING_FIELDS


@pytest.mark.parametrize(
    ("where", "path", "name", "others"),
    [
        # The router's own, which SGLang ignores.
        (In.NATIVE, "managers/io_struct.py", "GenerateReqInput", {"model", "user"}),
        # Read before the model is built; known to other servers only.
        (
            In.CHAT,
            "entrypoints/openai/protocol.py",
            "ChatCompletionRequest",
            {"reasoning", "use_beam_search"},
        ),
        (In.COMPLETIONS, "entrypoints/openai/protocol.py", "CompletionRequest", {"use_beam_search"}),
    ],
)
def test_each_field_of_sglangs_requests_has_a_row(where: In, path: str, name: str, others: set[str]) -> None:
    sglangs = {field for field in fields_of_class(path, name) if not field.startswith("_")}
    assert {field for field, _ in fields_of(where)} == sglangs | others


APIS = {
    In.NATIVE: Api.GENERATE,
    In.SAMPLING: Api.GENERATE,
    In.CHAT: Api.CHAT,
    In.COMPLETIONS: Api.COMPLETIONS,
}
FIELDS_BY_OBJECT = [(where, name) for where in In for name, _ in fields_of(where)]


def body_with(where: In, name: str, value: Any) -> tuple[Api, dict[str, Any]]:
    """The smallest valid body in which a field has `value`."""
    api = APIS[where]
    body: dict[str, Any] = {
        Api.GENERATE: {"text": "a"},
        Api.CHAT: {"messages": HELLO},
        Api.COMPLETIONS: {"prompt": "a"},
    }[api]
    if where is In.SAMPLING:
        return api, {**body, "sampling_params": {name: value}}
    return api, {**body, name: value}


ODD_VALUES = [
    *(5, -1, 0, 2**31, 2**63, 2**64, -(2**70), 10**400, 1.5, 6.0, 1e39, 1e308, -1e308, math.nan, math.inf),
    *(True, False, "", "x", "\x00", "([" * 200, [], [5], [10**6], [None], ["x"], [[5]], [1.5], [True]),
    *({}, {"5": 1}, {"5": 1e39}, {"5": "x"}, {"a": 1}, {"-1": 1}, {"10000": 1}, {"5": 2**2000}, [{}], [[{}]]),
    *([[[[[[]]]]]], {"a": {"b": {"c": {}}}}),
]


PROMPTS = ("text", "input_ids", "input_embeds")


def field_refused(api: Api, body: dict[str, Any]) -> str | None:
    """The field for which the router refuses a body; None: it accepts it."""
    try:
        read(api, body)
    except BadRequest as refused:
        return refused.field or "nothing named"
    return None


@pytest.mark.parametrize(("where", "name"), FIELDS_BY_OBJECT)
def test_odd_values_of_any_field_are_accepted_or_refused_by_its_name(where: In, name: str) -> None:
    for value in ODD_VALUES:
        api, body = body_with(where, name, value)
        refused_field = field_refused(api, body)
        assert refused_field is None or name in refused_field or name in PROMPTS


@pytest.mark.parametrize(("where", "name"), [row for row in FIELDS_BY_OBJECT if row[1] in KINDS[row[0]]])
def test_null_means_the_same_as_no_value(where: In, name: str) -> None:
    read(*body_with(where, name, None))


@pytest.mark.parametrize(
    ("where", "name", "accepted", "refused"),
    [
        (In.CHAT, "top_logprobs", [0, 20, 6.0], [21, -1, 101, 10**400, 1.5, "5", True, [1]]),
        (In.CHAT, "logprobs", [True, False], [1, "yes"]),
        (In.COMPLETIONS, "logprobs", [0, 20], [21, -1, True]),
        (In.NATIVE, "top_logprobs_num", [0, 100], [101, -1, 2**70, [1, 2]]),
        (In.NATIVE, "logprob_start_len", [-1, 0, 8], [-2, 9, 10**6]),
        (In.NATIVE, "token_ids_logprob", [[], [0, 99]], [[100], [-1], "x", 5, [1.0], [True], [0] * 101]),
        (In.SAMPLING, "stop_token_ids", [[0, 99], []], [[100], [-1], ["x"], 5, [2**70], [None]]),
        (In.CHAT, "stop_token_ids", [[99]], [[100]]),
        (In.COMPLETIONS, "stop_token_ids", [[99]], [[100]]),
        (In.SAMPLING, "logit_bias", [{"0": 1e30, "99": -1e30}, {}], [{"5": 1e31}, {"100": 1}, {"a": 1}, [1]]),
        (
            In.CHAT,
            "logit_bias",
            [{"0": 100, "99": -100}],
            [{"5": 101}, {"-1": 1}, {"5": "x"}, {"5": math.nan}],
        ),
        (In.COMPLETIONS, "logit_bias", [{"5": 0.5}], [{"5": -101}, {"²": 1}, {"5": True}]),
        (In.SAMPLING, "max_new_tokens", [0, 6.0, 2**62], [-1, 2**63, 1.5, math.inf]),
        (In.CHAT, "max_tokens", [1, 6.0], [0, 2**31, 6.5, "6"]),
        (In.SAMPLING, "min_new_tokens", [0, 2**31 - 1], [2**31, 2**40]),
        (In.SAMPLING, "temperature", [0, 1e-9, 1e6], [1e7, 1e308, -0.1, math.nan]),
        (In.SAMPLING, "repetition_penalty", [1e-6, 2], [0, 1e-45, 2.1]),
        (In.SAMPLING, "top_k", [-1, 0, 5], [-2, 2**40, 1.5]),
        (In.SAMPLING, "sampling_seed", [-(2**63), 2**63 - 1], [2**63]),
        (In.NATIVE, "priority", [-5, 5], ["high", 2**70]),
        (In.SAMPLING, "n", [1, 128, 2.0], [0, 129, True, "2"]),
        (In.SAMPLING, "stream_interval", [1], [0, -1, "a"]),
        (In.SAMPLING, "stop", ["", "a", ["a"] * 32], [5, [5], ["a"] * 33, "x" * 1025]),
        (In.SAMPLING, "stop_regex", ["a+", ["a", "b"]], ["([", 5, ["a", "(["], "a" * 257, "a{99999999999}"]),
        (In.CHAT, "stop_regex", ["a+"], ["(["]),
        (In.SAMPLING, "regex", ["a" * 1000, "([" * 50], [5, "a" * 300_000, "(" * 101]),
        (In.SAMPLING, "json_schema", ["{}"], [{"type": "object"}, '{"a":' * 101]),
        (In.CHAT, "response_format", [{"type": "text"}], [{"schema": nested(120)}, {"pattern": "(" * 200}]),
        (In.CHAT, "tools", [[{"type": "function"}]], [[nested(120)]]),
        (In.SAMPLING, "custom_params", [{}, {"a": [1, "x", None], "b": {"c": 1.5}}], [[1], {"a": {"b": {}}}]),
        (In.CHAT, "custom_params", [{"a": 1}], [{"a": 2**70}, {"__sglang_x": 1}]),
        (In.NATIVE, "positional_embed_overrides", [False], [{"a": 1}, 5, [], True]),
        (In.NATIVE, "disagg_prefill_dp_rank", [], [5, 0]),
        (In.CHAT, "bootstrap_room", [], [5]),
        (In.NATIVE, "extra_key", ["a"], [5, ["a"]]),
    ],
)
def test_bounds_of_fields(where: In, name: str, accepted: list[Any], refused: list[Any]) -> None:
    for value in accepted:
        read(*body_with(where, name, value))
    for value in refused:
        with pytest.raises(BadRequest) as caught:
            read(*body_with(where, name, value))
        assert caught.value.field == ("sampling_params." if where is In.SAMPLING else "") + name


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"top_logprobs_num": [1, 101]}, "top_logprobs_num[1]"),
        ({"top_logprobs_num": [1]}, "top_logprobs_num"),
        ({"return_logprob": [True, "x"]}, "return_logprob[1]"),
        ({"token_ids_logprob": [[5], [100]]}, "token_ids_logprob[1]"),
        ({"token_ids_logprob": [[5], 5]}, "token_ids_logprob[1]"),
        ({"token_ids_logprob": [5, 100]}, "token_ids_logprob"),
        ({"extra_key": ["a", 5]}, "extra_key[1]"),
        ({"sampling_params": [{}, {"stop_token_ids": [100]}]}, "sampling_params[1].stop_token_ids"),
    ],
)
def test_lists_of_one_value_per_prompt_are_checked(body: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        generate(text=["a", "b"], **body)
    assert caught.value.field == field


def test_lists_of_one_value_per_prompt_are_accepted() -> None:
    generate(text=["a", "b"], return_logprob=[True, False], top_logprobs_num=[1, None], token_ids_logprob=[5])
    generate(text=["a", "b"], token_ids_logprob=[[5], None], extra_key=["a", "b"])


def test_whole_numbers_become_integers() -> None:
    call = generate(text=["a"], sampling_params=[{"max_new_tokens": 6.0, "n": 2.0}])
    assert call.body["sampling_params"] == [{"max_new_tokens": 6, "n": 2}]
    assert (call.num_samples, call.answer_limit) == (2, 6)
    assert read(Api.CHAT, {"messages": HELLO, "max_tokens": 6.0}).answer_limit == 6
    assert str(generate(text="a", top_logprobs_num=3.0).body["top_logprobs_num"]) == "3"
    assert generate(text="a", sampling_params={"temperature": 1.0}).sampling == [{"temperature": 1.0}]


def test_bounds_of_an_unknown_model_are_those_of_the_numbers() -> None:
    assert read(Api.GENERATE, {"text": "a", "top_logprobs_num": 10**6}, ModelLimits())
    with pytest.raises(BadRequest):
        read(Api.GENERATE, {"text": "a", "top_logprobs_num": 2**40}, ModelLimits())
