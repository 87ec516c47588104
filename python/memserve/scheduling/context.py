"""What a policy decides on: one request, and what is known of all that could serve it. Plain records."""

from __future__ import annotations

import msgspec

from memserve.core.ids import InstanceId


class Candidate(msgspec.Struct, frozen=True):
    """What is known of one instance when a request has to be placed."""

    instance_id: InstanceId
    near_blocks: int = 0
    """How many of the prompt's blocks, from the first, are in its HBM."""
    total_blocks: int = 0
    """The same for HBM and DRAM together; never less."""
    fetchable_blocks: int | None = None
    """How many of them others can read: what is in DRAM. None: all."""
    queued_s: float = 0.0
    """Predicted prefill work dispatched to it and not done."""
    queued: int = 0
    """How many requests that work is of."""
    recent_s: float = 0.0
    """Predicted prefill work dispatched to it within the last minutes, done or not."""
    running: int = 0
    """Requests dispatched to it that have not ended."""
    decode_batch: int = 0
    """Requests it is to decode at the same time."""
    context_tokens: int = 0
    """The sum of their contexts."""

    @property
    def offered_blocks(self) -> int:
        """How many blocks of the prompt another instance would get from it."""
        return self.total_blocks if self.fetchable_blocks is None else self.fetchable_blocks


class RoutingContext(msgspec.Struct, frozen=True):
    """One request, and all that could serve it."""

    prompt_tokens: int
    page_tokens: int
    prefills: tuple[Candidate, ...]
    """Prefill or colocated instances; at least one."""
    decodes: tuple[Candidate, ...] = ()
    """None where the prefill's instance decodes as well."""
    holders: tuple[Candidate, ...] = ()
    """Who else may be fetched from: memory servers, and decodes where they answer fetches."""
    session: int | None = None
    """A hash of whatever names the conversation."""
    turn: int = 0
    """How many requests were placed before."""
    seed: int = 0
    output_tokens: int = 256
    """How many tokens the answer is expected to have."""

    def cached_tokens(self, num_blocks: int) -> int:
        """Tokens that so many cached blocks save: all but the last, whose logits give the first answer."""
        return min(num_blocks * self.page_tokens, self.prompt_tokens - 1)
