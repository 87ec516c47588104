#!/usr/bin/env python3
"""Write a small Llama-shaped model with random weights and a byte-level tokenizer; no downloads.

    python scripts/make_tiny_model.py models/tiny                # for tests: starts fast
    python scripts/make_tiny_model.py models/bench --size bench  # prefill costs as in a real model

The same size and seed give the same bytes on every machine. The generated text has no meaning, but it is
printable ASCII, so that a conversation tokenizes to exactly the generated ids. Any Hugging Face model
directory works in its place.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """A Llama configuration; every head has `head_dim` numbers."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int


SIZES = {
    "tiny": Size(hidden=64, intermediate=160, layers=3, heads=4, kv_heads=2, head_dim=16, context=8192),
    "bench": Size(hidden=384, intermediate=1024, layers=6, heads=6, kv_heads=2, head_dim=64, context=32768),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="output directory; created if missing")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny", help="size (default: tiny)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    args = parser.parse_args()
    recipe = {"size": args.size, "seed": args.seed, "format": 1}
    stamp = args.directory / "memserve_recipe.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == recipe:
        print(f"{args.directory}: already there")
        return 0
    args.directory.mkdir(parents=True, exist_ok=True)
    size = SIZES[args.size]
    vocabulary = write_tokenizer(args.directory, size)
    write_config(args.directory, size, len(vocabulary))
    tensors = make_weights(size, vocabulary, np.random.default_rng(args.seed))
    save_file(tensors, args.directory / "model.safetensors", metadata={"format": "pt"})
    stamp.write_text(json.dumps(recipe))
    millions = sum(tensor.size for tensor in tensors.values()) / 1e6
    print(f"{args.directory}: {args.size}, {millions:.1f}M parameters, context {size.context}")
    return 0


def write_tokenizer(directory: Path, size: Size) -> list[str]:
    """One token per byte, then the special ones. Returns the tokens in the order of their ids."""
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.save(str(directory / "tokenizer.json"))
    pad, _, end_of_turn, end_of_text = SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": size.context,
        "clean_up_tokenization_spaces": False,
        "pad_token": pad,
        "bos_token": end_of_text,
        "eos_token": end_of_turn,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return vocabulary


def write_config(directory: Path, size: Size, vocab_size: int) -> None:
    """`config.json` and `generation_config.json`, as transformers and SGLang read them."""
    end_of_turn = vocab_size - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index("<|im_end|>")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": vocab_size,
        "bos_token_id": vocab_size - 1,
        "eos_token_id": end_of_turn,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"eos_token_id": end_of_turn, "bos_token_id": vocab_size - 1}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=1))


def make_weights(size: Size, vocabulary: list[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random weights at a scale where attention uses the whole context and the best token is distinct.

    Only printable ASCII has a row in the output layer: every other logit is 0, far below the best.
    """

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    ones = np.ones(size.hidden, dtype=np.float32)
    query_width, kv_width = size.heads * size.head_dim, size.kv_heads * size.head_dim
    embedding = rng.standard_normal((len(vocabulary), size.hidden)).astype(np.float32)
    tensors = {"model.embed_tokens.weight": embedding}
    for layer in range(size.layers):
        name = f"model.layers.{layer}."
        tensors |= {
            name + "input_layernorm.weight": ones.copy(),
            name + "self_attn.q_proj.weight": matrix(query_width, size.hidden, 1.5),
            name + "self_attn.k_proj.weight": matrix(kv_width, size.hidden, 1.5),
            name + "self_attn.v_proj.weight": matrix(kv_width, size.hidden),
            name + "self_attn.o_proj.weight": matrix(size.hidden, query_width, 2.0),
            name + "post_attention_layernorm.weight": ones.copy(),
            name + "mlp.gate_proj.weight": matrix(size.intermediate, size.hidden),
            name + "mlp.up_proj.weight": matrix(size.intermediate, size.hidden),
            name + "mlp.down_proj.weight": matrix(size.hidden, size.intermediate),
        }
    tensors["model.norm.weight"] = ones.copy()
    output = matrix(len(vocabulary), size.hidden, 4.0)
    byte_of = {token: chr(byte) for byte, token in _byte_tokens().items()}
    printable = [" " <= byte_of.get(token, "\0") <= "~" for token in vocabulary]
    output[~np.array(printable)] = 0.0
    tensors["lm_head.weight"] = output
    return tensors


def _byte_tokens() -> dict[int, str]:
    """Each byte's token in the byte-level alphabet of GPT-2: itself if printable, else shifted."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}


if __name__ == "__main__":
    sys.exit(main())
