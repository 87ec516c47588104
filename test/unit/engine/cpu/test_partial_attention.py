"""Attention over parts of the keys, against the definition in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memserve.engine.cpu.amx import avoid_faulty_amx
from memserve.engine.cpu.partial_attention import Partial, attend, merge, merge_outputs, nothing_seen

SCALE = 0.17
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = {"mha": (4, 4), "gqa": (8, 2), "mqa": (6, 1)}

# Here and not in a fixture: before any test has made oneDNN choose its instructions.
needs_bfloat16 = pytest.mark.skipif(not avoid_faulty_amx(), reason="this machine traps on bfloat16 products")
every_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16), torch.float16, torch.float64],
)
every_shape = pytest.mark.parametrize(("heads", "kv_heads"), SHAPES.values(), ids=SHAPES)


def tensors(queries: int, keys: int, heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """query, key and value, reproducible, in the strides of a token-major pool."""
    torch.manual_seed(queries * 1000 + keys)
    return tuple(
        torch.randn(2, tokens, num, 16).to(dtype).transpose(1, 2)
        for tokens, num in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    )


def by_definition(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Partial:
    """Softmax attention in float64, with the keys repeated for every query head."""
    group = query.shape[1] // key.shape[1]
    key, value = (rows.double().repeat_interleave(group, dim=1) for rows in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * SCALE
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return Partial(scores.softmax(-1) @ value, scores.logsumexp(-1))


def assert_same(actual: Partial, expected: Partial, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@every_dtype
@every_shape
@pytest.mark.parametrize("queries", [1, 2, 17, 64])
def test_attend_is_softmax_attention_with_its_log_sum_exp(queries, heads, kv_heads, dtype):
    query, key, value = tensors(queries, 33, heads, kv_heads, dtype)
    seen = attend(query, key, value, scale=SCALE)
    assert seen.output.dtype == dtype
    assert seen.lse.dtype == torch.promote_types(dtype, torch.float32)
    assert_same(seen, by_definition(query, key, value), dtype)


@every_dtype
@every_shape
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 65])
def test_causal_attention_covers_each_token_and_its_predecessors(tokens, heads, kv_heads, dtype):
    query, key, value = tensors(tokens, tokens, heads, kv_heads, dtype)
    seen = attend(query, key, value, scale=SCALE, causal=True)
    assert_same(seen, by_definition(query, key, value, causal=True), dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_attend_accepts_values_of_another_width_than_keys(causal):
    query, key, value = tensors(9, 9, 8, 2, torch.float32)
    seen = attend(query, key, value[..., :6], scale=SCALE, causal=causal)
    assert_same(seen, by_definition(query, key, value[..., :6], causal), torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("causal", [False, True])
def test_attend_and_merge_give_equal_results_on_a_gpu(causal):
    query, key, value = tensors(9, 9, 8, 2, torch.float32)
    seen = attend(query.cuda(), key.cuda(), value.cuda(), scale=SCALE, causal=causal)
    merged = merge([seen, nothing_seen(query.cuda(), 16)])
    expected = by_definition(query, key, value, causal)
    assert_same(Partial(merged.output.cpu(), merged.lse.cpu()), expected, torch.float32)


@every_dtype
@every_shape
def test_partials_of_keys_split_at_any_position_merge_to_full_attention(heads, kv_heads, dtype):
    query, key, value = tensors(5, 34, heads, kv_heads, dtype)
    whole = by_definition(query, key, value)
    for cut in range(35):
        parts = [
            attend(query, key[:, :, part], value[:, :, part], scale=SCALE)
            for part in (slice(0, cut), slice(cut, 34))
        ]
        assert_same(merge(parts), whole, dtype)


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 40), max_size=6),
    order=st.randoms(use_true_random=False),
    magnitude=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_partials_of_any_partition_in_any_order_merge_to_full_attention(cuts, order, magnitude):
    query, key, value = tensors(3, 40, 4, 2, torch.float32)
    query = query * magnitude
    parts = [
        attend(query, key[:, :, a:b], value[:, :, a:b], scale=SCALE)
        for a, b in itertools.pairwise([0, *sorted(cuts), 40])
    ]
    order.shuffle(parts)
    at_once = merge(parts)
    while len(parts) > 1:
        at = order.randrange(len(parts) - 1)
        parts[at : at + 2] = [merge(parts[at : at + 2])]
    expected = by_definition(query, key, value)
    # A log-sum-exp is as large as the scores, so its rounding affects the weights.
    tolerance = 5e-6 * max(1.0, magnitude)
    for merged in (at_once, parts[0]):
        torch.testing.assert_close(merged.output.double(), expected.output, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(merged.lse.double(), expected.lse, rtol=3e-6, atol=tolerance)


@every_dtype
def test_merge_outputs_equals_merge_of_the_same_parts(dtype):
    query, key, value = tensors(2, 34, 4, 2, dtype)
    parts = [
        attend(query, key[:, :, part], value[:, :, part], scale=SCALE)
        for part in (slice(0, 5), slice(5, 5), slice(5, 34))
    ]
    output = merge_outputs(*map(torch.stack, zip(*parts, strict=True)))
    assert output.dtype is dtype
    assert_same(Partial(output, merge(parts).lse), by_definition(query, key, value), dtype)


def test_merge_of_very_different_magnitudes_does_not_overflow():
    far = [Partial(torch.full((1, 1, 1, 2), at), torch.full((1, 1, 1), at)) for at in (-3e38, 700.0, 3e38)]
    assert_same(merge(far), far[2], torch.float32)
    assert_same(merge(far[:2]), far[1], torch.float32)


def test_merge_with_an_empty_part_changes_nothing():
    query, key, value = tensors(3, 7, 4, 2, torch.float32)
    seen = attend(query, key, value, scale=SCALE)
    nothing = attend(query, key[:, :, :0], value[:, :, :0], scale=SCALE)
    assert (nothing.output == 0).all()
    assert (nothing.lse == -torch.inf).all()
    for parts, expected in (
        ([nothing, seen], seen),
        ([seen, nothing, nothing], seen),
        ([nothing, nothing], nothing),
    ):
        merged = merge(parts)
        assert torch.equal(merged.output, expected.output)
        assert torch.equal(merged.lse, expected.lse)


@every_dtype
@every_shape
@pytest.mark.parametrize("value_dim", [16, 6], ids=["kernel", "matmul"])
def test_masked_keys_do_not_contribute(heads, kv_heads, dtype, value_dim):
    query, key, value = tensors(1, 33, heads, kv_heads, dtype)
    mask = torch.zeros(2, 1, 1, 33)
    mask[0, ..., 20:] = -torch.inf
    seen = attend(query, key, value[..., :value_dim], scale=SCALE, mask=mask)
    for row, keys in enumerate((20, 33)):
        alone = by_definition(
            *(rows[row : row + 1, :, :keys] for rows in (query, key, value[..., :value_dim]))
        )
        assert_same(Partial(seen.output[row : row + 1], seen.lse[row : row + 1]), alone, dtype)


def test_attend_without_queries_returns_an_empty_result():
    query, key, value = tensors(0, 7, 4, 2, torch.float32)
    assert attend(query, key, value, scale=SCALE).output.shape == (2, 4, 0, 16)


def test_merge_does_not_modify_its_parts():
    query, key, value = tensors(3, 8, 4, 2, torch.float32)
    parts = [attend(query, key[:, :, at:], value[:, :, at:], scale=SCALE) for at in (0, 4)]
    before = [Partial(part.output.clone(), part.lse.clone()) for part in parts]
    merge(parts)
    for part, was in zip(parts, before, strict=True):
        assert torch.equal(part.output, was.output)
        assert torch.equal(part.lse, was.lse)


def test_attend_and_merge_refuse_invalid_arguments():
    query, key, value = tensors(3, 7, 4, 3, torch.float32)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 KV heads"):
        attend(query, key, value, scale=SCALE)
    query, key, value = tensors(3, 7, 4, 2, torch.float32)
    with pytest.raises(ValueError, match="3 queries over 7 keys"):
        attend(query, key, value, scale=SCALE, causal=True)
    with pytest.raises(ValueError, match="no mask"):
        attend(query, query, query, scale=SCALE, causal=True, mask=torch.zeros(2, 1, 1, 3))
    with pytest.raises(ValueError, match="nothing_seen"):
        merge([])
