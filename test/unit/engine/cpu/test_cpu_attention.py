"""MemServe's CPU attention against SGLang's torch_native, on SGLang's own pools, layers and batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from torch import Tensor

from memserve.engine.cpu import attention as cpu_attention
from memserve.engine.cpu.amx import avoid_faulty_amx
from memserve.engine.cpu.attention import MemServeCpuAttnBackend, register_cpu_attention
from memserve.engine.cpu.key_parts import GATHERED_TOKENS, MIN_RUN_TOKENS
from memserve.engine.platform_detect import CPU_ATTENTION

PAGE_TOKENS, HEAD_DIM, SLOTS = 16, 16, 2048
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = {"mha": (4, 4), "gqa": (4, 2), "mqa": (6, 1)}
PAGE_EDGES = [1, 15, 16, 17, 31, 32, 33, 127, 128, 129]

# Here and not in a fixture: before any test has made oneDNN choose its instructions.
needs_bfloat16 = pytest.mark.skipif(not avoid_faulty_amx(), reason="this machine traps on bfloat16 products")
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16), torch.float16]
)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_order = pytest.mark.parametrize("order", ["contiguous", "pages", "slots"])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More threads only slow down tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """One layer's pools with a batch in them: request i has prefixes[i] tokens cached and news[i] new.

    `order` is the arrangement of a request's slots: one run, scattered pages, or scattered slots.
    """

    prefixes: Sequence[int]
    news: Sequence[int]
    shape: tuple[int, int] = SHAPES["gqa"]
    dtype: torch.dtype = torch.float32
    order: str = "pages"
    decode: bool = False
    layer_options: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(sum(self.prefixes) * 31 + sum(self.news))
        heads, kv_heads = self.shape
        totals = [prefix + new for prefix, new in zip(self.prefixes, self.news, strict=True)]
        self.runner = make_runner(len(totals), kv_heads, self.dtype)
        self.layer = RadixAttention(heads, HEAD_DIM, 0.3, kv_heads, layer_id=0, **self.layer_options)
        slots = take_slots(totals, self.order)
        rows = torch.randperm(len(totals))  # the order of requests in the table differs from the batch
        for row, own in zip(rows, slots, strict=True):
            self.runner.req_to_token_pool.req_to_token[row, : len(own)] = own
        self.batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE if self.decode else ForwardMode.EXTEND,
            batch_size=len(totals),
            input_ids=torch.zeros(sum(self.news), dtype=torch.int64),
            req_pool_indices=rows,
            seq_lens=torch.tensor(totals),
            seq_lens_sum=sum(totals),
            out_cache_loc=torch.cat(
                [own[len(own) - new :] for own, new in zip(slots, self.news, strict=True)]
            ),
            extend_prefix_lens=torch.tensor(self.prefixes),
            extend_seq_lens=torch.tensor(self.news),
            extend_prefix_lens_cpu=list(self.prefixes),
            extend_seq_lens_cpu=list(self.news),
        )
        self.q = torch.randn(sum(self.news), heads * HEAD_DIM).to(self.dtype)
        self.k, self.v = torch.randn(2, sum(self.news), kv_heads, HEAD_DIM).to(self.dtype)

    def run(self, backend: TorchNativeAttnBackend, **options: object) -> Tensor:
        backend.init_forward_metadata(self.batch)
        return backend.forward(self.q, self.k, self.v, self.layer, self.batch, **options)

    def ours(self, **options: object) -> Tensor:
        return self.run(MemServeCpuAttnBackend(self.runner), **options)

    def theirs(self, **options: object) -> Tensor:
        return self.run(TorchNativeAttnBackend(self.runner), **options)

    def assert_same(self) -> None:
        tolerance = TOLERANCE[self.dtype]
        torch.testing.assert_close(self.ours(), self.theirs(), rtol=tolerance, atol=tolerance)


def make_runner(requests: int, kv_heads: int, dtype: torch.dtype) -> SimpleNamespace:
    """The parts of SGLang's ModelRunner that a backend reads, on real pools with arbitrary KV."""
    pool = MHATokenToKVPool(
        size=SLOTS,
        page_size=PAGE_TOKENS,
        dtype=dtype,
        head_num=kv_heads,
        head_dim=HEAD_DIM,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
    )
    pool.get_key_buffer(0).normal_()
    pool.get_value_buffer(0).normal_()
    table = ReqToTokenPool(requests, SLOTS, "cpu", enable_memory_saver=False)
    return SimpleNamespace(device="cpu", token_to_kv_pool=pool, req_to_token_pool=table)


def take_slots(totals: Sequence[int], order: str) -> list[Tensor]:
    """Distinct slots for each request, in whole pages unless `order` is "slots"."""
    unit = 1 if order == "slots" else PAGE_TOKENS
    counts = [-(-total // unit) for total in totals]
    units = torch.arange(SLOTS // unit) if order == "contiguous" else torch.randperm(SLOTS // unit)
    first = (units[: sum(counts)] * unit + PAGE_TOKENS).split(counts)
    return [
        (own[:, None] + torch.arange(unit)).flatten()[:total]
        for own, total in zip(first, totals, strict=True)
    ]


@every_dtype
@every_shape
@every_order
def test_ragged_extend_over_every_page_edge_equals_torch_native(order, shape, dtype):
    news = [7, 1, 33, 2, 16, 3, 5, 17, 1, 40]
    Case(PAGE_EDGES, news, shape, dtype, order).assert_same()


@every_dtype
@every_shape
@every_order
def test_ragged_decode_over_every_page_edge_equals_torch_native(order, shape, dtype):
    prefixes = [length - 1 for length in PAGE_EDGES]
    Case(prefixes, [1] * len(prefixes), shape, dtype, order, decode=True).assert_same()


@every_dtype
@pytest.mark.parametrize("new", PAGE_EDGES)
def test_cold_prefill_equals_torch_native(new, dtype):
    Case([0], [new], dtype=dtype).assert_same()


@pytest.mark.parametrize("new", [1, 15, 16, 17])
@pytest.mark.parametrize("prefix", [0, 1, 15, 16, 17, 31, 32, 33])
def test_single_request_at_every_page_edge_equals_torch_native(prefix, new):
    Case([prefix], [new]).assert_same()


@every_order
@pytest.mark.parametrize("decode", [False, True])
def test_long_prefixes_equal_torch_native(decode, order):
    """Prefixes long enough for runs attended in place and for several gathered pieces."""
    Case([GATHERED_TOKENS + 200, 0, MIN_RUN_TOKENS], [1, 1, 1], order=order, decode=decode).assert_same()


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)), min_size=1, max_size=6),
    shape=st.sampled_from(list(SHAPES.values())),
    order=st.sampled_from(["contiguous", "pages", "slots"]),
    decode=st.booleans(),
)
def test_any_batch_equals_torch_native(lengths, shape, order, decode):
    prefixes, news = zip(*lengths, strict=True)
    Case(prefixes, [1] * len(news) if decode else news, shape, order=order, decode=decode).assert_same()


@every_order
def test_chunked_and_single_token_extends_equal_one_prefill(order):
    tokens, chunks = 150, [64, 48, 1, 37]
    whole = Case([0], [tokens], order=order)
    expected = whole.ours()
    slots = whole.batch.out_cache_loc
    start = 0
    for new in chunks:
        chunk = Case([start], [new])
        chunk.runner, chunk.layer = whole.runner, whole.layer
        chunk.batch.out_cache_loc = slots[start : start + new]
        chunk.q, chunk.k, chunk.v = (rows[start : start + new] for rows in (whole.q, whole.k, whole.v))
        torch.testing.assert_close(chunk.ours(), expected[start : start + new], rtol=3e-6, atol=3e-6)
        start += new


@pytest.mark.parametrize("decode", [False, True])
def test_attention_stores_new_keys_and_values_unless_save_kv_cache_is_off(decode):
    case = Case([20], [1], decode=decode)
    pool, where = case.runner.token_to_kv_pool, case.batch.out_cache_loc
    before = pool.get_key_buffer(0).clone()
    case.ours(save_kv_cache=False)
    assert torch.equal(pool.get_key_buffer(0), before)
    case.ours()
    assert torch.equal(pool.get_key_buffer(0)[where], case.k)
    assert torch.equal(pool.get_value_buffer(0)[where], case.v)


@pytest.mark.parametrize("decode", [False, True])
def test_layer_without_new_keys_reads_keys_from_the_pool(decode):
    case = Case([20, 0], [1, 1], decode=decode)
    case.k = case.v = None
    case.assert_same()


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"sliding_window_size": 8}, {"attn_type": AttentionType.ENCODER_ONLY}],
    ids=["window", "encoder"],
)
def test_unplanned_kinds_of_attention_equal_torch_native(options, decode):
    prefixes = [40, 12] if "sliding_window_size" in options else [0, 0]
    Case(prefixes, [1, 1] if decode else [9, 5], decode=decode, layer_options=options).assert_same()


def test_pool_of_another_dtype_equals_torch_native():
    case = Case([40, 12], [3, 5], dtype=torch.float16)
    case.q = case.q.float()
    torch.testing.assert_close(case.ours(), case.theirs())


def test_extend_never_pads_its_queries(monkeypatch):
    """The purpose of the backend: it attends new x total, not total x total."""
    attended = []

    def counting(query, key, value, **options):
        attended.append(query.shape[2] * key.shape[2])
        return attend(query, key, value, **options)

    attend = cpu_attention.attend
    monkeypatch.setattr(cpu_attention, "attend", counting)
    Case([1000], [8]).ours()
    assert sum(attended) == 8 * 1008


def test_attention_backend_registration_is_idempotent():
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    register_cpu_attention()
    register_cpu_attention()
    assert ATTENTION_BACKEND_CHOICES.count(CPU_ATTENTION) == 1
    runner = make_runner(1, 2, torch.float32)
    assert isinstance(ATTENTION_BACKENDS[CPU_ATTENTION](runner), MemServeCpuAttnBackend)
