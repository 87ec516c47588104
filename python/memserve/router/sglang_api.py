"""SGLang's request fields, one row each: where a client may set it, its bounds, and what depends on it.

Validation, tokenization, text keys, stream recovery and the OpenAPI document are derived from this table.
A field without a row is passed on as it is, and a stream whose request has one is resumed from its prompt.
Data only. Source: SGLang 0.5.23, managers/io_struct.py (GenerateReqInput), sampling/sampling_params.py
(SamplingParams), entrypoints/openai/protocol.py; a test compares the names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, Flag, auto


class In(Flag):
    """The objects in which a client may set a field."""

    NATIVE = auto()
    """The body of /generate."""
    SAMPLING = auto()
    """`sampling_params` of /generate."""
    CHAT = auto()
    """The body of /v1/chat/completions."""
    COMPLETIONS = auto()
    """The body of /v1/completions."""
    OPENAI = CHAT | COMPLETIONS
    BODY = NATIVE | OPENAI


class Resume(Enum):
    """How a broken stream whose request sets the field can be resumed."""

    FROM_TOKENS = auto()
    """The next token depends on the field and the tokens before, which can stand in the prompt."""
    FROM_PROMPT = auto()
    """It depends on which tokens were generated: the answer has to be generated again."""
    NEVER = auto()
    """A server keeps state for it, or answers with more than text."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number within bounds, both included."""

    lowest: float
    highest: float = math.inf
    is_whole: bool = False

    def __contains__(self, value: object) -> bool:
        kinds = (int,) if self.is_whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        return math.isfinite(value) and self.lowest <= value <= self.highest

    def __str__(self) -> str:
        kind = "a whole number" if self.is_whole else "a number"
        upper = "" if self.highest == math.inf else f", at most {self.highest:g}"
        return f"{kind}, at least {self.lowest:g}{upper}"


BOOLEAN, STRING = bool, str


@dataclass(frozen=True, slots=True)
class Field:
    """One row of the table."""

    where: In
    kind: Number | type | None = None
    """A number's bounds, which the router checks; `bool` or `str`; None: any JSON."""
    resume: Resume = Resume.FROM_PROMPT
    neutral: object = None
    """A value that means the same as none, beside null, false, 0 and those that are empty."""
    seeds_text_keys: bool = False
    """It changes the prompt from its beginning on, though not the prompt's text."""
    unknown_tokens: str | None = None
    """Why only a server can tell the tokens of a request that sets it; a label of a metric."""
    unrendered: str | None = None
    """Why the router cannot render a chat that sets it."""
    is_per_prompt: bool = False
    """In a batch it may be a list of one value per prompt."""
    is_prompt: bool = False
    """It is a prompt, or a part of it."""


SAMPLING, OPENAI, BODY, NATIVE = In.SAMPLING, In.OPENAI, In.BODY, In.NATIVE
FROM_TOKENS, NEVER = Resume.FROM_TOKENS, Resume.NEVER

MAX_SAMPLES = 128
COUNT = Number(0, is_whole=True)
POSITIVE = Number(1, is_whole=True)
PENALTY = Number(-2, 2)
SEED = Number(-(2**63), 2**63 - 1, is_whole=True)

MULTIMODAL = "multimodal content"
REASONING = "reasoning settings"
LORA = "a LoRA adapter"
_EMBEDDINGS = "embeddings in place of tokens"
_SESSION = "a session, whose tokens a server has"

FIELDS = {
    # ---- prompts
    "text": Field(NATIVE, resume=FROM_TOKENS, is_per_prompt=True, is_prompt=True),
    "input_ids": Field(NATIVE | In.CHAT, resume=FROM_TOKENS, is_per_prompt=True, is_prompt=True),
    "input_embeds": Field(NATIVE, unknown_tokens=_EMBEDDINGS, is_per_prompt=True, is_prompt=True),
    "positional_embed_overrides": Field(NATIVE, unknown_tokens=_EMBEDDINGS),
    "image_data": Field(NATIVE, unknown_tokens=MULTIMODAL, is_per_prompt=True, is_prompt=True),
    "video_data": Field(NATIVE, unknown_tokens=MULTIMODAL, is_per_prompt=True, is_prompt=True),
    "audio_data": Field(NATIVE, unknown_tokens=MULTIMODAL, is_per_prompt=True, is_prompt=True),
    "prompt": Field(In.COMPLETIONS, is_prompt=True),
    "suffix": Field(In.COMPLETIONS, seeds_text_keys=True, unknown_tokens="a suffix"),
    "echo": Field(In.COMPLETIONS, BOOLEAN),
    "messages": Field(In.CHAT, is_prompt=True),
    "tools": Field(In.CHAT, seeds_text_keys=True),
    "tool_choice": Field(In.CHAT, seeds_text_keys=True),
    "chat_template_kwargs": Field(In.CHAT, seeds_text_keys=True),
    "reasoning_effort": Field(In.CHAT, seeds_text_keys=True, unrendered=REASONING),
    "reasoning": Field(In.CHAT, unrendered=REASONING),
    "thinking": Field(In.CHAT, unrendered=REASONING),
    # ---- the request
    "model": Field(BODY, STRING),
    "stream": Field(BODY, BOOLEAN, FROM_TOKENS),
    "rid": Field(BODY, resume=FROM_TOKENS),
    "user": Field(BODY, STRING, FROM_TOKENS),
    "priority": Field(BODY, resume=FROM_TOKENS),
    "extra_key": Field(BODY, resume=FROM_TOKENS, is_per_prompt=True),
    "cache_salt": Field(BODY, resume=FROM_TOKENS, is_per_prompt=True),
    "lora_path": Field(BODY, seeds_text_keys=True, unknown_tokens=LORA, is_per_prompt=True),
    "session_id": Field(BODY, resume=NEVER, unknown_tokens=_SESSION),
    "session_params": Field(BODY, resume=NEVER, unknown_tokens=_SESSION),
    "sampling_params": Field(NATIVE, resume=FROM_TOKENS),
    # ---- the length of the answer
    "max_new_tokens": Field(SAMPLING, COUNT, FROM_TOKENS),
    "min_new_tokens": Field(SAMPLING, COUNT, FROM_TOKENS),
    "max_tokens": Field(OPENAI, POSITIVE),
    "max_completion_tokens": Field(In.CHAT, POSITIVE),
    "min_tokens": Field(OPENAI, COUNT),
    "stop": Field(SAMPLING | OPENAI, resume=FROM_TOKENS),
    "stop_token_ids": Field(SAMPLING | OPENAI, resume=FROM_TOKENS),
    "stop_regex": Field(SAMPLING | OPENAI),
    "ignore_eos": Field(SAMPLING | OPENAI, BOOLEAN, FROM_TOKENS),
    "no_stop_trim": Field(SAMPLING | OPENAI, BOOLEAN, FROM_TOKENS),
    # ---- how tokens are drawn
    "n": Field(SAMPLING | OPENAI, Number(1, MAX_SAMPLES, is_whole=True), FROM_TOKENS),
    "temperature": Field(SAMPLING | OPENAI, Number(0), FROM_TOKENS),
    "top_p": Field(SAMPLING | OPENAI, Number(0, 1), FROM_TOKENS),
    "min_p": Field(SAMPLING | OPENAI, Number(0, 1), FROM_TOKENS),
    "top_k": Field(SAMPLING | OPENAI, Number(-1, is_whole=True), FROM_TOKENS),
    "seed": Field(OPENAI, SEED),
    "sampling_seed": Field(SAMPLING, SEED, FROM_TOKENS),
    "logit_bias": Field(SAMPLING | OPENAI, resume=FROM_TOKENS),
    "frequency_penalty": Field(SAMPLING | OPENAI, PENALTY),
    "presence_penalty": Field(SAMPLING | OPENAI, PENALTY),
    "repetition_penalty": Field(SAMPLING | OPENAI, Number(0, 2), neutral=1),
    "beam_width": Field(SAMPLING, resume=NEVER, neutral=1),
    "use_beam_search": Field(OPENAI, resume=NEVER),
    "custom_logit_processor": Field(BODY, resume=NEVER, is_per_prompt=True),
    "custom_params": Field(SAMPLING),
    "watermark": Field(SAMPLING),
    # ---- grammars
    "ebnf": Field(SAMPLING | OPENAI),
    "json_schema": Field(SAMPLING),
    "regex": Field(SAMPLING | OPENAI),
    "structural_tag": Field(SAMPLING),
    # ---- the form of the answer
    "skip_special_tokens": Field(SAMPLING | OPENAI, BOOLEAN, FROM_TOKENS),
    "spaces_between_special_tokens": Field(SAMPLING, BOOLEAN, FROM_TOKENS),
    "stream_interval": Field(SAMPLING, resume=FROM_TOKENS),
    "return_logprob": Field(NATIVE, is_per_prompt=True),
    "logprob_start_len": Field(NATIVE, is_per_prompt=True),
    "top_logprobs_num": Field(NATIVE, is_per_prompt=True),
    "return_hidden_states": Field(BODY, resume=NEVER),
    "return_indexer_topk": Field(NATIVE, resume=NEVER),
    "return_routed_experts": Field(BODY, resume=NEVER),
    "return_sampling_mask": Field(NATIVE | In.CHAT, resume=NEVER),
}

OUTPUT_LIMITS = ("max_new_tokens", "max_completion_tokens", "max_tokens")
"""The fields that bound the length of the answer; the first one that is set counts."""
DEFAULT_OUTPUT_TOKENS = 256
"""The length that an answer without a limit is counted as."""


def fields_of(where: In) -> Iterator[tuple[str, Field]]:
    """The rows that can stand in one of the objects `where`, by name."""
    return ((name, field) for name, field in FIELDS.items() if field.where & where)


def _names(where: In, resume: Resume) -> frozenset[str]:
    return frozenset(name for name, field in fields_of(where) if field.resume is resume)


NUMBERS = {
    name: field.kind for name, field in FIELDS.items() if isinstance(field.kind, Number) and name != "n"
}
"""The fields whose bounds are the same in every object."""
SAMPLING_FIELDS = frozenset(name for name, _ in fields_of(SAMPLING))
TEXT_KEY_SEEDS = sorted(name for name, field in FIELDS.items() if field.seeds_text_keys)
UNKNOWN_TOKENS = {name: field.unknown_tokens for name, field in FIELDS.items() if field.unknown_tokens}
UNRENDERED = {name: field.unrendered for name, field in FIELDS.items() if field.unrendered}
RESUMED_FROM_TOKENS = {where: _names(where, FROM_TOKENS) for where in (NATIVE, SAMPLING)}
NEVER_RESUMED = _names(BODY | SAMPLING, NEVER)
