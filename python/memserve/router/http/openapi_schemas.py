"""The shapes of what goes in and out over HTTP, as JSON Schema: what the router checks, and no more.

Fields that are SGLang's are let through, so objects are open unless the router itself closes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from memserve.router.http.handlers.workers import DrainRequest, RoleRequest, Worker
from memserve.router.observability.live_series import Point
from memserve.router.proxy.validation import MAX_SAMPLES

Schema = dict[str, Any]

REF = "#/components/schemas/{name}"
STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXT: Schema = {"type": "string", "minLength": 1}
TOKEN_IDS: Schema = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": 255},
    "minItems": 1,
}
"""How large an id may be depends on the model; these every model has."""


def ref(name: str) -> Schema:
    """A schema by name."""
    return {"$ref": REF.format(name=name)}


def array(items: Schema, *, at_least: int = 0) -> Schema:
    """A list of these."""
    return {"type": "array", "items": items, "minItems": at_least}


def obj(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """An object with these fields, and maybe others."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def or_null(schema: Schema) -> Schema:
    """It, or nothing."""
    return {"anyOf": [schema, {"type": "null"}]}


_SAMPLING = {
    "max_new_tokens": or_null(COUNT),
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": MAX_SAMPLES},
    "stop": {"anyOf": [STRING, array(STRING)]},
    "ignore_eos": BOOLEAN,
}
_COMMON = {"stream": BOOLEAN, "rid": {"anyOf": [TEXT, array(TEXT, at_least=1)]}}
_OPENAI = {
    "model": {"type": "string", "description": "one of /v1/models; the only one if it is left out"},
    "stream": BOOLEAN,
    "max_tokens": or_null({"type": "integer", "minimum": 1}),
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": MAX_SAMPLES},
    "user": STRING,
}

GENERATE: Schema = {
    "type": "object",
    "description": "SGLang's GenerateReqInput: one of text, input_ids and input_embeds, and any other field.",
    "oneOf": [
        {"required": ["text"], "properties": {"text": {"anyOf": [TEXT, array(TEXT, at_least=1)]}}},
        {
            "required": ["input_ids"],
            "properties": {"input_ids": {"anyOf": [TOKEN_IDS, array(TOKEN_IDS, at_least=1)]}},
        },
        {"required": ["input_embeds"], "properties": {"input_embeds": array({}, at_least=1)}},
    ],
    "properties": {"sampling_params": {"type": "object", "properties": _SAMPLING}, **_COMMON},
}
CHAT: Schema = obj(
    {"messages": array(obj({"role": STRING}, {"content": {}}), at_least=1)},
    _OPENAI,
)
COMPLETION: Schema = obj(
    {"prompt": {"anyOf": [TEXT, array(TEXT, at_least=1), TOKEN_IDS, array(TOKEN_IDS, at_least=1)]}},
    {**_OPENAI, "echo": BOOLEAN},
)
ERROR: Schema = obj(
    {
        "error": obj(
            {"message": STRING},
            {
                "type": STRING,
                "param": {**or_null(STRING), "description": "the field of the request that is at fault"},
                "code": {"anyOf": [STRING, INTEGER, {"type": "null"}]},
                "retryable": {**BOOLEAN, "description": "the same request may succeed later"},
            },
        )
    }
)
_MODEL = obj(
    {"id": STRING, "object": {"const": "model"}, "created": INTEGER, "owned_by": STRING},
    {"root": STRING, "parent": or_null(STRING), "max_model_len": or_null(INTEGER)},
)
_ROLE = {"enum": ["prefill", "decode", "colocated"]}
_MEMBER = obj(
    {
        "instance_id": STRING,
        "role": _ROLE,
        "url": STRING,
        "bootstrap_port": or_null(INTEGER),
        "state": STRING,
        "draining": BOOLEAN,
        "reason": or_null(STRING),
        "registered": BOOLEAN,
        "model": or_null(STRING),
    }
)
_DRAINED = {"drained": BOOLEAN, "running": COUNT, "evacuated": or_null({"type": "object"})}
_REQUEST = obj(
    {
        "ended_s": NUMBER,
        "path": STRING,
        "rid": STRING,
        "request_id": STRING,
        "status": INTEGER,
        "seconds": NUMBER,
        "instances": STRING,
        "reason": STRING,
        "attempts": COUNT,
        "first_token_s": or_null(NUMBER),
        "num_events": COUNT,
        "prompt_tokens": or_null(COUNT),
        "cached_tokens": or_null(COUNT),
        "unknown": or_null(STRING),
    },
    {"expected_tokens": COUNT},
)
_CANDIDATE = obj(
    {
        "instance": STRING,
        **dict.fromkeys(("hbm_blocks", "blocks", "queued", "running"), COUNT),
        **dict.fromkeys(("queue_s", "load_s", "exec_s", "others_s", "recent_s", "total_s"), NUMBER),
    }
)
_DECISION = obj(
    {
        "prefill": STRING,
        "decode": or_null(STRING),
        "policies": obj({"prefill": STRING, "decode": STRING}),
        "reason": STRING,
        "prompt_tokens": COUNT,
        "page_tokens": COUNT,
        "tokens_unknown": or_null(STRING),
        "session": BOOLEAN,
        "fetch": or_null(obj({"source": STRING, "blocks": COUNT, "transfer_s": NUMBER, "saved_s": NUMBER})),
        "prefill_candidates": array(ref("Candidate")),
        "decode_candidates": array(ref("Candidate")),
        "memory": array(obj({"instance": STRING, "blocks": COUNT})),
    }
)
_PREFIX = obj(
    {
        "key": STRING,
        "blocks": COUNT,
        "tokens": or_null(COUNT),
        "by_text": BOOLEAN,
        "prompts": NUMBER,
        "sample": or_null(STRING),
        "holders": array(obj({"instance": STRING, "tier": {"enum": ["hbm", "dram"]}})),
    }
)
_READINESS = obj(
    {
        "ready": BOOLEAN,
        "reason": or_null(STRING),
        "prefill": COUNT,
        "decode": COUNT,
        "colocated": COUNT,
        "draining": COUNT,
    },
    {
        "not_ready": {"type": "object", "additionalProperties": STRING},
        "token_ids_not_checked": array(STRING),
        "placed_without_tokens": {"type": "object"},
    },
)


def schemas() -> dict[str, Schema]:
    """All that have a name."""
    _, checked = msgspec.json.schema_components([Worker, DrainRequest, RoleRequest, Point], ref_template=REF)
    return {
        **checked,
        "Generate": GENERATE,
        "Chat": CHAT,
        "Completion": COMPLETION,
        "Error": ERROR,
        "Model": _MODEL,
        "Models": obj({"object": {"const": "list"}, "data": array(ref("Model"))}),
        "Readiness": _READINESS,
        "Member": _MEMBER,
        "Members": obj({"workers": array(ref("Member")), "pools": array({"type": "object"})}),
        "Drained": obj({"instance_id": STRING, "state": STRING, **_DRAINED}),
        "Removed": obj({"instance_id": STRING, "removed": BOOLEAN, **_DRAINED}),
        "RoleChange": obj({"instance_id": STRING, "role": _ROLE, "stage": STRING, "reason": or_null(STRING)}),
        "Request": _REQUEST,
        "Requests": obj({"requests": array(ref("Request"))}),
        "Explained": {"allOf": [ref("Request"), obj({"decision": or_null(ref("Decision"))})]},
        "Candidate": _CANDIDATE,
        "Decision": _DECISION,
        "Prefix": _PREFIX,
        "Prefixes": obj({"prefixes": array(ref("Prefix"))}),
        "State": obj(
            {
                "now_s": NUMBER,
                "version": STRING,
                "uptime_s": NUMBER,
                "reason_unready": or_null(STRING),
                "waiting": COUNT,
                "instances": array({"type": "object"}),
                "hottest": array(ref("Prefix")),
                "requests": array(ref("Request")),
                "series": array(ref("Point")),
            }
        ),
    }
