"""Reference logits from Hugging Face transformers: python tests/goldens/make.py [--check]

Needs `pip install 'gemma-multi[reference]'`. Writes `logits.npz`, which `tests/test_truth.py`
compares every engine with; `--check` makes the logits again and compares them with the file.
Weights come from a seed (`tests/tiny.py`), so only logits are kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import random_tensors, tiny_config

from gemma_multi.config import ModelConfig

FILE = Path(__file__).with_name("logits.npz")
LENGTH = 70  # tokens, past every window below

CASES = {
    "one key/value head": tiny_config(),
    "grouped heads, other query scale": tiny_config(
        hidden_size=160, num_hidden_layers=13, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=224, sliding_window=7, query_pre_attn_scalar=48.0,
    ),
    "bfloat16 embedding scale": tiny_config(hidden_size=224, dtype="bfloat16"),
    "other rope bases, scaled": tiny_config(
        num_hidden_layers=7, rope_theta=500_000.0, rope_local_theta=4_000.0,
        rope_scaling_factor=8.0, rms_norm_eps=1e-5,
    ),
    "a global layer every third": tiny_config(
        layer_types=("sliding_attention", "sliding_attention", "full_attention") * 3,
        num_hidden_layers=9,
    ),
}  # fmt: skip


def token_ids(config: ModelConfig) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.vocab_size, (2, LENGTH))


def reference_logits(config: ModelConfig) -> np.ndarray:
    """`f32[B, T, V]` from transformers, in float32, eager attention."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    fields = {k: v for k, v in config.to_dict().items() if k != "architectures"}
    if fields["rope_scaling"] is None:
        del fields["rope_scaling"]
    theirs = Gemma3TextConfig(**fields, attn_implementation="eager")
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(theirs).float().eval()
    weights = {name: torch.from_numpy(w) for name, w in random_tensors(config).items()}
    missing, extra = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not extra, extra
    model.tie_weights()
    # transformers rounds the scale only when it runs in bfloat16; Gemma was trained rounded
    embedding = model.model.embed_tokens
    embedding.embed_scale = torch.tensor(config.embedding_scale)
    with torch.no_grad():
        return model(torch.from_numpy(token_ids(config))).logits.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make or check the reference logits.")
    parser.add_argument("--check", action="store_true", help="compare with the file instead")
    check = parser.parse_args().check
    made = {name: reference_logits(config) for name, config in CASES.items()}
    if not check:
        np.savez_compressed(FILE, **made)
        print(f"{FILE}: {len(made)} cases, {FILE.stat().st_size / 1e3:.0f} kB")
        return
    kept = np.load(FILE)
    for name, logits in made.items():
        difference = float(np.abs(kept[name] - logits).max())
        print(f"{name:<34} {difference:.1e}")
        if difference > 1e-5:
            raise SystemExit(f"{name}: the goldens differ from transformers by {difference}")


if __name__ == "__main__":
    main()
