"""SGLang's own benchmark client, unchanged, against a prefill/decode pair."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .conftest import Pair

NUM_PROMPTS = 6


def test_bench_client_gets_an_answer_to_every_request(pair: Pair, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", pair.url),
        *("--model", str(pair.model), "--tokenizer", str(pair.model), "--dataset-name", "random-ids"),
        *("--num-prompts", str(NUM_PROMPTS), "--random-input-len", "64", "--random-output-len", "8"),
        *("--random-range-ratio", "1", "--max-concurrency", "3", "--seed", "1", "--flush-cache"),
        *("--output-file", str(results), "--output-details", "--disable-tqdm"),
    ]
    # The client always imports Hugging Face's `datasets`; random token ids do not need it.
    (tmp_path / "datasets.py").write_text("def load_dataset(*_, **__): raise NotImplementedError\n")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    told = json.loads(results.read_text().splitlines()[-1])
    assert told["completed"] == NUM_PROMPTS
    assert told["total_output_tokens"] == 8 * NUM_PROMPTS
    assert not any(told["errors"])
    assert told["mean_ttft_ms"] > 0
