"""SGLang's request fields, one row each: where a client may set it, its bounds, and what depends on it.

Validation, tokenization, text keys, stream recovery and the OpenAPI document are derived from this table.
A field without a row is passed on as it is, and a stream whose request has one is resumed from its prompt.
Data only. Source: SGLang 0.5.23, managers/io_struct.py (GenerateReqInput), sampling/sampling_params.py
(SamplingParams), entrypoints/openai/protocol.py; a test compares the names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, Flag, auto

from memserve.router.field_kinds import (
    Boolean,
    GrammarText,
    Internal,
    Kind,
    Nested,
    Number,
    ProcessorParams,
    PromptPosition,
    Regexes,
    String,
    Strings,
    TokenBiases,
    TokenIds,
    TopTokens,
)


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
class Field:
    """One row of the table."""

    where: In
    kind: Kind | None = None
    """The values that the router lets pass; None: any JSON."""
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
    is_lost_in_pairs: bool = False
    """It asks for values of the prompt that a prefill server does not hand over."""
    kind_elsewhere: tuple[In, Kind] | None = None
    """Objects in which it has another kind."""

    def kind_in(self, where: In) -> Kind | None:
        """The values that the router lets pass in one object."""
        if self.kind_elsewhere is not None and where in self.kind_elsewhere[0]:
            return self.kind_elsewhere[1]
        return self.kind


SAMPLING, OPENAI, BODY, NATIVE = In.SAMPLING, In.OPENAI, In.BODY, In.NATIVE
FROM_TOKENS, NEVER = Resume.FROM_TOKENS, Resume.NEVER

BOOLEAN, STRING, TOKEN_IDS, INTERNAL = Boolean(), String(), TokenIds(), Internal()
GRAMMAR, OBJECT = GrammarText(), Nested()
COUNT = Number(0, 2**31 - 1, is_whole=True)
POSITIVE = Number(1, 2**31 - 1, is_whole=True)
INT64 = Number(-(2**63), 2**63 - 1, is_whole=True)
PENALTY = Number(-2, 2)
SAMPLES = Number(1, 128, is_whole=True)
LOGPROBS = TopTokens(20)
"""OpenAI's most."""
NATIVE_BIASES = TokenBiases(Number(-1e30, 1e30))
"""A float32 holds them, also divided by the lowest temperature."""

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
    "image_data": Field(NATIVE, unknown_tokens=MULTIMODAL, is_per_prompt=True, is_prompt=True),
    "video_data": Field(NATIVE, unknown_tokens=MULTIMODAL, is_per_prompt=True, is_prompt=True),
    "audio_data": Field(NATIVE, unknown_tokens=MULTIMODAL, is_per_prompt=True, is_prompt=True),
    "mm_hashes": Field(NATIVE),
    "mm_content_hashes": Field(NATIVE),
    "modalities": Field(NATIVE),
    "use_audio_in_video": Field(NATIVE | In.CHAT, BOOLEAN),
    "video_config": Field(NATIVE | In.CHAT, OBJECT),
    "images_config": Field(BODY, OBJECT),
    "mm_processor_kwargs": Field(BODY, OBJECT),
    "max_dynamic_patch": Field(NATIVE | In.CHAT, COUNT),
    "min_dynamic_patch": Field(NATIVE | In.CHAT, COUNT),
    "image_max_dynamic_patch": Field(NATIVE, COUNT),
    "video_max_dynamic_patch": Field(NATIVE, COUNT),
    "prompt": Field(In.COMPLETIONS, is_prompt=True),
    "suffix": Field(In.COMPLETIONS, STRING, seeds_text_keys=True, unknown_tokens="a suffix"),
    "echo": Field(In.COMPLETIONS, BOOLEAN),
    "messages": Field(In.CHAT, is_prompt=True),
    "tools": Field(In.CHAT, Nested((list,)), seeds_text_keys=True),
    "tool_choice": Field(In.CHAT, Nested((dict, str)), seeds_text_keys=True),
    "parallel_tool_calls": Field(In.CHAT, BOOLEAN),
    "chat_template_kwargs": Field(In.CHAT, OBJECT, seeds_text_keys=True),
    "continue_final_message": Field(In.CHAT, BOOLEAN),
    "reasoning_effort": Field(In.CHAT, seeds_text_keys=True, unrendered=REASONING),
    "reasoning": Field(In.CHAT, OBJECT, unrendered=REASONING),
    "thinking": Field(In.CHAT, unrendered=REASONING),
    "task": Field(In.CHAT),
    # ---- the request
    "model": Field(BODY, STRING),
    "stream": Field(BODY, BOOLEAN, FROM_TOKENS),
    "stream_options": Field(OPENAI, OBJECT),
    "rid": Field(BODY, resume=FROM_TOKENS),
    "user": Field(BODY, STRING, FROM_TOKENS),
    "priority": Field(BODY, INT64, FROM_TOKENS),
    "extra_key": Field(BODY, STRING, FROM_TOKENS, is_per_prompt=True),
    "cache_salt": Field(BODY, STRING, FROM_TOKENS, is_per_prompt=True),
    "lora_path": Field(BODY, STRING, seeds_text_keys=True, unknown_tokens=LORA, is_per_prompt=True),
    "session_id": Field(BODY, STRING, resume=NEVER, unknown_tokens=_SESSION),
    "session_params": Field(BODY, OBJECT, resume=NEVER, unknown_tokens=_SESSION),
    "sampling_params": Field(NATIVE, resume=FROM_TOKENS),
    "routing_key": Field(NATIVE, STRING),
    "conversation_id": Field(NATIVE, STRING),
    "custom_labels": Field(NATIVE | In.COMPLETIONS, OBJECT),
    "log_metrics": Field(NATIVE, BOOLEAN),
    "no_logs": Field(NATIVE, BOOLEAN),
    # ---- the length of the answer
    "max_new_tokens": Field(SAMPLING, Number(0, 2**63 - 1, is_whole=True), FROM_TOKENS),
    "min_new_tokens": Field(SAMPLING, COUNT, FROM_TOKENS),
    "max_tokens": Field(OPENAI, POSITIVE),
    "max_completion_tokens": Field(In.CHAT, POSITIVE),
    "min_tokens": Field(OPENAI, COUNT),
    "stop": Field(SAMPLING | OPENAI, Strings(max_bytes=1024), FROM_TOKENS),
    "stop_token_ids": Field(SAMPLING | OPENAI, TOKEN_IDS, FROM_TOKENS),
    "stop_regex": Field(SAMPLING | OPENAI, Regexes(Strings(max_bytes=256))),
    "ignore_eos": Field(SAMPLING | OPENAI, BOOLEAN, FROM_TOKENS),
    "no_stop_trim": Field(SAMPLING | OPENAI, BOOLEAN, FROM_TOKENS),
    "require_reasoning": Field(NATIVE, BOOLEAN),
    "max_thinking_tokens": Field(NATIVE, COUNT),
    # ---- how tokens are drawn
    "n": Field(SAMPLING | OPENAI, SAMPLES, FROM_TOKENS),
    "best_of": Field(In.COMPLETIONS, SAMPLES),
    "temperature": Field(SAMPLING | OPENAI, Number(0, 1e6), FROM_TOKENS),
    "top_p": Field(SAMPLING | OPENAI, Number(0, 1), FROM_TOKENS),
    "min_p": Field(SAMPLING | OPENAI, Number(0, 1), FROM_TOKENS),
    "top_k": Field(SAMPLING | OPENAI, Number(-1, 2**31 - 1, is_whole=True), FROM_TOKENS),
    "seed": Field(OPENAI, INT64),
    "sampling_seed": Field(SAMPLING, INT64, FROM_TOKENS),
    "logit_bias": Field(
        SAMPLING | OPENAI,
        TokenBiases(Number(-100, 100)),
        FROM_TOKENS,
        kind_elsewhere=(SAMPLING, NATIVE_BIASES),
    ),
    "frequency_penalty": Field(SAMPLING | OPENAI, PENALTY),
    "presence_penalty": Field(SAMPLING | OPENAI, PENALTY),
    "repetition_penalty": Field(SAMPLING | OPENAI, Number(1e-6, 2), neutral=1),
    "beam_width": Field(SAMPLING, SAMPLES, NEVER, neutral=1),
    "use_beam_search": Field(OPENAI, BOOLEAN, NEVER),
    "custom_logit_processor": Field(BODY, STRING, NEVER, is_per_prompt=True),
    "custom_params": Field(SAMPLING | OPENAI, ProcessorParams()),
    "watermark": Field(SAMPLING | BODY, OBJECT),
    # ---- grammars
    "ebnf": Field(SAMPLING | OPENAI, GRAMMAR),
    "json_schema": Field(SAMPLING | In.COMPLETIONS, GRAMMAR),
    "regex": Field(SAMPLING | OPENAI, GRAMMAR),
    "structural_tag": Field(SAMPLING, GRAMMAR),
    "response_format": Field(OPENAI, OBJECT),
    # ---- the form of the answer
    "skip_special_tokens": Field(SAMPLING | OPENAI, BOOLEAN, FROM_TOKENS),
    "spaces_between_special_tokens": Field(SAMPLING, BOOLEAN, FROM_TOKENS),
    "stream_interval": Field(SAMPLING, POSITIVE, FROM_TOKENS),
    "separate_reasoning": Field(In.CHAT, BOOLEAN),
    "stream_reasoning": Field(In.CHAT, BOOLEAN),
    "logprobs": Field(OPENAI, LOGPROBS, kind_elsewhere=(In.CHAT, BOOLEAN)),
    "top_logprobs": Field(In.CHAT, LOGPROBS),
    "return_logprob": Field(NATIVE, BOOLEAN, is_per_prompt=True),
    "logprob_start_len": Field(NATIVE, PromptPosition(), is_per_prompt=True),
    "top_logprobs_num": Field(NATIVE, TopTokens(), is_per_prompt=True),
    "token_ids_logprob": Field(NATIVE, TOKEN_IDS, is_per_prompt=True),
    "return_text_in_logprobs": Field(NATIVE, BOOLEAN),
    "return_flat_raw_top_logprobs": Field(NATIVE, BOOLEAN),
    "return_flat_raw_output_top_logprobs": Field(NATIVE | In.CHAT, BOOLEAN),
    "return_flat_raw_top_logprobs_b64": Field(NATIVE | In.CHAT, BOOLEAN),
    "return_hidden_states": Field(BODY, resume=NEVER, is_lost_in_pairs=True),
    "return_indexer_topk": Field(NATIVE, BOOLEAN, NEVER, is_lost_in_pairs=True),
    "return_routed_experts": Field(BODY, BOOLEAN, NEVER, is_lost_in_pairs=True),
    "routed_experts_start_len": Field(BODY, COUNT),
    "return_sampling_mask": Field(NATIVE | In.CHAT, BOOLEAN, NEVER, is_per_prompt=True),
    "sampling_logprobs_mode": Field(NATIVE | In.CHAT, STRING, is_per_prompt=True),
    "return_entropy": Field(NATIVE, BOOLEAN),
    "return_prompt_token_ids": Field(NATIVE | In.CHAT, BOOLEAN),
    "return_token_ids": Field(OPENAI, BOOLEAN),
    "return_cached_tokens_details": Field(OPENAI, BOOLEAN),
    "return_spec_tokens_details": Field(OPENAI, BOOLEAN),
    "return_meta_info": Field(In.CHAT, BOOLEAN),
    "return_input_ids_in_sglext": Field(In.CHAT, BOOLEAN),
    "return_output_ids_in_sglext": Field(In.CHAT, BOOLEAN),
    # ---- set by the router, and between SGLang's processes
    "bootstrap_host": Field(BODY, INTERNAL),
    "bootstrap_port": Field(BODY, INTERNAL),
    "bootstrap_room": Field(BODY, INTERNAL),
    "bootstrap_pair_key": Field(NATIVE, INTERNAL),
    "decode_tp_size": Field(NATIVE, INTERNAL),
    "routed_dp_rank": Field(BODY, INTERNAL),
    "data_parallel_rank": Field(BODY, INTERNAL),
    "disagg_prefill_dp_rank": Field(BODY, INTERNAL),
    "positional_embed_overrides": Field(NATIVE, INTERNAL),
    "kv_hints": Field(NATIVE, INTERNAL),
    "lora_id": Field(NATIVE, INTERNAL),
    "http_worker_ipc": Field(NATIVE, INTERNAL),
    "background": Field(NATIVE, INTERNAL),
    "return_bytes": Field(NATIVE, INTERNAL),
    "external_trace_header": Field(NATIVE, INTERNAL),
    "received_time": Field(NATIVE, INTERNAL),
    "need_wait_for_mm_inputs": Field(NATIVE, INTERNAL),
    "num_items_assigned": Field(NATIVE, INTERNAL),
    "encoder_urls": Field(NATIVE, INTERNAL),
    "multi_item_delimiter_indices": Field(NATIVE, INTERNAL),
    "token_indices_to_pool": Field(NATIVE, INTERNAL),
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


KINDS = {
    where: {name: kind for name, field in fields_of(where) if (kind := field.kind_in(where)) is not None}
    for where in In
}
"""The checked fields of each object, by name."""
LOST_IN_PAIRS = tuple(name for name, field in FIELDS.items() if field.is_lost_in_pairs)
SAMPLING_FIELDS = frozenset(name for name, _ in fields_of(SAMPLING))
TEXT_KEY_SEEDS = sorted(name for name, field in FIELDS.items() if field.seeds_text_keys)
UNKNOWN_TOKENS = {name: field.unknown_tokens for name, field in FIELDS.items() if field.unknown_tokens}
UNRENDERED = {name: field.unrendered for name, field in FIELDS.items() if field.unrendered}
RESUMED_FROM_TOKENS = {where: _names(where, FROM_TOKENS) for where in (NATIVE, SAMPLING)}
NEVER_RESUMED = _names(BODY | SAMPLING, NEVER)
