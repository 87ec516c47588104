"""Settings of how prompts are turned into the prompt tree's keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memserve.core.flags import check_settings, setting

RoutingKeys = Literal["auto", "tokens", "text"]


@dataclass(frozen=True, slots=True)
class TokenizationConfig:
    """Which tokenizer, and which keys. Checked when built; raises ConfigError."""

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
    tokenizer_threads: int = setting(2, "threads that tokenize, per model", at_least=1)
    tokenizer_cache_tokens: int = setting(
        1 << 20, "tokens of cached text per model, at about 10 bytes each; 0: no cache", at_least=0
    )

    def __post_init__(self) -> None:
        check_settings(self)
