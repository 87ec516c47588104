"""What a request says of itself that counts at the gate: how urgent it is, how much it asks for."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from memserve.router.request import Api, GenerationRequest

PRIORITY = "x-priority"
MAX_PRIORITY = 1 << 31
OUTPUT_TOKENS = 256
"""What an answer is counted as that was not bounded."""


class _Body(msgspec.Struct):
    priority: int | None = None


def priority_of(headers: Mapping[str, str], body: bytes) -> int:
    """Of a header, or else of SGLang's field; higher comes first, and 0 is what has none."""
    text = headers.get(PRIORITY)
    if text is not None:
        try:
            return max(-MAX_PRIORITY, min(MAX_PRIORITY, int(text[:20])))
        except ValueError:
            return 0
    if b'"priority"' not in body:
        return 0
    try:
        return msgspec.json.decode(body, type=_Body).priority or 0
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return 0  # what is wrong with it is said when it is read


def max_output_tokens(call: GenerationRequest) -> int:
    """How many tokens the answers to a checked call may have, all together."""
    return (call.num_prompts or 1) * call.num_samples * _most(call)


def _most(call: GenerationRequest) -> int:
    params = call.body.get("sampling_params") if call.api is Api.GENERATE else call.body
    first = params[0] if isinstance(params, list) and params else params
    if not isinstance(first, dict):
        return OUTPUT_TOKENS
    for name in ("max_new_tokens", "max_completion_tokens", "max_tokens"):
        wanted = first.get(name)
        if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 0:
            return wanted
    return OUTPUT_TOKENS
