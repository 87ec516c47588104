"""A greedy model behind SGLang's endpoints, without sockets: the same ids give the same next token.

Detokenizes step by step and stops as SGLang 0.5.23 does (detokenizer_manager.py, schedule_batch.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from memserve.router.request import Api, GenerationRequest

HALF = "�"
READ_BACK = 5
DEFAULT_NEW_TOKENS = 128


def printable(text: str) -> str:
    """As SGLang's find_printable_text."""
    if text.endswith("\n"):
        return text
    for count in (1, 2):
        if len(text) >= count and "一" <= text[-count] <= "鿿":
            return text[: len(text) + 1 - count]
    return text[: text.rfind(" ") + 1]


@dataclass
class GreedyServer:
    """Repeats `script`; the position in the sequence selects the token."""

    tokenizer: Tokenizer
    script: Sequence[int]
    is_incremental: bool = False
    eos: int = -1

    def text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids))
        return text

    def text_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        before = prompt[-READ_BACK:]
        return self.text([*before, *ids])[len(self.text(before)) :]

    def stream(self, call: GenerationRequest, prompt: Sequence[int], groups: Sequence[int]) -> list[bytes]:
        """The events of an answer; `groups` tokens in each of them, over and over."""
        native = call.api is Api.GENERATE
        steps = self._steps(call, prompt, groups)
        events = list(self._native(call, prompt, steps) if native else self._openai(call, prompt, steps))
        return [*(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events), b"data: [DONE]\n\n"]

    def _steps(
        self, call: GenerationRequest, prompt: Sequence[int], groups: Sequence[int]
    ) -> Iterator[tuple[list[int], str, dict[str, Any] | None]]:
        """The answer so far, step by step: ids, text, finish reason."""
        params: Any = call.body.get("sampling_params", call.body)
        most = params.get("max_new_tokens") or params.get("max_tokens") or DEFAULT_NEW_TOKENS
        stops = params.get("stop") or []
        ids: list[int] = []
        surround, read = max(0, len(prompt) - READ_BACK), len(prompt)
        text, number = "", 0
        reason: dict[str, Any] | None = None
        while reason is None:
            for _ in range(groups[number % len(groups)]):
                ids.append(self.script[(len(prompt) + len(ids)) % len(self.script)])
                tail = self.text_after(prompt, ids)
                if stop := next((stop for stop in stops if stop in tail), None):
                    reason = {"type": "stop", "matched": stop}
                elif ids[-1] == self.eos:
                    reason = {"type": "stop", "matched": self.eos}
                elif len(ids) >= most:
                    reason = {"type": "length", "length": most}
                if reason:
                    break
            number += 1
            every = [*prompt, *ids]
            new = self.text(every[surround:])[len(self.text(every[surround:read])) :]
            if reason is not None:
                whole = text + new
                if "matched" in reason and isinstance(reason["matched"], str):
                    whole = whole[: whole.find(reason["matched"])]
                yield list(ids), whole, reason
            elif new and not new.endswith(HALF):
                text += new
                surround, read = read, len(every)
                yield list(ids), text, None
            else:
                yield list(ids), text + printable(new), None

    def _native(self, call: GenerationRequest, prompt: Sequence[int], steps: Any) -> Iterator[dict[str, Any]]:
        told_ids, told = 0, ""
        for ids, text, reason in steps:
            meta = {"id": call.rid, "finish_reason": reason, "prompt_tokens": len(prompt)}
            meta |= {"completion_tokens": len(ids), "cached_tokens": len(prompt) // 2}
            if self.is_incremental:
                yield {"text": text[len(told) :], "output_ids": ids[told_ids:], "meta_info": meta}
            else:
                yield {"text": text, "output_ids": ids, "meta_info": meta}
            told_ids, told = len(ids), text

    def _openai(self, call: GenerationRequest, prompt: Sequence[int], steps: Any) -> Iterator[dict[str, Any]]:
        def event(**said: Any) -> dict[str, Any]:
            choice = {"index": 0, "finish_reason": None, **said}
            return {"id": call.rid, "created": len(prompt), "choices": [choice]}

        told = ""
        is_chat = call.api is Api.CHAT
        if is_chat:
            yield event(delta={"role": "assistant", "content": ""})
        for ids, text, reason in steps:
            new, told = text[len(told) :], text
            if not is_chat:
                yield event(text=new, finish_reason=reason and reason["type"])
            elif new:
                yield event(delta={"role": None, "content": new})
            count = len(ids)
        if is_chat:
            yield event(delta={}, finish_reason=reason["type"])
        if (call.body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
            usage["total_tokens"] = len(prompt) + count
            yield {"id": call.rid, "created": len(prompt), "choices": [], "usage": usage}
