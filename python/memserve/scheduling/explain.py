"""A decision in words and numbers, for people who ask why a request went where it went. Pure."""

from __future__ import annotations

from dataclasses import asdict

from memserve.router.request import JsonObject
from memserve.router.tokenization.prompts import Prompt
from memserve.scheduling.decision import Decision
from memserve.scheduling.request_cost import Score

MAX_LISTED = 8
"""Candidates of each role that a response header, of 8 KB, has room for: the cheapest."""


def explained(decision: Decision, prompt: Prompt, max_listed: int | None = None) -> JsonObject:
    """Every candidate with its depth by tier and its predicted seconds, and why one was chosen."""
    situation = decision.situation
    fetch = decision.fetch
    return {
        "prefill": decision.prefill,
        "decode": decision.decode,
        "policies": {"prefill": decision.policies[0], "decode": decision.policies[1]},
        "reason": decision.reason,
        "prompt_tokens": situation.prompt_tokens,
        "page_tokens": situation.page_tokens,
        "tokens_unknown": prompt.unknown,
        "session": prompt.session is not None,
        "fetch": None
        if fetch is None
        else {
            "source": fetch.source,
            "blocks": fetch.num_blocks,
            "transfer_s": _rounded(fetch.transfer_s),
            "saved_s": _rounded(fetch.saved_s),
        },
        "prefill_candidates": _listed(decision.scores, max_listed),
        "decode_candidates": _listed(decision.decode_scores, max_listed),
        "memory": [{"instance": it.instance_id, "blocks": it.total_blocks} for it in situation.holders],
        "costs": {"prefill": asdict(decision.costs.prefill), "remote": asdict(decision.costs.remote)},
    }


def _listed(scores: tuple[Score, ...], max_listed: int | None) -> list[JsonObject]:
    if max_listed is not None and len(scores) > max_listed:
        scores = tuple(sorted(scores, key=lambda score: score.total_s)[:max_listed])
    return [_described(score) for score in scores]


def _described(score: Score) -> JsonObject:
    candidate = score.candidate
    return {
        "instance": candidate.instance_id,
        "hbm_blocks": candidate.near_blocks,
        "blocks": candidate.total_blocks,
        "queued": candidate.queued,
        "running": candidate.running,
        "queue_s": _rounded(score.queue_s),
        "load_s": _rounded(score.load_s),
        "exec_s": _rounded(score.exec_s),
        "others_s": _rounded(score.others_s),
        "recent_s": _rounded(score.recent_s),
        "total_s": _rounded(score.total_s),
    }


def _rounded(seconds: float) -> float:
    return round(seconds, 6)
