"""The names of SGLang's sampling parameters, so that a misspelt one is refused and not a server error.

Source: SGLang, sampling_params.py, SamplingParams; a test holds the two equal.
"""

SAMPLING_FIELDS = frozenset(
    {
        "beam_width",
        "custom_params",
        "ebnf",
        "frequency_penalty",
        "ignore_eos",
        "json_schema",
        "logit_bias",
        "max_new_tokens",
        "min_new_tokens",
        "min_p",
        "n",
        "no_stop_trim",
        "presence_penalty",
        "regex",
        "repetition_penalty",
        "sampling_seed",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stop_regex",
        "stop_token_ids",
        "stream_interval",
        "structural_tag",
        "temperature",
        "top_k",
        "top_p",
        "watermark",
    }
)
