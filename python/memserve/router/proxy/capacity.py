"""The decodes whose cache can hold a prompt. Pure.

SGLang's decode admits a request when the prompt, in whole pages, and a reserve for the answer are free.
A prompt that does not fit an empty cache waits there for ever, and all requests behind it do too.
Source: SGLang 0.5.23, disaggregation/decode.py (pop_preallocated, _required_admission_tokens).
"""

from __future__ import annotations

from dataclasses import replace

from memserve.core.errors import BadRequest
from memserve.router.cluster.instance import ClusterSnapshot
from memserve.router.request import Api

_FIELDS = {Api.GENERATE: "input_ids", Api.CHAT: "messages", Api.COMPLETIONS: "prompt"}


def smallest_capacity(snapshot: ClusterSnapshot) -> int | None:
    """The longest prompt that every decode can hold; None if no limit is known."""
    limits = (one.server_info.max_prompt_tokens for one in snapshot.decodes)
    return min((limit for limit in limits if limit is not None), default=None)


def largest_capacity(snapshot: ClusterSnapshot) -> int | None:
    """The longest prompt that some decode can hold; None if an instance has no known limit."""
    limits = [one.server_info.max_prompt_tokens for one in snapshot.decodes]
    if snapshot.colocated or not limits or None in limits:
        return None
    return max(limit for limit in limits if limit is not None)


def instances_that_fit(snapshot: ClusterSnapshot, num_tokens: int) -> ClusterSnapshot:
    """`snapshot` without the decodes that cannot hold a prompt of `num_tokens`."""
    decodes = tuple(
        one
        for one in snapshot.decodes
        if one.server_info.max_prompt_tokens is None or num_tokens <= one.server_info.max_prompt_tokens
    )
    return snapshot if len(decodes) == len(snapshot.decodes) else replace(snapshot, decodes=decodes)


def check_fits(snapshot: ClusterSnapshot, num_tokens: int, api: Api) -> None:
    """Raises BadRequest if no instance in `snapshot` could ever hold a prompt of `num_tokens`."""
    limit = largest_capacity(snapshot)
    if limit is not None and num_tokens > limit:
        raise BadRequest(
            f"the prompt has {num_tokens} tokens; the cache of the largest decode server has room for "
            f"{limit} beside what is reserved for an answer (its --num-reserved-decode-tokens)",
            field=_FIELDS[api],
        )
