"""Reads the tokenizer files of a model directory. Knows no requests.

Source: transformers 5.19, tokenization_utils_base.py (_from_pretrained).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tokenizers import Tokenizer as Backend

from memserve.core.errors import ConfigError
from memserve.router.request import JsonObject, decode_json

TOKENIZER = "tokenizer.json"

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MEDIA_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_MEDIA_KEYS = ("vision", "audio", "image", "video")
# Models whose chats SGLang encodes with its own code instead of their template.
_OWN_ENCODERS = ("DeepseekV4", "DeepseekV41", "Glm5Next", "GlmMoeDsa", "Inkling", "KimiK3", "MiniMaxM3")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The tokenizer of a model directory."""

    backend: Backend
    special_tokens: Mapping[str, str]
    """By their names, such as `bos_token`."""
    all_special_tokens: tuple[str, ...]
    """`special_tokens`, further ones in the configuration, and all that the tokenizer finds in a text."""
    chat_template: str | None
    """None also if there are several: a flag of the server chooses one."""
    no_chats: str | None
    """Why chats of this model cannot be rendered here, whatever their template; None if they can."""


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """The tokenizer in `directory`. Raises ConfigError, in one line, if it is not a fast tokenizer."""
    path = directory / TOKENIZER
    if not path.is_file():
        raise ConfigError(f"{directory} has no {TOKENIZER}: texts can be tokenized by a fast tokenizer only")
    try:
        backend = Backend.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path} is not a tokenizer: {error}") from error
    model = _read_json(path).get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise ConfigError(f"{path} drops merges at random: one text has many tokenizations")
    config = _read_json(directory / "tokenizer_config.json")
    special_tokens = _special_tokens(config, directory)
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    template = _chat_template(config, directory)
    return TokenizerFiles(
        backend=backend,
        special_tokens=special_tokens,
        all_special_tokens=tuple(dict.fromkeys([*special_tokens.values(), *_named_in(config), *added])),
        chat_template=template,
        no_chats=_no_chats(directory),
    )


def _special_tokens(config: JsonObject, directory: Path) -> dict[str, str]:
    values = dict(config)
    if "added_tokens_decoder" not in config:  # else the older file is not read
        values |= _read_json(directory / "special_tokens_map.json")
    found = {name: _content(values.get(name)) for name in _NAMED_TOKENS}
    return {name: content for name, content in found.items() if content is not None}


def _content(token: object) -> str | None:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _named_in(config: JsonObject) -> list[str]:
    """Further tokens in the configuration, which transformers adds."""
    decoder, extra = config.get("added_tokens_decoder"), config.get("extra_special_tokens")
    named = list(decoder.values()) if isinstance(decoder, dict) else []
    named += list(extra.values()) if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    older = config.get("additional_special_tokens")
    named += older if isinstance(older, list) else []
    return [content for content in map(_content, named) if content]


def _chat_template(config: JsonObject, directory: Path) -> str | None:
    if (directory / "additional_chat_templates").exists():
        return None
    file = directory / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def _no_chats(directory: Path) -> str | None:
    config = _read_json(directory / "config.json")
    names = config.get("architectures")
    for name in names if isinstance(names, list) else []:
        if any(own in str(name) for own in _OWN_ENCODERS):
            return "a model whose chats SGLang encodes with code of its own"
    if any((directory / name).exists() for name in _MEDIA_FILES):
        return "a multimodal model"
    if any(key.startswith(_MEDIA_KEYS) for key in config):
        return "a multimodal model"
    return None


def _read_json(path: Path) -> JsonObject:
    """The JSON object in a file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = decode_json(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
