"""What a routing decision depends on: the prompt, and the state of every candidate. Plain records."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.ids import InstanceId
from memserve.scheduling.prompt_tree.records import NO_OVERLAP, TierCounts

OUTPUT_TOKENS = 256
"""Expected length of an answer, at most."""


class Prompt(msgspec.Struct, frozen=True):
    """One request as the scheduler sees it. The prompts of a batch are placed together, as one."""

    num_tokens: int
    """Estimated where the tokens are not known."""
    chains: tuple[Sequence[BlockKey], ...] = ()
    """The keys of each prompt's whole blocks; empty if they are not known."""
    by_text: bool = False
    """The keys are hashes of the text. They match only caches that are inferred, not reported."""
    session: int | None = None
    """Hash of the name of the conversation."""
    output_tokens: int = OUTPUT_TOKENS
    unknown: str | None = None
    """Why the tokens are not known, where the router wants them."""


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """The state of one instance when a request is placed."""

    instance_id: InstanceId
    depths: TierCounts = NO_OVERLAP.depths
    """By tier: the prompt's blocks, from the first, that are in that tier or in one nearer to the compute."""
    readable_blocks: int = 0
    """The prompt's blocks, from the first, that another instance can fetch."""
    queued_s: float = 0.0
    """Predicted prefill work dispatched to it and not done."""
    queued: int = 0
    """Requests that `queued_s` belongs to."""
    recent_s: float = 0.0
    """Predicted prefill work dispatched to it within the last minutes, done or not."""
    running: int = 0
    """Requests dispatched to it that have not ended."""
    decode_batch: int = 0
    """Requests that it decodes together, those still in prefill included."""
    context_tokens: int = 0
    """Sum of the contexts of the decode batch."""

    @property
    def hbm_blocks(self) -> int:
        """The prompt's blocks, from the first, in its HBM."""
        return self.depths[Tier.HBM]

    @property
    def cached_blocks(self) -> int:
        """The prompt's blocks, from the first, in any of its tiers."""
        return self.depths[-1]


class RoutingContext(msgspec.Struct, frozen=True):
    """One request and every candidate for it."""

    prompt_tokens: int
    page_tokens: int
    prefills: tuple[Candidate, ...]
    """Prefill or colocated instances; at least one."""
    decodes: tuple[Candidate, ...] = ()
    """Empty where the prefill's instance decodes as well."""
    holders: tuple[Candidate, ...] = ()
    """Memory instances: they only serve fetches."""
    session: int | None = None
    """Hash of the name of the conversation."""
    turn: int = 0
    """Number of requests placed before."""
    seed: int = 0
    output_tokens: int = OUTPUT_TOKENS
    """Expected length of the answer."""

    def cached_tokens(self, num_blocks: int) -> int:
        """Tokens that so many cached blocks save: not the last token, whose logits give the first answer."""
        return min(num_blocks * self.page_tokens, self.prompt_tokens - 1)
