"""The small models are identical on every machine, and their text survives tokenizing."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

SCRIPT = Path(__file__).parents[3] / "scripts" / "make_tiny_model.py"


def make(directory: Path, *flags: str) -> str:
    command = [sys.executable, str(SCRIPT), str(directory), *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_tiny_model_has_the_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    make(tmp_path / "c", "--seed", "1")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a")["model.safetensors"] != digests(tmp_path / "c")["model.safetensors"]


def test_tiny_model_is_not_written_again_if_it_exists(tmp_path: Path) -> None:
    make(tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert "already there" in make(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "text", ["plain", "ünïcödé 漢字 🙂", "tabs\tand\nlines", "<|im_start|>user\nhi<|im_end|>\n"]
)
def test_tiny_model_text_survives_tokenizing(tiny_model: Path, text: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tiny_model_chat_has_one_token_per_byte_and_mark(tiny_model: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    chat = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer(rendered).input_ids) == 1 + 5 + 2 + 1 + 1 + 1 + 10
