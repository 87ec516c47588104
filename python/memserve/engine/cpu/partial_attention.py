"""Attention over a part of the keys, and the merge of such parts.

The softmax of a query over all its keys is a weighted mean of its softmaxes over any partition of
the keys, with weights e^lse, where lse is the logarithm of a part's sum of exponentials. So keys in
several places (a cached prefix, the new tokens, another machine) can be attended in place.
Knows nothing of requests, pools or SGLang. Source: Dao et al., FlashAttention, arXiv
2205.14135, section 3.1; Liu et al., Ring Attention, arXiv 2310.01889.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Partial(NamedTuple):
    """Attention of queries over a part of their keys. The two fields belong together."""

    output: Tensor
    """[batch, query_heads, queries, value_dim], in the queries' dtype; zero for a query without keys."""
    lse: Tensor
    """[batch, query_heads, queries], float32 (float64 for float64): log of the sum of the
    exponentials of the scaled scores; -inf for a query without keys."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Partial:
    """Attention of `query` over exactly these keys: softmax(scale * query key^T) value.

    query [batch, query_heads, queries, dim]; key [batch, kv_heads, keys, dim]; value
    [batch, kv_heads, keys, value_dim]: one dtype and device, any strides with adjacent elements in
    the last dimension. Each KV head serves query_heads / kv_heads neighbouring query heads.
    `causal`: query i sees keys 0..i, for as many queries as keys. `mask` [batch, 1, 1, keys], float32,
    is added to the scores: 0, or -inf for masked keys. Every row must have an unmasked key, and masked
    keys must be finite. Sums are in float32; for inference, without gradients.
    Raises ValueError if the heads do not divide, if `causal` and queries and keys differ in number,
    or if `causal` comes with a mask.
    """
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads cannot share {key.shape[1]} KV heads evenly")
    if causal and query.shape[2] != key.shape[2]:
        raise ValueError(f"causal attention of {query.shape[2]} queries over {key.shape[2]} keys")
    if causal and mask is not None:
        raise ValueError("causal attention takes no mask")
    if mask is not None:
        mask = mask.to(_wide(query.dtype))  # the kernel silently misreads another dtype
    if query.shape[2] == 0 or key.shape[2] == 0:
        return nothing_seen(query, value.shape[-1])
    if query.device.type != "cpu" or query.shape[-1] != value.shape[-1]:
        return _attend_by_matmul(query, key, value, scale, causal, mask)
    if causal:
        return Partial(*_flash_on_cpu(query, key, value, 0.0, True, scale=scale))
    # Fold the query heads of one KV head into more queries of one head, so that its keys are read once:
    # 1 to 5 times as fast for up to 16 queries, equal for more; two rows of bfloat16 are a fifth slower.
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    pays = rows > 2 or query.dtype is not torch.bfloat16
    folded = query.reshape(query.shape[0], key.shape[1], rows, query.shape[3]) if pays else query
    output, lse = _flash_on_cpu(folded, key, value, 0.0, False, attn_mask=mask, scale=scale)
    return Partial(output.reshape(query.shape), lse.reshape(query.shape[:3]))


def nothing_seen(query: Tensor, value_dim: int) -> Partial:
    """Attention over no keys: the neutral element of `merge`, shaped for `query` (see `attend`)."""
    output = query.new_zeros(*query.shape[:-1], value_dim)
    return Partial(output, query.new_full(query.shape[:-1], -torch.inf, dtype=_wide(query.dtype)))


def merge(parts: Sequence[Partial]) -> Partial:
    """The attention of the same queries over all the keys of disjoint `parts`, in any order.

    Associative and commutative up to rounding; sums are in float32. A single part is returned
    unchanged. Raises ValueError if `parts` is empty.
    """
    if not parts:
        raise ValueError("merge of no parts: use nothing_seen")
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([part.lse for part in parts])
    # A query without keys in any part has only -inf here: subtract 0, not -inf.
    highest = lses.amax(dim=0).clamp_min_(torch.finfo(lses.dtype).min)
    weights = lses.sub_(highest).exp_()
    total = weights.sum(dim=0)
    weights.div_(total.clamp_min(torch.finfo(lses.dtype).tiny))
    output = parts[0].output * weights[0].unsqueeze(-1)
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        output.addcmul_(part.output, weight.unsqueeze(-1))
    return Partial(output.to(parts[0].output.dtype), total.log_().add_(highest))


def merge_outputs(outputs: Tensor, lses: Tensor) -> Tensor:
    """The output of `merge` for stacked parts, in fewer operations, which matters for few queries.

    outputs [parts, ...batch, value_dim] and lses [parts, ...batch] as in `Partial`. Every query must
    have a key in one part; otherwise its output is NaN.
    """
    weights = lses.softmax(dim=0)
    return (outputs * weights.unsqueeze(-1)).sum(dim=0).to(outputs.dtype)


def _attend_by_matmul(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> Partial:
    """`attend` in plain operators, for devices and shapes without a kernel that returns the lse."""
    batch, heads, num_queries, dim = query.shape
    wide = _wide(query.dtype)
    folded = query.reshape(batch, key.shape[1], -1, dim).to(wide)  # rows: (head of the group, query)
    scores = (folded @ key.to(wide).transpose(-1, -2)).mul_(scale)
    if causal:
        unseen = torch.ones(num_queries, num_queries, dtype=torch.bool, device=query.device).triu_(1)
        scores.unflatten(2, (-1, num_queries)).masked_fill_(unseen, -torch.inf)
    if mask is not None:
        scores += mask
    lse = scores.logsumexp(dim=-1)
    output = scores.sub_(lse.unsqueeze(-1)).exp_() @ value.to(wide)
    output = output.to(query.dtype).reshape(batch, heads, num_queries, value.shape[-1])
    return Partial(output, lse.reshape(batch, heads, num_queries))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
