"""Pages and bytes of the model under test."""

from __future__ import annotations

import json
from pathlib import Path

PAGE = 16


def page_bytes(model: Path) -> int:
    """Bytes of one page of KV over all layers, in float32."""
    config = json.loads((model / "config.json").read_text())
    width = config["num_key_value_heads"] * config["head_dim"]
    return int(config["num_hidden_layers"] * 2 * PAGE * width * 4)


def full_pages(tokens: int) -> int:
    return tokens // PAGE


def pages(tokens: int) -> int:
    return -(-tokens // PAGE)
