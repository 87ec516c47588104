"""A decision as JSON: the explanation that users get on demand. Pure."""

from __future__ import annotations

from dataclasses import asdict

from memserve.core.block_addr import LOCAL_TIERS
from memserve.scheduling.decision import Decision
from memserve.scheduling.request_cost import Score

MAX_LISTED = 8
"""The cheapest candidates of each role that a response header of 8 KB has room for."""


def explained(decision: Decision, unknown: str | None, max_listed: int | None = None) -> dict[str, object]:
    """Every candidate with its cached blocks by tier and its predicted seconds, and the reason.

    `unknown`: why the prompt's tokens are not known.
    """
    context, fetch = decision.context, decision.fetch
    return {
        "prefill": decision.prefill,
        "decode": decision.decode,
        "policies": {"prefill": decision.policies[0], "decode": decision.policies[1]},
        "reason": decision.reason,
        "prompt_tokens": context.prompt_tokens,
        "page_tokens": context.page_tokens,
        "tokens_unknown": unknown,
        "session": context.session is not None,
        "fetch": None
        if fetch is None
        else {
            "source": fetch.source,
            "blocks": fetch.num_blocks,
            "transfer_s": round(fetch.transfer_s, 6),
            "saved_s": round(fetch.saved_s, 6),
        },
        "prefill_candidates": _listed(decision.scores, max_listed),
        "decode_candidates": _listed(decision.decode_scores, max_listed),
        "memory": [{"instance": it.instance_id, "blocks": it.cached_blocks} for it in context.holders],
        "costs": {"prefill": asdict(decision.costs.prefill), "remote": asdict(decision.costs.remote)},
    }


def _listed(scores: tuple[Score, ...], max_listed: int | None) -> list[dict[str, object]]:
    if max_listed is not None and len(scores) > max_listed:
        scores = tuple(sorted(scores, key=lambda score: score.total_s)[:max_listed])
    return [_described(score) for score in scores]


def _described(score: Score) -> dict[str, object]:
    candidate = score.candidate
    ends = (0, *candidate.depths)
    seconds = {name: round(getattr(score, name), 6) for name in _SECONDS}
    return {
        "instance": candidate.instance_id,
        **{f"{tier.name.lower()}_blocks": ends[tier + 1] - ends[tier] for tier in LOCAL_TIERS},
        "blocks": candidate.cached_blocks,
        "queued": candidate.queued,
        "running": candidate.running,
        **seconds,
    }


_SECONDS = ("queue_s", "load_s", "exec_s", "others_s", "recent_s", "total_s")
