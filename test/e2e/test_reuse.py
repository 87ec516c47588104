"""Effect of a flush on the caches of prefill and decode. test_caching_modes has reuse without a flush."""

from __future__ import annotations

from .conftest import Pair


def test_flush_empties_both_servers(pair: Pair) -> None:
    prompt = "A prompt that is long enough for a few pages of KV, sent twice."
    pair.generate(text=prompt, sampling_params={"max_new_tokens": 1})
    pair.flush()
    meta = pair.generate(text=prompt, sampling_params={"max_new_tokens": 1})["meta_info"]
    assert (meta["prefill_cached_tokens"], meta["cached_tokens"]) == (0, 0)
