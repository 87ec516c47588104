"""Validates a request: bytes in, `GenerationRequest` out, or BadRequest with the field's name.

Pure. Rejects requests that would reach only one leg of a pair, crash a server, or hang there. Values that
every server refuses alike (odd sampling values, texts too long) are checked where that is cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from memserve.core.errors import BadRequest
from memserve.router.field_kinds import Kind, ModelLimits, Number, TokenIds
from memserve.router.request import Api, GenerationRequest, JsonObject, decode_json, part_names
from memserve.router.sglang_api import FIELDS, KINDS, SAMPLING_FIELDS, In


@dataclass(frozen=True, slots=True)
class _Prompts:
    """How many prompts a body has; None for a single prompt that is not in a list."""

    count: int | None


def read_body(raw: bytes) -> JsonObject:
    """The JSON object in a request's body."""
    if not raw.strip():
        raise BadRequest("the body is empty; send a JSON object")
    try:
        body = decode_json(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise BadRequest("the body is nested too deeply") from error
    if not isinstance(body, dict):
        raise BadRequest(f"the body is {_kind(body)}; send a JSON object")
    return body


def read_request(api: Api, body: JsonObject, limits: ModelLimits, new_rid: str) -> GenerationRequest:
    """The request in `body`, which is kept unchanged. `new_rid` is its id if the body gives none."""
    prompts = _PROMPT_READERS[api](body, limits)
    body = _checked(body, _OBJECTS[api], "", prompts, limits)
    if api is Api.GENERATE:
        body, num_samples = _read_sampling_params(body, prompts, limits)
    else:
        num_samples = _samples(body)
    rid, rids, is_clients = _read_rid(body, prompts, new_rid)
    model = body.get("model")
    return GenerationRequest(
        api=api,
        body=body,
        rid=rid,
        has_client_rid=is_clients,
        rids=rids,
        num_prompts=prompts.count,
        num_samples=num_samples,
        model=model if isinstance(model, str) else None,
    )


def _read_generate(body: JsonObject, limits: ModelLimits) -> _Prompts:
    given = [name for name in ("text", "input_ids", "input_embeds") if body.get(name) is not None]
    if not given:
        raise BadRequest("text, input_ids or input_embeds is missing", field="text")
    if len(given) > 1:
        raise BadRequest(f"{' and '.join(given)} exclude each other", field=given[1])
    value = body[given[0]]
    if given[0] == "input_ids":
        return _check_ids(value, "input_ids", limits)
    if given[0] == "text":
        return _check_text(value, "text", limits)
    return _check_embeddings(value)


def _check_embeddings(value: object) -> _Prompts:
    if isinstance(value, list) and value and isinstance(value[0], list) and value[0]:
        is_batch = isinstance(value[0][0], list)
        for vectors in value if is_batch else [value]:
            if not isinstance(vectors, list) or not all(isinstance(one, list) and one for one in vectors):
                break
            if len(set(map(len, vectors))) != 1:
                break
        else:
            return _Prompts(len(value) if is_batch else None)
    raise BadRequest(
        "input_embeds has to be a list of vectors of one length, or a list of those", field="input_embeds"
    )


def _read_chat(body: JsonObject, limits: ModelLimits) -> _Prompts:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages has to be a list with at least one message", field="messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            name = f"messages[{number}]"
            raise BadRequest(f"{name} has to be an object with a role", field=name)
    if body.get("input_ids") is not None and _check_ids(body["input_ids"], "input_ids", limits).count:
        raise BadRequest("input_ids has to be one list of token ids", field="input_ids")
    return _Prompts(None)


def _read_completions(body: JsonObject, limits: ModelLimits) -> _Prompts:
    prompt = body.get("prompt")
    if prompt in (None, "", []):
        raise BadRequest("prompt is missing or empty", field="prompt")
    if isinstance(prompt, str) or (isinstance(prompt, list) and isinstance(prompt[0], str)):
        return _check_text(prompt, "prompt", limits)
    return _check_ids(prompt, "prompt", limits)


_PROMPT_READERS: dict[Api, Callable[[JsonObject, ModelLimits], _Prompts]] = {
    Api.GENERATE: _read_generate,
    Api.CHAT: _read_chat,
    Api.COMPLETIONS: _read_completions,
}


_OBJECTS = {Api.GENERATE: In.NATIVE, Api.CHAT: In.CHAT, Api.COMPLETIONS: In.COMPLETIONS}


def _check_text(value: object, field: str, limits: ModelLimits) -> _Prompts:
    if isinstance(value, str):
        _check_not_empty(value, field, limits)
        return _Prompts(None)
    if not isinstance(value, list) or not value:
        raise BadRequest(f"{field} has to be a string or a list of strings, not {_kind(value)}", field=field)
    for number, one in enumerate(value):
        if not isinstance(one, str):
            name = f"{field}[{number}]"
            raise BadRequest(f"{name} has to be a string, not {_kind(one)}", field=name)
        _check_not_empty(one, f"{field}[{number}]", limits)
    return _Prompts(len(value))


def _check_not_empty(text: str, field: str, limits: ModelLimits) -> None:
    if not text and not limits.takes_empty_text:
        raise BadRequest(f"{field} is empty: this model's tokenizer gives no token for it", field=field)


def _check_ids(value: object, field: str, limits: ModelLimits) -> _Prompts:
    """A token id outside the vocabulary would end an SGLang server, and hang every later request."""
    if not isinstance(value, list):
        raise BadRequest(f"{field} has to be a list of token ids, not {_kind(value)}", field=field)
    if not value or not isinstance(value[0], list):
        _check_prompt_ids(value, field, limits)
        return _Prompts(None)
    for number, one in enumerate(value):
        name = f"{field}[{number}]"
        if not isinstance(one, list):
            raise BadRequest(f"{name} has to be a list of token ids, not {_kind(one)}", field=name)
        _check_prompt_ids(one, name, limits)
    return _Prompts(len(value))


def _check_prompt_ids(ids: list[object], field: str, limits: ModelLimits) -> None:
    if not ids:
        raise BadRequest(f"{field} is empty", field=field)
    if set(map(type, ids)) != {int}:
        number, wrong = next((i, one) for i, one in enumerate(ids) if type(one) is not int)
        name = f"{field}[{number}]"
        raise BadRequest(f"{name} has to be a token id, not {_kind(wrong)}", field=name)
    lowest, highest = min(ids), max(ids)  # type: ignore[type-var]
    bound = 2**31 if limits.vocab_size is None else limits.vocab_size
    for wrong in (lowest, highest):
        if not 0 <= wrong < bound:  # type: ignore[operator]
            name = f"{field}[{ids.index(wrong)}]"
            raise BadRequest(f"{name} is {wrong}: token ids of this model are 0 to {bound - 1}", field=name)
    if limits.context_tokens is not None and len(ids) >= limits.context_tokens:
        raise BadRequest(
            f"{field} has {len(ids)} tokens, the model's context is {limits.context_tokens}: "
            f"at most {limits.context_tokens - 1} fit",
            field=field,
        )


def _read_sampling_params(body: JsonObject, prompts: _Prompts, limits: ModelLimits) -> tuple[JsonObject, int]:
    """The body of /generate with checked parameters, and the number of samples that it asks for."""
    params = body.get("sampling_params")
    if params is None:
        return body, 1
    if isinstance(params, dict):
        checked = _checked_sampling(params, "sampling_params", limits)
        return _with(body, "sampling_params", checked), _samples(checked)
    if not isinstance(params, list) or prompts.count is None:
        wanted = "an object" if prompts.count is None else "an object, or a list of one per prompt"
        raise BadRequest(f"sampling_params has to be {wanted}, not {_kind(params)}", field="sampling_params")
    _check_count(params, "sampling_params", prompts)
    each = []
    for number, one in enumerate(params):
        name = f"sampling_params[{number}]"
        if not isinstance(one, dict):
            raise BadRequest(f"{name} has to be an object, not {_kind(one)}", field=name)
        each.append(_checked_sampling(one, name, limits))
    counts = set(map(_samples, each))
    if len(counts) > 1:
        raise BadRequest("sampling_params: n has to be the same for all prompts", field="sampling_params")
    is_same = all(one is other for one, other in zip(each, params, strict=True))
    return body if is_same else {**body, "sampling_params": each}, counts.pop()


def _checked_sampling(params: JsonObject, field: str, limits: ModelLimits) -> JsonObject:
    if unknown := sorted(params.keys() - SAMPLING_FIELDS):
        name = f"{field}.{unknown[0]}"
        raise BadRequest(f"{name} is not a sampling parameter", field=name)
    return _checked(params, In.SAMPLING, field + ".", _Prompts(None), limits)


def _samples(params: JsonObject) -> int:
    """The number of samples per prompt. With beam search n is how many beams are returned: one request."""
    n, beam_width = params.get("n"), params.get("beam_width")
    if not isinstance(n, int) or (isinstance(beam_width, int) and beam_width > 1):
        return 1
    return n


def _checked(
    values: JsonObject, where: In, prefix: str, prompts: _Prompts, limits: ModelLimits
) -> JsonObject:
    """The object `values` after a check of its fields, with whole numbers such as 6.0 as integers.

    It is `values` itself if there are none. Raises BadRequest.
    """
    kinds = KINDS[where]
    for name in kinds.keys() & values.keys():
        value, kind, field = values[name], kinds[name], prefix + name
        if value is None:
            continue
        named = [(field, value)]
        may_be_list = prompts.count is not None and FIELDS[name].is_per_prompt
        if may_be_list and isinstance(value, list) and _has_values_of(kind, value):
            _check_count(value, field, prompts)
            named = [(f"{field}[{number}]", one) for number, one in enumerate(value)]
        for one_field, one in named:
            wanted = None if one is None else kind.problem(one, limits)
            if wanted is not None:
                raise BadRequest(f"{one_field} has to be {wanted}", field=one_field)
        if isinstance(value, float) and (not isinstance(kind, Number) or kind.is_whole):
            values = _with(values, name, int(value))
    return values


def _has_values_of(kind: Kind, values: list[object]) -> bool:
    """Whether `values` are values of `kind`, not one value that is a list."""
    return not isinstance(kind, TokenIds) or any(isinstance(one, list) for one in values)


def _check_count(values: list[object], field: str, prompts: _Prompts) -> None:
    if len(values) != prompts.count:
        raise BadRequest(f"{field} has {len(values)} entries for {prompts.count} prompts", field=field)


def _with(values: JsonObject, name: str, value: object) -> JsonObject:
    return values if values.get(name) is value else {**values, name: value}


def _read_rid(body: JsonObject, prompts: _Prompts, new_rid: str) -> tuple[str, tuple[str, ...], bool]:
    """The request's id, the ids of its prompts, and whether the client chose them."""
    given = body.get("rid")
    if isinstance(given, list) and prompts.count is not None:
        names = [one for one in given if isinstance(one, str) and one]
        if len(names) != len(given) or len(given) != prompts.count or len(set(names)) != len(names):
            raise BadRequest(f"rid has to be {prompts.count} different strings, one per prompt", field="rid")
        return names[0], tuple(names), True
    if given is not None and (not isinstance(given, str) or not given):
        raise BadRequest(f"rid has to be a string that is not empty, not {_kind(given)}", field="rid")
    if prompts.count is None:
        rid = given if isinstance(given, str) else new_rid
        return rid, (rid,), given is not None
    if isinstance(given, str):  # as SGLang names them
        return given, tuple(f"{given}_{i}" for i in range(prompts.count)), True
    return new_rid, part_names(new_rid, prompts.count), False


def _kind(value: object) -> str:
    """The JSON type of `value`, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "something else")
