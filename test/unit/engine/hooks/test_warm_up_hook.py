"""The functions that torch compiles at their first use are called before the server is ready."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memserve.engine import request_seams as seams
from memserve.engine.hooks import warm_up


@pytest.mark.parametrize("is_seeded", [False, True])
def test_compiled_functions_are_called_with_the_samplers_shapes(
    monkeypatch: pytest.MonkeyPatch, is_seeded: bool
) -> None:
    called: list[tuple[str, list[tuple[tuple[int, ...], str]]]] = []

    def record(name: str) -> Any:
        def call(*tensors: torch.Tensor) -> None:
            assert not torch.is_grad_enabled()
            called.append((name, [(tuple(one.shape), str(one.dtype)) for one in tensors]))

        return call

    deterministic = SimpleNamespace(enable_deterministic_inference=is_seeded)
    fakes = {
        seams.SCALE_LOGITS: record("scale"),
        seams.SEEDED_SAMPLE: record("sample"),
        seams.GRAD_MODE: torch.no_grad,
        seams.EXECUTION: lambda: SimpleNamespace(deterministic=deterministic),
    }
    monkeypatch.setattr(warm_up.pkgutil, "resolve_name", fakes.__getitem__)
    warm_up.warm_up(None, SimpleNamespace(device="cpu", model_config=SimpleNamespace(vocab_size=9)))
    scaled = [shapes for name, shapes in called if name == "scale"]
    assert scaled == [[((size, 9), "torch.float32")] * 2 for size in (1, 2)]
    sampled = [[shape for shape, _ in shapes] for name, shapes in called if name == "sample"]
    assert sampled == ([[(size, 9), (size,), (size,)] for size in (1, 2)] if is_seeded else [])
