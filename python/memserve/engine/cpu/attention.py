"""Attention backend for SGLang on the CPU, O(new x total): a cached prefix is read, never recomputed.

SGLang's own `torch_native` backend pads the new queries to the whole length, so a prefix hit saves
no attention. Here an extend is

                 cached prefix (key parts)      new tokens
               +----------------------------+---------------+
    new        |           dense            |  causal       |
    queries    +----------------------------+---------------+

merged by log-sum-exp, and a decode is dense over its key parts. Long runs of adjacent slots are
attended in place, in the pool. The remaining slots are gathered; in a decode, the short remainders of
several requests are padded to one kernel call. `torch_native`, the base class, computes all attention
that is not plain causal self-attention (cross-attention, sliding windows, unequal head sizes, a KV pool
of another dtype).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from memserve.engine.cpu.key_parts import DecodePlan, KeyParts, KeyRun, plan_decode, split_keys
from memserve.engine.cpu.partial_attention import Partial, attend, merge, merge_outputs, nothing_seen
from memserve.engine.platform_detect import CPU_ATTENTION

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


def register_cpu_attention() -> None:
    """Register `--attention-backend memserve_cpu` (CPU_ATTENTION) in this process's SGLang. Idempotent.

    Every SGLang process needs it: the launcher accepts the flag, the schedulers build the backend.
    """
    register_attention_backend(CPU_ATTENTION)(MemServeCpuAttnBackend)
    if CPU_ATTENTION not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([CPU_ATTENTION])


@dataclass(frozen=True, slots=True)
class ExtendRequest:
    """One request of an extend batch: its new tokens are rows start..stop-1 of the batch's queries."""

    start: int
    stop: int
    prefix: KeyParts
    slots: Tensor
    """[stop - start] integers: the pool's slots of the new tokens."""


class MemServeCpuAttnBackend(TorchNativeAttnBackend):
    """Drop-in for `torch_native`: equal results up to rounding, O(new x total) for an extend.

    One instance per model runner; scheduler thread only. `init_forward_metadata` plans a forward pass
    once, and every layer follows the plan.
    """

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        self._extend: list[ExtendRequest] = []
        self._decode: DecodePlan | None = None
        self._gathered = (torch.empty(0), torch.empty(0))

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan this pass from the requests' lengths and slots, which must be final."""
        super().init_forward_metadata(forward_batch)
        self._extend, self._decode = [], None
        mode = forward_batch.forward_mode
        if mode.is_idle() or forward_batch.encoder_lens is not None:
            return
        rows = [self.req_to_token_pool.req_to_token[at] for at in forward_batch.req_pool_indices.tolist()]
        if mode.is_decode():
            totals = forward_batch.seq_lens.tolist()
            slots = [row[:total] for row, total in zip(rows, totals, strict=True)]
            self._decode = plan_decode(slots)
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
        plan = self._decode
        if plan is None or not self._is_plain(layer, q, keys):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        self._store(k, v, layer, forward_batch, save_kv_cache)
        queries = q.reshape(-1, layer.tp_q_head_num, 1, layer.qk_head_dim)
        parts = [
            self._attend_run(queries[request : request + 1], run, keys, values, layer.scaling)
            for request, run in plan.runs
        ]
        for gather in plan.gathers:
            query = queries.index_select(0, gather.requests)
            key, value = self._gather(keys, values, gather.slots, len(query))
            parts.append(attend(query, key, value, scale=layer.scaling, mask=gather.mask))
        if plan.columns is not None:
            parts.append(nothing_seen(queries[:1], layer.v_head_dim))
        output, lse = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        if plan.columns is not None:
            output = merge_outputs(output[plan.columns], lse[plan.columns])
        return output.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _plan_extend(self, rows: Sequence[Tensor], forward_batch: ForwardBatch) -> list[ExtendRequest]:
        news = forward_batch.extend_seq_lens_cpu
        prefixes = forward_batch.extend_prefix_lens_cpu
        if news is None or prefixes is None:
            news, prefixes = forward_batch.extend_seq_lens.tolist(), forward_batch.extend_prefix_lens.tolist()
        parts = split_keys([row[:prefix] for row, prefix in zip(rows, prefixes, strict=True)], news)
        stops = list(accumulate(news))
        return [
            ExtendRequest(stop - new, stop, prefix_parts, row[prefix : prefix + new])
            for row, prefix, new, stop, prefix_parts in zip(rows, prefixes, news, stops, parts, strict=True)
        ]

    def _pool_of(self, layer: RadixAttention) -> tuple[Tensor, Tensor]:
        """The keys and values of this layer, each [slots, kv_heads, dim]."""
        pool = self.token_to_kv_pool
        return pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)

    def _is_plain(self, layer: RadixAttention, q: Tensor, keys: Tensor) -> bool:
        """Whether the plan covers this layer: plain self-attention. `torch_native` computes the others."""
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
        partials = [self._attend_run(query, run, keys, values, scale) for run in parts.runs]
        for piece in parts.pieces:
            key, value = self._gather(keys, values, piece, 1)
            partials.append(attend(query, key, value, scale=scale))
        return partials

    def _attend_run(self, query: Tensor, run: KeyRun, keys: Tensor, values: Tensor, scale: float) -> Partial:
        key, value = (_heads_first(rows[run.slot : run.slot + run.tokens]) for rows in (keys, values))
        return attend(query, key, value, scale=scale)

    def _gather(self, keys: Tensor, values: Tensor, slots: Tensor, pieces: int) -> tuple[Tensor, Tensor]:
        """The keys and values at `slots`, each [pieces, heads, width, dim], valid until the next call.

        The buffers are reused: new memory costs more page faults than the copy takes.
        """
        tokens = len(slots)
        row = keys.shape[1:]
        if len(self._gathered[0]) < tokens or self._gathered[0].shape[1:] != row:
            self._gathered = (keys.new_empty(2 * tokens, *row), values.new_empty(2 * tokens, *row))
        key, value = self._gathered[0][:tokens], self._gathered[1][:tokens]
        torch.index_select(keys, 0, slots, out=key)
        torch.index_select(values, 0, slots, out=value)
        shape = (pieces, tokens // pieces, *row)
        return key.view(shape).transpose(1, 2), value.view(shape).transpose(1, 2)


def _heads_first(rows: Tensor) -> Tensor:
    """[tokens, heads, dim] as [1, heads, tokens, dim], which is a view."""
    return rows.transpose(0, 1).unsqueeze(0)
