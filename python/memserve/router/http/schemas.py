"""Bodies and answers of the HTTP API as types, from which the OpenAPI document takes its schemas.

Required fields have no default. Objects are open: SGLang's own fields pass through. Knows no handlers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from memserve.core.block_addr import LOCAL_TIERS
from memserve.router.field_kinds import Schema
from memserve.router.records import SeriesPoint
from memserve.router.sglang_api import KINDS, In

Count = Annotated[int, Meta(ge=0)]
Object = dict[str, Any]
RoleName = Literal["prefill", "decode", "colocated"]
TierName = Annotated[str, Meta(extra_json_schema={"enum": [tier.name.lower() for tier in LOCAL_TIERS]})]

REF = "#/components/schemas/{name}"
STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
INTEGER: Schema = {"type": "integer"}
TEXT: Schema = {"type": "string", "minLength": 1}
TOKEN_IDS: Schema = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": 255},
    "minItems": 1,
}
"""The largest token id depends on the model; every model has these."""


def ref(name: str) -> Schema:
    """A reference to the component `name`."""
    return {"$ref": REF.format(name=name)}


def array(items: Schema, *, at_least: int = 0) -> Schema:
    """An array of `items`."""
    return {"type": "array", "items": items, "minItems": at_least}


def obj(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """An object with these fields; other fields are allowed."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def or_null(schema: Schema) -> Schema:
    """`schema`, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


# ---- bodies of SGLang and OpenAI: what the router checks, and no more


def _fields(where: In) -> dict[str, Schema]:
    """The fields of SGLang that the router checks in `where`."""
    return {name: or_null(kind.schema()) for name, kind in KINDS[where].items()}


MODEL = {"type": "string", "description": "one of /v1/models; may be omitted if there is only one"}
PROMPT = {"anyOf": [TEXT, array(TEXT, at_least=1), TOKEN_IDS, array(TOKEN_IDS, at_least=1)]}

REQUEST_BODIES: dict[str, Schema] = {
    "Generate": {
        "type": "object",
        "description": "SGLang's GenerateReqInput: one of text, input_ids, input_embeds; any other field.",
        "oneOf": [
            {"required": ["text"], "properties": {"text": {"anyOf": [TEXT, array(TEXT, at_least=1)]}}},
            {
                "required": ["input_ids"],
                "properties": {"input_ids": {"anyOf": [TOKEN_IDS, array(TOKEN_IDS, at_least=1)]}},
            },
            {"required": ["input_embeds"], "properties": {"input_embeds": array({}, at_least=1)}},
        ],
        "properties": {
            **_fields(In.NATIVE),
            "sampling_params": {"type": "object", "properties": _fields(In.SAMPLING)},
            "rid": {"anyOf": [TEXT, array(TEXT, at_least=1)]},
        },
    },
    "Chat": obj(
        {"messages": array(obj({"role": STRING}, {"content": {}}), at_least=1)},
        {**_fields(In.CHAT), "model": MODEL},
    ),
    "Completion": obj({"prompt": PROMPT}, {**_fields(In.COMPLETIONS), "model": MODEL}),
}


# ---- bodies and answers of the router's own


class ErrorDetail(Struct):
    message: str
    type: str | UnsetType = UNSET
    param: Annotated[str | None, Meta(description="the field of the request that is at fault")] = None
    code: str | int | None = None
    retryable: Annotated[bool, Meta(description="the same request may succeed later")] = False


class ErrorAnswer(Struct):
    error: ErrorDetail


class Abort(Struct):
    rid: str | list[str] | None = None
    abort_all: bool = False


class Concatenation(Struct):
    src_rids: list[str]
    dst_rid: str


class Success(Struct):
    success: bool


class Version(Struct):
    version: str


class LoadList(Struct):
    timestamp: str
    version: str
    loads: list[Object]


class ModelCard(Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str | UnsetType = UNSET
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(Struct):
    object: Literal["list"]
    data: list[ModelCard]


class Readiness(Struct):
    ready: bool
    reason: str | None
    prefill: Count
    decode: Count
    colocated: Count
    draining: Count
    not_ready: dict[str, str] | UnsetType = UNSET
    token_ids_not_checked: list[str] | UnsetType = UNSET
    placed_without_tokens: Object | UnsetType = UNSET


class WorkerStatus(Struct):
    instance_id: str
    role: RoleName
    url: str
    bootstrap_port: int | None
    state: str
    draining: bool
    reason: str | None
    registered: bool
    model: str | None


class WorkerList(Struct):
    workers: list[WorkerStatus]
    pools: list[Object]


class UrlList(Struct):
    urls: list[str]


class _Drained(Struct):
    instance_id: str
    drained: bool
    running: Count
    evacuated: Object | None


class DrainResult(_Drained):
    state: str


class RemoveResult(_Drained):
    removed: bool


class RoleResult(Struct):
    instance_id: str
    role: RoleName
    stage: str
    reason: str | None


class CandidateScore(Struct):
    instance: str
    hbm_blocks: Count
    dram_blocks: Count
    blocks: Count
    queued: Count
    running: Count
    queue_s: float
    load_s: float
    exec_s: float
    others_s: float
    recent_s: float
    total_s: float


class FetchReport(Struct):
    source: str
    blocks: Count
    transfer_s: float
    saved_s: float


class PolicyNames(Struct):
    prefill: str
    decode: str


class InstanceBlocks(Struct):
    instance: str
    blocks: Count


class DecisionReport(Struct):
    prefill: str
    decode: str | None
    policies: PolicyNames
    reason: str
    prompt_tokens: Count
    page_tokens: Count
    tokens_unknown: str | None
    session: bool
    fetch: FetchReport | None
    prefill_candidates: list[CandidateScore]
    decode_candidates: list[CandidateScore]
    memory: list[InstanceBlocks]


class RecentRequest(Struct, kw_only=True):
    ended_s: float
    path: str
    rid: str
    request_id: str
    status: int
    seconds: float
    instances: str
    reason: str
    attempts: Count
    first_token_s: float | None
    num_events: Count
    prompt_tokens: Count | None
    cached_tokens: Count | None
    unknown: str | None
    expected_tokens: Count | UnsetType = UNSET


class RecentRequests(Struct):
    requests: list[RecentRequest]


class RequestDetail(RecentRequest, kw_only=True):
    decision: DecisionReport | None


class PrefixHolder(Struct):
    instance: str
    tier: TierName


class PrefixReport(Struct):
    key: str
    blocks: Count
    tokens: Count | None
    by_text: bool
    prompts: float
    sample: str | None
    holders: list[PrefixHolder]


class PrefixList(Struct):
    prefixes: list[PrefixReport]


class DashboardState(Struct):
    now_s: float
    version: str
    uptime_s: float
    reason_unready: str | None
    waiting: Count
    instances: list[Object]
    hottest: list[PrefixReport]
    requests: list[RecentRequest]
    series: list[SeriesPoint]


def schema_of(kind: Any) -> Schema:
    """A schema as it is, or that of a type; components by reference."""
    if isinstance(kind, dict):
        return kind
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=REF)
    return schema


def components(kinds: list[Any]) -> dict[str, Schema]:
    """The named schemas that the types among `kinds` need, and the request bodies that are not types."""
    types = [ErrorAnswer, *(kind for kind in kinds if not isinstance(kind, dict))]
    _, named = msgspec.json.schema_components(types, ref_template=REF)
    return {**named, **REQUEST_BODIES}
