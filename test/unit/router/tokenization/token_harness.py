"""Small models with real special tokens and chat templates, and SGLang's own reading of requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's 12345 times that we'll say: hello, world!",
    "user assistant system tool weather in Oslo and Rome; the city is raining\n\n  def f(x): return x**2",
    "naïve café Ångström 日本語 한국어 🙂 {'name': \"value\", [1, 2, 3]} <b>html</b>",
] * 4

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# After Llama 3.1's: strips what is said, prints tools as JSON, takes the day from a variable.
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}{{- message | tojson }}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""
# After Qwen 3's: tools, tool calls, thinking that may be turned off.
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- if message.reasoning_content is defined %}{{- '<think>' + message.reasoning_content }}{%- endif %}
        {%- generation %}{{- '<|im_start|>assistant\n' + message.content }}{%- endgeneration %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}{%- continue %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>' }}{%- endif %}
{%- endif %}
"""
# After Mistral's: bare functions for tools, and turns that must alternate.
MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and loop.last %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}{{- '{"type": "function", "name": "' + tool.name + '"}' }}{%- endfor %}
            {{- ']' }}
        {%- endif %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}
{%- endfor %}
"""
# Loops over the parts of a content that SGLang leaves in parts.
PARTS = """\
{%- for message in messages %}<|user|>
{%- if message.content is string %}{{ message.content }}
{%- else %}{%- for part in message['content'] %}[{{ part.type }}]{{ part.text }}{%- endfor %}{%- endif %}
{{- message | tojson }}<|end|>
{%- endfor %}<|assistant|>"""
TODAY = "{{ strftime_now('%Y') }}" + CHATML

_GPT4 = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(*special: str | AddedToken, split: bool = True) -> Tokenizer:
    """A BPE over bytes with some merges, as Llama 3 and Qwen have."""
    tokenizer = Tokenizer(models.BPE())
    pieces = [pre_tokenizers.Split(_GPT4, "isolated")] if split else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def sentence_piece(*special: str) -> Tokenizer:
    """A BPE over words with a mark in front, as Llama 2 and Mistral have."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=700, special_tokens=["<unk>", *alphabet], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][:1]  # the bytes are no added tokens
    described["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def framed(tokenizer: Tokenizer, template: str, *special: str) -> Tokenizer:
    """`tokenizer` with special tokens around every text."""
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    frame = processors.TemplateProcessing(single=template, special_tokens=ids)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), frame])
    return tokenizer


def _llama3() -> tuple[Tokenizer, str, dict[str, Any]]:
    names = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = framed(byte_level(*names), "<|begin_of_text|> $A", "<|begin_of_text|>")
    return tokenizer, LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


def _qwen() -> tuple[Tokenizer, str, dict[str, Any]]:
    tokenizer = byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(
        [AddedToken("<tool_call>", normalized=False), AddedToken("<think>", normalized=True)]
    )
    return tokenizer, QWEN, {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


_EOS = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "special": True}


def _mistral() -> tuple[Tokenizer, str, dict[str, Any]]:
    tokenizer = sentence_piece("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]")
    return framed(tokenizer, "<s> $A", "<s>"), MISTRAL, {"bos_token": "<s>", "eos_token": _EOS}


def _llama2() -> tuple[Tokenizer, str, dict[str, Any]]:
    tokenizer = sentence_piece("<s>", "</s>", "[INST]", "[/INST]")
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return framed(tokenizer, "<s> $A </s>", "<s>", "</s>"), MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}


def _phi() -> tuple[Tokenizer, str, dict[str, Any]]:
    """A tokenizer whose special tokens take the spaces after them."""
    names = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer = byte_level(*(AddedToken(name, rstrip=True) for name in names), split=False)
    return tokenizer, PARTS, {"bos_token": "<|endoftext|>", "eos_token": "<|end|>"}


def _nested() -> tuple[Tokenizer, str, dict[str, Any]]:
    """A tokenizer whose special tokens overlap or contain each other."""
    names = ("<|im", "<|im_start|>", "<|im_end|>", "|>", "a|>b", "\n<|im")
    tokenizer = byte_level(*names, "<|endoftext|>")
    return tokenizer, CHATML, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}


MODELS: dict[str, Callable[[], tuple[Tokenizer, str, dict[str, Any]]]] = {
    "llama2": _llama2,
    "llama3": _llama3,
    "mistral": _mistral,
    "nested": _nested,
    "phi": _phi,
    "qwen": _qwen,
}


def write_model(
    directory: Path, tokenizer: Tokenizer, template: str | None, special: dict[str, Any], **config: Any
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    described = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config}
    (directory / "config.json").write_text(json.dumps(described))
    return directory


class SglangServer:
    """SGLang's own code for the ids of a request, without the server around it."""

    def __init__(self, model: Path) -> None:
        from sglang.srt.utils.hf_transformers_utils import get_tokenizer

        self.tokenizer: Any = get_tokenizer(str(model))
        self.serving: Any = None if self.tokenizer.chat_template is None else _serving(self.tokenizer)
        self.info: dict[str, Any] = {"served_model_name": "tiny:latest", "model_path": "models/tiny"}

    def text_ids(self, text: str) -> list[int]:
        """As TokenizerManager._tokenize_texts."""
        ids: list[int] = self.tokenizer([text])["input_ids"][0]
        return ids

    def chat_ids(self, body: dict[str, Any]) -> list[int]:
        """As OpenAIServingChat. Raises ValueError or a jinja error where it answers an error."""
        from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

        # The models change what they are built from.
        request = ChatCompletionRequest.model_validate(json.loads(json.dumps({"model": "tiny", **body})))
        ids: list[int] = self.serving._process_messages(request, False).prompt_ids
        return ids

    async def ask(self, body: Any) -> Any:
        """/v1/tokenize."""
        if "prompt" in body:
            return {"tokens": [self.tokenizer.encode(text) for text in body["prompt"]]}
        try:
            return {"tokens": self.chat_ids(body)}
        except ValueError:
            return None


def _serving(tokenizer: Any) -> Any:
    """An OpenAIServingChat of a text model started without flags, as far as rendering looks at it."""
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
    from sglang.srt.parser import jinja_template_utils as utils

    serving: Any = object.__new__(OpenAIServingChat)
    serving.tokenizer_manager = SimpleNamespace(
        tokenizer=tokenizer, config_value=lambda name: None, served_model_name="tiny"
    )
    template = tokenizer.chat_template
    serving.template_manager = SimpleNamespace(
        chat_template_name=None,
        jinja_template_content_format=utils.detect_jinja_template_content_format(template),
        jinja_template_may_reorder_tool_results=utils.jinja_template_may_reorder_tool_results(template),
        python_chat_template=None,
        reasoning_config=None,
        force_reasoning=False,
    )
    for name in ("tool_call_parser", "reasoning_parser", "_reasoning_detector", "chat_encoding_spec"):
        setattr(serving, name, None)
    serving._encoding_adapter = None
    serving.default_chat_template_kwargs = {}
    serving.is_gpt_oss = serving.is_gemma4 = serving.is_minimax_m3 = False
    serving._tokenizer_auto_adds_specials = len(tokenizer.encode("")) > 0
    serving._prompt_text_round_trip_is_lossy = serving._probe_prompt_text_round_trip()
    return serving


@cache
def written_model(directory: Path, name: str) -> Path:
    """The files of one of MODELS, made once per directory."""
    return write_model(directory / name, *MODELS[name]())
