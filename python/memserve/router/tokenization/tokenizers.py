"""The tokenizers of all served models: loaded when an instance joins, confirmed by every instance.

    instance joins ── admit ──> its tokenizer's files, read once per model ── Tokenizer.verify
    request        ── tokens_of ──> its tokens, or why they are not known

An instance that tokenizes otherwise than the instances of the same model is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from memserve.core.errors import ConfigError
from memserve.core.ids import InstanceId
from memserve.router.errors import TokenizerMismatch
from memserve.router.request import GenerationRequest, JsonObject
from memserve.router.tokenization.token_records import NotTokenizable, TokenizerStats, Tokens, UnknownTokens
from memserve.router.tokenization.tokenizer import Ask, Tokenizer, given_tokens

logger = logging.getLogger(__name__)

OFF = "none"
"""The path with which the router does not tokenize."""
NOT_WANTED = f"--tokenizer-path {OFF}"
NO_MODEL = "a model that no instance has told of"


class Tokenizers:
    """Event loop thread only."""

    def __init__(self, path: str | None, *, cache_tokens: int = 1 << 20, num_threads: int = 2) -> None:
        """`path` is the model directory of every model, or `OFF`; None: the path that instances report.

        `cache_tokens`, `num_threads`: of each model's tokenizer.
        """
        self._load_tokenizer = partial(Tokenizer.load, cache_tokens=cache_tokens, num_threads=num_threads)
        self._path = path
        self._by_model: dict[str, Tokenizer | str] = {}
        """The tokenizer of each model, or why there is none."""
        self._loading = asyncio.Lock()

    async def admit(
        self, instance: InstanceId, model: str, model_path: str, server_info: JsonObject, ask: Ask
    ) -> None:
        """Have an instance confirm the tokenizer of its model.

        Raises TokenizerMismatch if it disagrees with the other instances of the model, and what `ask` raises.
        """
        self.forget(instance)
        tokenizer = await self._loaded(
            model, self._path or str(server_info.get("tokenizer_path") or model_path)
        )
        if isinstance(tokenizer, str):
            return
        agreement = await tokenizer.verify(instance, server_info, ask)
        others = tokenizer.agreements.confirming
        if not agreement.texts and others:
            tokenizer.forget(instance)
            raise TokenizerMismatch(
                instance, f"its tokenizer is not that of {min(others)}, which serves {model} too"
            )

    def forget(self, instance: InstanceId) -> None:
        """The instance left. Idempotent."""
        for tokenizer in self._tokenizers().values():
            tokenizer.forget(instance)

    async def tokens_of(self, request: GenerationRequest, model: str | None) -> Tokens:
        """The tokens of each prompt of a validated request that `model` will serve."""
        tokenizer = self._by_model.get(model or "", NO_MODEL)
        if isinstance(tokenizer, Tokenizer):
            return await tokenizer.tokens_of(request)
        try:
            return given_tokens(request, lambda name: name == model) or UnknownTokens(tokenizer)
        except NotTokenizable as cannot:
            return UnknownTokens(cannot.reason)

    def text_after(
        self, model: str | None, prompt: Sequence[int], ids: Sequence[int], *, skips_special: bool
    ) -> str:
        """As `Tokenizer.text_after`; "" for a model without a tokenizer."""
        tokenizer = self._by_model.get(model or "")
        if not isinstance(tokenizer, Tokenizer):
            return ""
        return tokenizer.text_after(prompt, ids, skips_special=skips_special)

    def with_token_ids(
        self, request: GenerationRequest, model: str | None, tokens: Tokens
    ) -> GenerationRequest:
        """As `Tokenizer.with_token_ids`."""
        tokenizer = self._by_model.get(model or "")
        return tokenizer.with_token_ids(request, tokens) if isinstance(tokenizer, Tokenizer) else request

    def reasons(self) -> dict[str, str]:
        """The models whose requests are not tokenized, and why."""
        reasons = {}
        for model, tokenizer in self._by_model.items():
            if isinstance(tokenizer, str):
                reasons[model] = tokenizer
            elif not tokenizer.agreements.is_empty and not tokenizer.agreements.confirming:
                reasons[model] = "no instance confirms the tokenizer"
        return reasons

    def stats(self) -> dict[str, TokenizerStats]:
        """The counts of each model with a tokenizer."""
        return {model: tokenizer.stats for model, tokenizer in self._tokenizers().items()}

    def close(self) -> None:
        """End the threads."""
        for tokenizer in self._tokenizers().values():
            tokenizer.close()

    def _tokenizers(self) -> dict[str, Tokenizer]:
        return {model: one for model, one in self._by_model.items() if isinstance(one, Tokenizer)}

    async def _loaded(self, model: str, path: str) -> Tokenizer | str:
        async with self._loading:
            known = self._by_model.get(model)
            if known is None:
                known = self._by_model[model] = await self._load(model, path)
            return known

    async def _load(self, model: str, path: str) -> Tokenizer | str:
        if self._path == OFF:
            return NOT_WANTED
        try:
            return await asyncio.to_thread(self._load_tokenizer, Path(path))
        except ConfigError as error:
            logger.warning("requests for %s are not tokenized here: %s; set --tokenizer-path", model, error)
            return str(error)
