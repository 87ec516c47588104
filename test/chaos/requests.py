"""The requests during faults: turns of chats, over every endpoint, with their undisturbed answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

Json = dict[str, Any]

WORDS = ("river", "stone", "lantern", "copper", "meadow", "winter", "harbour", "signal", "orchard", "paper")


@dataclass(frozen=True, slots=True)
class Ask:
    """One greedy request. The sender sets `stream`."""

    path: str
    body: Json
    expected: tuple[str, ...] = ()
    """The text of each choice."""


Answered = Callable[[Ask], Awaitable[tuple[str, ...]]]


async def conversations(
    answer: Answered, *, num_chats: int, num_turns: int, num_tokens: int
) -> tuple[Ask, ...]:
    """The turns of all chats, each with its whole history and the answer that `answer` gives."""
    chats = (_conversation(answer, chat, num_turns, num_tokens) for chat in range(num_chats))
    return tuple(ask for asks in await asyncio.gather(*chats) for ask in asks)


async def _conversation(answer: Answered, chat: int, num_turns: int, num_tokens: int) -> list[Ask]:
    asks: list[Ask] = []
    draw = random.Random(chat)
    said: list[tuple[str, str]] = []
    for _ in range(num_turns):
        question = " ".join(draw.choice(WORDS) for _ in range(draw.randint(8, 20)))
        ask = _FORMS[chat % len(_FORMS)](said, question, num_tokens)
        asks.append(replace(ask, expected=await answer(ask)))
        said.append((question, asks[-1].expected[0]))
    return asks


def _history(said: list[tuple[str, str]], question: str) -> str:
    return "".join(f"Q: {asked}\nA: {told}\n" for asked, told in said) + f"Q: {question}\nA: "


def _sampling(num_tokens: int) -> Json:
    return {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}


def _generate(said: list[tuple[str, str]], question: str, num_tokens: int) -> Ask:
    return Ask("/generate", {"text": _history(said, question), "sampling_params": _sampling(num_tokens)})


def _batch(said: list[tuple[str, str]], question: str, num_tokens: int) -> Ask:
    texts = [_history(said, question), question]
    return Ask("/generate", {"text": texts, "sampling_params": _sampling(num_tokens)})


def _chat(said: list[tuple[str, str]], question: str, num_tokens: int) -> Ask:
    messages = []
    for asked, told in said:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    messages.append({"role": "user", "content": question})
    options = {"model": "default", "temperature": 0, "max_tokens": num_tokens, "ignore_eos": True}
    return Ask("/v1/chat/completions", {"messages": messages, **options})


def _completion(said: list[tuple[str, str]], question: str, num_tokens: int) -> Ask:
    options = {"model": "default", "temperature": 0, "max_tokens": num_tokens, "ignore_eos": True}
    return Ask("/v1/completions", {"prompt": _history(said, question), **options})


_FORMS = (_generate, _chat, _completion, _chat, _generate, _batch)
