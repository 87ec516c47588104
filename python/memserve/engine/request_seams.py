"""The SGLang internals that the guards against single requests rely on; checked as `sglang_internals`."""

from __future__ import annotations

from memserve.engine.sglang_internals import SCHEDULER_MODULE, Seam

TOKENIZER_MODULE = "sglang.srt.managers.tokenizer_manager"
NORMALIZE = "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments"
INITIAL_STATE = f"{TOKENIZER_MODULE}.TokenizerManager._init_req_state"
TOKENIZE = f"{TOKENIZER_MODULE}.TokenizerManager._tokenize_one_request"
TOKENIZE_BATCH = f"{TOKENIZER_MODULE}.TokenizerManager._batch_tokenize_and_process"
CREATE_REQUEST = f"{TOKENIZER_MODULE}.TokenizerManager._create_tokenized_object"
ENCODE = "sglang.srt.managers.io_struct:msgpack_encode"
DECODE = "sglang.srt.managers.io_struct:msgpack_decode"
HANDLE_REQUEST = f"{SCHEDULER_MODULE}.Scheduler.handle_generate_request"
ABORT = "sglang.srt.managers.io_struct:AbortReq"
_REQ = "sglang.srt.managers.schedule_batch"
FINISH_STATE = f"{_REQ}.Req.update_finish_state"
STOP_CHECK = f"{_REQ}.Req._check_str_based_finish"
FINISH_ABORT = f"{_REQ}:FINISH_ABORT"
FINISH_REGEX = f"{_REQ}:FINISHED_MATCHED_REGEX"
PREPARE_ABORT = "sglang.srt.disaggregation.utils.prepare_abort"
_XGRAMMAR = "sglang.srt.constrained.xgrammar_backend"
ACCEPT_TOKEN = f"{_XGRAMMAR}.XGrammarGrammar.accept_token"
FILL_MASK = f"{_XGRAMMAR}.XGrammarGrammar.fill_vocab_mask"
COMPILED = f"{_XGRAMMAR}.XGrammarGrammarBackend._from_context"
INVALID_GRAMMAR = "sglang.srt.constrained.base_grammar_backend:InvalidGrammarObject"
MODEL_WORKER = f"{SCHEDULER_MODULE}.Scheduler.init_model_worker"
SCALE_LOGITS = "sglang.srt.sampling.penaltylib.repetition_penalty:apply_scaling_penalties"
SEEDED_SAMPLE = "sglang.srt.layers.sampler:multinomial_with_seed"
GRAD_MODE = "sglang.srt.utils:DynamicGradMode"
EXECUTION = "sglang.srt.runtime_context:get_exec"


def _method(path: str) -> str:
    """The `module:Class.method` form of a hook's `module.Class.method`."""
    module, name, method = path.rsplit(".", 2)
    return f"{module}:{name}.{method}"


SEAMS = (
    Seam("normalization", _method(NORMALIZE), "refusing bodies that SGLang answers with 500"),
    Seam("state of a request", _method(INITIAL_STATE), "same", parameters=("obj",)),
    Seam("tokenization", _method(TOKENIZE), "same", parameters=("obj",)),
    Seam("tokenization of a batch", _method(TOKENIZE_BATCH), "same", parameters=("batch_size", "obj")),
    Seam(
        "request for the scheduler",
        _method(CREATE_REQUEST),
        "checking a request before the scheduler sees it",
        parameters=("obj",),
    ),
    Seam(
        "fields of a request",
        "sglang.srt.managers.io_struct:TokenizedGenerateReqInput",
        "same",
        members=(
            *("input_ids", "input_embeds", "input_text", "mm_inputs", "time_stats", "sampling_params"),
            *("top_logprobs_num", "token_ids_logprob", "logprob_start_len", "priority"),
            *("bootstrap_room", "bootstrap_port", "disagg_prefill_dp_rank"),
            *("multi_item_delimiter_indices", "token_indices_to_pool"),
        ),
    ),
    Seam(
        "sampling parameters",
        "sglang.srt.sampling.sampling_params:SamplingParams",
        "same",
        members=(
            *("temperature", "top_p", "top_k", "min_p", "n", "beam_width", "logit_bias"),
            *("frequency_penalty", "presence_penalty", "repetition_penalty"),
            *("min_new_tokens", "max_new_tokens", "stream_interval", "stop_token_ids"),
            *("stop_strs", "stop_regex_strs", "stop_regex_max_len"),
            *("json_schema", "regex", "ebnf", "structural_tag"),
        ),
    ),
    Seam("encoder of requests", ENCODE, "same", parameters=("obj",)),
    Seam("decoder of requests", DECODE, "same", parameters=("data",)),
    Seam(
        "arrival of a request",
        _method(HANDLE_REQUEST),
        "aborting a request whose arrival fails, and no other",
        parameters=("recv_req",),
    ),
    Seam(
        "abort of a request",
        f"{SCHEDULER_MODULE}:Scheduler.send_abort_output",
        "same",
        parameters=("abort_req", "req"),
    ),
    Seam("message of an abort", ABORT, "same", members=("finished_reason",)),
    Seam("finish state", _method(FINISH_STATE), "same", parameters=("new_accepted_len",)),
    Seam("aborted", FINISH_ABORT, "same", parameters=("message", "status_code", "err_type")),
    Seam(
        "stop check",
        _method(STOP_CHECK),
        "bounding the time of a stop_regex",
        parameters=("new_accepted_len",),
    ),
    Seam(
        "end of an answer",
        f"{_REQ}:Req",
        "same",
        members=("tail_str", "_stop_match_tail_len"),
    ),
    Seam("stopped by a regex", FINISH_REGEX, "same", parameters=("matched",)),
    Seam(
        "abort before the end",
        PREPARE_ABORT.replace(".prepare", ":prepare"),
        "telling a client's grammar from a server's failure",
        parameters=("req", "error_message", "status_code"),
    ),
    Seam("accepted token", _method(ACCEPT_TOKEN), "bounding the time of a grammar", parameters=("token",)),
    Seam("mask of a grammar", _method(FILL_MASK), "same", parameters=("vocab_mask", "idx")),
    Seam("compiled grammar", _method(COMPILED), "refusing a grammar that matches nothing"),
    Seam("invalid grammar", INVALID_GRAMMAR, "same"),
    Seam(
        "model worker", _method(MODEL_WORKER), "compiling the sampler's functions before the server is ready"
    ),
    Seam("repetition penalty", SCALE_LOGITS, "same", parameters=("logits", "scaling_penalties")),
    Seam("seeded sample", SEEDED_SAMPLE, "same", parameters=("logprobs", "seed", "positions")),
    Seam("grad mode", GRAD_MODE, "same, as the scheduler's loop calls them"),
    Seam("execution settings", EXECUTION, "same"),
)
