"""The CPU attention backend against SGLang's `torch_native`, in one run on one thread.

Real SGLang KV pools, layers and batches, time per layer: a warm extend of 64
tokens over 8,192 cached ones, chunked and cold prefill, and decode of ragged batches; for the
attention of a 25M-parameter Llama (8 heads of 64, 4 KV heads) and for MHA, in float32 and bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from figures import measure_together, progress, report

warnings.filterwarnings("ignore", message="Only CUDA")
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend  # noqa: E402
from sglang.srt.layers.radix_attention import RadixAttention  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode  # noqa: E402

from memserve.engine.cpu.amx import avoid_faulty_amx  # noqa: E402
from memserve.engine.cpu.attention import MemServeCpuAttnBackend  # noqa: E402

HEADS, HEAD_DIM, PAGE_TOKENS = 8, 64, 16
NOISE = 1.1
"""By how much equal work may differ between two runs on a machine that others use."""


@dataclass(frozen=True, slots=True)
class Load:
    """One batch: each request has prefixes[i] tokens in the pool and brings news[i] more."""

    name: str
    prefixes: Sequence[int]
    news: Sequence[int]
    decode: bool = False
    scattered: bool = False
    """Every page of 16 slots away from its neighbours, instead of one run per request."""

    @property
    def layers(self) -> int:
        """A decode is timed over 8 layers, which share its plan; for the rest one layer is enough work."""
        return 8 if self.decode else 1

    @property
    def target(self) -> float:
        """Our time over torch_native's."""
        return 1 / 25 if self.prefixes[0] == 8192 else 1.0


def decode_load(batch: int, tokens: int = 1000, scattered: bool = False) -> Load:
    """A decode step of `batch` requests of about so many tokens, all of different lengths."""
    prefixes = [tokens + (-1) ** at * tokens * at // 80 for at in range(batch)]
    name = f"decode/{batch}x{tokens}" + ("/scattered" if scattered else "")
    return Load(name, prefixes, [1] * batch, decode=True, scattered=scattered)


LOADS = (
    Load("extend/64+8192", [8192], [64]),
    Load("extend/64+8192/scattered", [8192], [64], scattered=True),
    Load("extend/1024+3072", [3072], [1024]),
    Load("extend/4x(32+1000)", [1000, 990, 1013, 997], [32] * 4),
    *(Load(f"prefill/{tokens}", [0], [tokens]) for tokens in (512, 2048, 4096)),
    *(decode_load(batch) for batch in (1, 8, 32)),
    *(decode_load(batch, scattered=True) for batch in (1, 8, 32)),
    *(decode_load(batch, tokens=100) for batch in (1, 32)),
)


class Bench:
    """One layer's KV pool with a batch's tokens in it, and both backends over the pool."""

    def __init__(self, load: Load, kv_heads: int, dtype: torch.dtype) -> None:
        self.load = load
        totals = [prefix + new for prefix, new in zip(load.prefixes, load.news, strict=True)]
        pages = [-(-total // PAGE_TOKENS) for total in totals]
        self.layers = [
            RadixAttention(HEADS, HEAD_DIM, HEAD_DIM**-0.5, kv_heads, at) for at in range(load.layers)
        ]
        runner = make_runner(sum(pages), totals, kv_heads, dtype, load.layers)
        order = torch.randperm(sum(pages)) if load.scattered else torch.arange(sum(pages))
        table = runner.req_to_token_pool.req_to_token
        new_slots = []
        for row, (own, total, new) in enumerate(zip(order.split(pages), totals, load.news, strict=True)):
            slots = ((own + 1)[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()[:total]
            table[row, :total] = slots
            new_slots.append(slots[total - new :])
        self.batch = make_batch(load, totals, torch.cat(new_slots))
        num_new = sum(load.news)
        self.q = torch.randn(num_new, HEADS * HEAD_DIM).to(dtype)
        self.k, self.v = torch.randn(2, num_new, kv_heads, HEAD_DIM).to(dtype)
        self.backends = MemServeCpuAttnBackend(runner), TorchNativeAttnBackend(runner)

    def step(self, backend: TorchNativeAttnBackend) -> Callable[[], torch.Tensor]:
        """The attention of one forward pass: its plan and every layer; what the last layer returned."""

        def forward_pass() -> torch.Tensor:
            backend.init_forward_metadata(self.batch)
            for layer in self.layers:
                output = backend.forward(self.q, self.k, self.v, layer, self.batch)
            return output

        return forward_pass


def make_runner(pages: int, totals: Sequence[int], kv_heads: int, dtype: torch.dtype, layers: int) -> Any:
    """What a backend reads of SGLang's ModelRunner, on real pools with room for the batch."""
    pool = MHATokenToKVPool(
        size=pages * PAGE_TOKENS,
        page_size=PAGE_TOKENS,
        dtype=dtype,
        head_num=kv_heads,
        head_dim=HEAD_DIM,
        layer_num=layers,
        device="cpu",
        enable_memory_saver=False,
    )
    for layer in range(layers):
        pool.get_key_buffer(layer).normal_()
        pool.get_value_buffer(layer).normal_()
    table = ReqToTokenPool(len(totals), max(totals), "cpu", enable_memory_saver=False)
    return SimpleNamespace(device="cpu", token_to_kv_pool=pool, req_to_token_pool=table)


def make_batch(load: Load, totals: Sequence[int], new_slots: torch.Tensor) -> ForwardBatch:
    """The batch of `load` as the scheduler would hand it to a backend."""
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE if load.decode else ForwardMode.EXTEND,
        batch_size=len(totals),
        input_ids=torch.zeros(len(new_slots), dtype=torch.int64),
        req_pool_indices=torch.arange(len(totals)),
        seq_lens=torch.tensor(totals),
        seq_lens_sum=sum(totals),
        out_cache_loc=new_slots,
        extend_prefix_lens=torch.tensor(load.prefixes),
        extend_seq_lens=torch.tensor(load.news),
        extend_prefix_lens_cpu=list(load.prefixes),
        extend_seq_lens_cpu=list(load.news),
    )


def main() -> int:
    """Print the figures, checking each pair of results; 1 if one misses its target, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the figures whose name contains this")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16]
    if not avoid_faulty_amx():
        progress("bfloat16 is left out: this machine traps on it")
        dtypes.pop()
    missed = []
    for kv_heads, dtype, load in itertools.product((4, HEADS), dtypes, LOADS):
        kind = "mha" if kv_heads == HEADS else "gqa"
        name = f"attention/{kind}/{str(dtype).removeprefix('torch.')}/{load.name}"
        if args.only not in name:
            continue
        bench = Bench(load, kv_heads, dtype)
        ours, theirs = (bench.step(backend) for backend in bench.backends)
        torch.testing.assert_close(ours(), theirs(), rtol=0.02, atol=0.02)
        samples = measure_together([ours, theirs], args.repeats)
        ms = [[second * 1e3 / load.layers for second in taken] for taken in samples]
        report(name, ms[0], "ms per layer", baseline=ms[1], target=load.target)
        # What a turn's neighbours do slows both sides of its ratio.
        ratio = statistics.median(mine / other for mine, other in zip(*samples, strict=True))
        progress(f"{name}: {1 / ratio:.1f} x as fast as torch_native")
        if ratio > load.target * NOISE:
            missed.append(name)
    if missed:
        progress("missed: " + ", ".join(missed))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
