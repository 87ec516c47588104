"""SGLang's attention on the CPU, at O(new x total): a cached prefix is read, never recomputed.

SGLang's own `torch_native` backend pads the new queries to the whole length, so a prefix hit saves
nothing of the attention. Here an extend is

                 cached prefix (key parts)      new tokens
               +----------------------------+---------------+
    new        |           dense            |  causal       |
    queries    +----------------------------+---------------+

merged by log-sum-exp, and a decode is dense over its key parts. Long runs of neighbouring slots are
attended where they lie in the pool; what is left is gathered. Attention that is not plain
causal self-attention (cross-attention, sliding windows, unequal head sizes, a KV pool of another
dtype) is left to `torch_native`, from which this backend inherits.

Requests are attended one by one: each result depends on that request alone, never on its batch, and
padding a batch to one kernel call was measured to pay only below about 64 tokens of context.
"""

from __future__ import annotations

import faulthandler
import os
import resource
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from memserve.engine.partial_attention import Partial, attend, merge, nothing_seen

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

CPU_ATTENTION = "memserve_cpu"
"""The backend's name, for `--attention-backend`."""

MAX_RUNS = 4
"""Runs of one request that are attended in place: each costs a kernel call and a place in the merge."""
MIN_RUN_TOKENS = 128
"""Shorter runs are gathered: copying them costs less than a kernel call of their own."""
GATHERED_TOKENS = 1024
"""Gathered at a time: about what is still in the processor's cache when it is attended."""
MIN_PART_TOKENS_PER_QUERY = 4
"""And a part is never much smaller than this: a merge touches every output once per part."""


def register_cpu_attention() -> None:
    """Make `--attention-backend memserve_cpu` known to this process's SGLang. Idempotent.

    Every SGLang process needs it: the launcher to accept the flag, the schedulers to build it.
    """
    register_attention_backend(CPU_ATTENTION)(MemServeCpuAttnBackend)
    if CPU_ATTENTION not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([CPU_ATTENTION])


class Run(NamedTuple):
    """Neighbouring slots of the pool that hold neighbouring tokens of one request."""

    position: int
    """Of its first token, among the tokens that were asked about."""
    slot: int
    tokens: int


def avoid_faulty_amx() -> bool:
    """Keep oneDNN off AMX where using it kills the process; whether bfloat16 is safe to compute in.

    Some virtual machines announce AMX and then trap on it. Sets ONEDNN_MAX_CPU_ISA, which children
    inherit, if a bfloat16 product dies in a forked child; oneDNN reads it once, so call this before
    the process's first product and before it starts threads.
    """
    if _bfloat16_survives():
        return True
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_FP16"
    return _bfloat16_survives()


def _bfloat16_survives() -> bool:
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            torch.set_num_threads(1)
            torch.ones(64, 64, dtype=torch.bfloat16).mm(torch.ones(64, 64, dtype=torch.bfloat16))
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


@dataclass(frozen=True, slots=True)
class KeyParts:
    """Where the keys of one request lie in the pool, in no order: dense attention needs none."""

    runs: tuple[Run, ...]
    """To be attended in place."""
    rest: tuple[Tensor, ...]
    """Slots to gather, [tokens] integers each."""


@dataclass(frozen=True, slots=True)
class ExtendRequest:
    """One request of an extend batch: its new tokens are rows start..stop-1 of the batch's queries."""

    start: int
    stop: int
    prefix: KeyParts
    slots: Tensor
    """[stop - start] integers: the pool's slots of the new tokens."""


def key_parts(slots: Sequence[Tensor], num_queries: Sequence[int]) -> list[KeyParts]:
    """Split each request's `slots` ([tokens] integers) into runs to attend in place and a rest.

    num_queries[i] tokens of request i will attend them: the more, the fewer parts are worth while.
    """
    parts = []
    for own, queries, runs in zip(slots, num_queries, find_runs(slots), strict=True):
        smallest = MIN_PART_TOKENS_PER_QUERY * queries
        kept = nlargest(MAX_RUNS, (run for run in runs if run.tokens >= smallest), lambda run: run.tokens)
        kept.sort()
        ends = [0, *(run.position + run.tokens for run in kept)]
        starts = [*(run.position for run in kept), len(own)]
        between = [own[end:start] for end, start in zip(ends, starts, strict=True) if end < start]
        rest = torch.cat(between).split(max(GATHERED_TOKENS, smallest)) if between else ()
        parts.append(KeyParts(tuple(kept), rest))
    return parts


def find_runs(slots: Sequence[Tensor]) -> list[list[Run]]:
    """The runs of MIN_RUN_TOKENS or more in each request's `slots` ([tokens] integers), in order."""
    runs: list[list[Run]] = [[] for _ in slots]
    offsets = [0, *accumulate(len(own) for own in slots)]
    if offsets[-1] == 0:
        return runs
    flat = torch.cat(list(slots)).numpy()
    begins = np.ones(len(flat) + 1, dtype=bool)
    np.not_equal(flat[1:], flat[:-1] + 1, out=begins[1:-1])
    begins[offsets] = True  # a run ends with its request, and the last one with the last request
    edges = begins.nonzero()[0]
    long = (np.diff(edges) >= MIN_RUN_TOKENS).nonzero()[0]
    for begin, end in zip(edges[long].tolist(), edges[long + 1].tolist(), strict=True):
        request = bisect_right(offsets, begin) - 1
        runs[request].append(Run(begin - offsets[request], int(flat[begin]), end - begin))
    return runs


class MemServeCpuAttnBackend(TorchNativeAttnBackend):
    """Drop-in for `torch_native`: the same results to rounding, at O(new x total) for an extend.

    One per model runner; scheduler thread only. A forward pass is planned once, in
    `init_forward_metadata`, and every layer follows the plan.
    """

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        self._extend: list[ExtendRequest] = []
        self._decode: list[KeyParts] = []
        self._gathered = (torch.empty(0), torch.empty(0))

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan this pass from the requests' lengths and slots, which must be final by now."""
        super().init_forward_metadata(forward_batch)
        self._extend, self._decode = [], []
        mode = forward_batch.forward_mode
        if mode.is_idle() or forward_batch.encoder_lens is not None:
            return
        rows = [self.req_to_token_pool.req_to_token[at] for at in forward_batch.req_pool_indices.tolist()]
        if mode.is_decode():
            totals = forward_batch.seq_lens.tolist()
            slots = [row[:total] for row, total in zip(rows, totals, strict=True)]
            self._decode = key_parts(slots, [1] * len(slots))
        elif forward_batch.extend_seq_lens is not None:
            self._extend = self._plan_extend(rows, forward_batch)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> Tensor:
        """Attention of the new tokens' `q` [tokens, heads * dim] over their prefixes and themselves."""
        keys, values = self._pool_of(layer)
        if not self._extend or not self._is_plain(layer, q, keys):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        self._store(k, v, layer, forward_batch, save_kv_cache)
        output = torch.empty_like(q)
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        outputs = output.view(-1, layer.tp_q_head_num, layer.v_head_dim)
        causal = layer.attn_type != AttentionType.ENCODER_ONLY
        for request in self._extend:
            new = slice(request.start, request.stop)
            query = _heads_first(queries[new])
            new_key = keys.index_select(0, request.slots) if k is None else k[new]
            new_value = values.index_select(0, request.slots) if v is None else v[new]
            own = attend(
                query, _heads_first(new_key), _heads_first(new_value), scale=layer.scaling, causal=causal
            )
            cached = self._attend_parts(query, request.prefix, keys, values, layer.scaling)
            outputs[new] = merge([own, *cached]).output[0].transpose(0, 1)
        return output

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> Tensor:
        """Attention of one new token per request, `q` [requests, heads * dim], over all its tokens."""
        keys, values = self._pool_of(layer)
        if not self._decode or not self._is_plain(layer, q, keys):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        self._store(k, v, layer, forward_batch, save_kv_cache)
        queries = q.reshape(-1, layer.tp_q_head_num, 1, layer.qk_head_dim)
        per_request = [
            self._attend_parts(query, parts, keys, values, layer.scaling)
            for query, parts in zip(queries.split(1), self._decode, strict=True)
        ]
        # All first parts, all second parts, ...: one merge for the batch.
        nothing = nothing_seen(queries[:1], layer.v_head_dim)
        columns = [
            Partial(torch.cat([part.output for part in column]), torch.cat([part.lse for part in column]))
            for column in zip_longest(*per_request, fillvalue=nothing)
        ]
        return merge(columns).output.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _plan_extend(self, rows: Sequence[Tensor], forward_batch: ForwardBatch) -> list[ExtendRequest]:
        news = forward_batch.extend_seq_lens_cpu
        prefixes = forward_batch.extend_prefix_lens_cpu
        if news is None or prefixes is None:
            news, prefixes = forward_batch.extend_seq_lens.tolist(), forward_batch.extend_prefix_lens.tolist()
        parts = key_parts([row[:prefix] for row, prefix in zip(rows, prefixes, strict=True)], news)
        stops = list(accumulate(news))
        return [
            ExtendRequest(stop - new, stop, prefix_parts, row[prefix : prefix + new])
            for row, prefix, new, stop, prefix_parts in zip(rows, prefixes, news, stops, parts, strict=True)
        ]

    def _pool_of(self, layer: RadixAttention) -> tuple[Tensor, Tensor]:
        """This layer's keys and values, each [slots, kv_heads, dim]."""
        pool = self.token_to_kv_pool
        return pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)

    def _is_plain(self, layer: RadixAttention, q: Tensor, keys: Tensor) -> bool:
        """Whether this layer is self-attention as planned, and not a case left to `torch_native`."""
        return (
            not layer.is_cross_attention
            and layer.sliding_window_size in (None, -1)
            and layer.qk_head_dim == layer.v_head_dim
            and keys.dtype == q.dtype
            and not self.use_sliding_window_kv_pool
        )

    def _store(
        self,
        k: Tensor | None,
        v: Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> None:
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)

    def _attend_parts(
        self, query: Tensor, parts: KeyParts, keys: Tensor, values: Tensor, scale: float
    ) -> list[Partial]:
        """One partial result for each of `parts`; `query` is [1, heads, queries, dim]."""
        keys_first, values_first = _heads_first(keys), _heads_first(values)
        partials = [
            attend(
                query,
                keys_first.narrow(2, run.slot, run.tokens),
                values_first.narrow(2, run.slot, run.tokens),
                scale=scale,
            )
            for run in parts.runs
        ]
        for slots in parts.rest:
            key, value = self._gather(keys, values, slots)
            partials.append(attend(query, _heads_first(key), _heads_first(value), scale=scale))
        return partials

    def _gather(self, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values at `slots`, valid until the next call.

        The memory is kept: taking it from the system anew costs more than the copy, in page faults.
        """
        needed = len(slots) * keys[0].numel()
        if self._gathered[0].numel() < needed or self._gathered[0].dtype != keys.dtype:
            self._gathered = (keys.new_empty(2 * needed), values.new_empty(2 * needed))
        key, value = (
            torch.index_select(buffer, 0, slots, out=scratch[:needed].view(len(slots), *buffer.shape[1:]))
            for buffer, scratch in zip((keys, values), self._gathered, strict=True)
        )
        return key, value


def _heads_first(rows: Tensor) -> Tensor:
    """[tokens, heads, dim] as [1, heads, tokens, dim], which is a view."""
    return rows.transpose(0, 1).unsqueeze(0)
