"""Which decodes can hold a prompt at all. Pure.

SGLang's decode takes a request in when the prompt, in whole pages, and a reserve for the answer are free.
A prompt for which even an empty cache has no room waits there for ever, and so does everything behind it.
Source: SGLang 0.5.23, disaggregation/decode.py (pop_preallocated, _required_admission_tokens).
"""

from __future__ import annotations

from dataclasses import replace

from memserve.core.errors import BadRequest
from memserve.router.cluster.instance import ClusterSnapshot
from memserve.router.request import Api

_FIELDS = {Api.GENERATE: "input_ids", Api.CHAT: "messages", Api.COMPLETIONS: "prompt"}


def smallest_capacity(snapshot: ClusterSnapshot) -> int | None:
    """What fits every decode; None if nothing is known not to."""
    limits = (one.server_info.max_prompt_tokens for one in snapshot.decodes)
    return min((limit for limit in limits if limit is not None), default=None)


def largest_capacity(snapshot: ClusterSnapshot) -> int | None:
    """What fits some decode, if no instance is without a known limit; else None."""
    rooms = [one.server_info.max_prompt_tokens for one in snapshot.decodes]
    if snapshot.colocated or not rooms or None in rooms:
        return None
    return max(room for room in rooms if room is not None)


def instances_that_fit(snapshot: ClusterSnapshot, num_tokens: int) -> ClusterSnapshot:
    """Without the decodes that have no room for a prompt of `num_tokens`."""
    decodes = tuple(
        one
        for one in snapshot.decodes
        if one.server_info.max_prompt_tokens is None or num_tokens <= one.server_info.max_prompt_tokens
    )
    return snapshot if len(decodes) == len(snapshot.decodes) else replace(snapshot, decodes=decodes)


def check_fits(snapshot: ClusterSnapshot, num_tokens: int, api: Api) -> None:
    """Raises BadRequest if nobody in `snapshot` could ever take a prompt of `num_tokens`."""
    room = largest_capacity(snapshot)
    if room is not None and num_tokens > room:
        raise BadRequest(
            f"the prompt has {num_tokens} tokens; the cache of the largest decode server has room for {room} "
            "beside what is reserved for an answer (its --num-reserved-decode-tokens)",
            field=_FIELDS[api],
        )
