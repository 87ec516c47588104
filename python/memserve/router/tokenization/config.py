"""Settings of how prompts are turned into the prompt tree's keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memserve.core.flags import setting

RoutingKeys = Literal["auto", "tokens", "text"]


@dataclass(frozen=True, slots=True)
class TokenizationConfig:
    """Which tokenizer, and which keys."""

    tokenizer_path: str | None = setting(
        None,
        "model directory with the tokenizer; default: the servers' --model-path; none: do not tokenize, "
        "and place requests by load and session",
        metavar="DIR",
    )
    routing_keys: RoutingKeys = setting(
        "auto",
        "keys that look a prompt up in the prompt tree; tokens: exact, and the servers get the token ids; "
        "text: hashes of the text, at a fraction of the cost; auto: tokens if the tokenizer is known, else "
        "text",
    )
