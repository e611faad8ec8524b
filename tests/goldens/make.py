"""Reference answers from Hugging Face transformers: python tests/goldens/make.py [--check]

Needs `pip install 'gemma-multi[reference]'` (torch). Writes `logits.npz`, which every engine is
compared with, and `filters.npz`, which the sampler is; `--check` makes them again and compares
them with the files. Weights come from a seed (`tests/tiny.py`), so only answers are kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import random_tensors, tiny_config

from gemma_multi.config import ModelConfig

FILE = Path(__file__).with_name("logits.npz")
FILTERS_FILE = Path(__file__).with_name("filters.npz")
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

FILTERS: dict[str, dict[str, Any]] = {
    "top_k 1": {"top_k": 1},
    "top_k 5": {"top_k": 5},
    "top_p 0.3": {"top_p": 0.3},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.2": {"min_p": 0.2},
    "penalty 1.7": {"repetition_penalty": 1.7},
    "all": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05,
            "repetition_penalty": 1.3},
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


def filter_input() -> tuple[np.ndarray, np.ndarray]:
    """(logits `f32[60]`, ids seen before)."""
    rng = np.random.default_rng(3)
    return (rng.standard_normal(60) * 2).astype(np.float32), rng.integers(0, 60, 12)


def reference_log_probabilities(options: dict[str, Any]) -> np.ndarray:
    """What transformers' own processors make of `filter_input`; minus infinity where dropped."""
    import torch
    from transformers.generation import logits_process as theirs

    logits, seen = filter_input()
    steps: list[Any] = []
    for name, processor in (
        ("repetition_penalty", theirs.RepetitionPenaltyLogitsProcessor),
        ("temperature", theirs.TemperatureLogitsWarper),
        ("top_k", theirs.TopKLogitsWarper),
        ("top_p", theirs.TopPLogitsWarper),
        ("min_p", theirs.MinPLogitsWarper),
    ):
        if name in options:
            steps.append(processor(options[name]))
    scores = torch.from_numpy(logits)[None]
    for step in steps:
        scores = step(torch.from_numpy(seen)[None], scores)
    return torch.log_softmax(scores[0], -1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make or check the reference logits.")
    parser.add_argument("--check", action="store_true", help="compare with the file instead")
    check = parser.parse_args().check
    for file, made in (
        (FILE, {name: reference_logits(config) for name, config in CASES.items()}),
        (FILTERS_FILE, {n: reference_log_probabilities(o) for n, o in FILTERS.items()}),
    ):
        if not check:
            np.savez_compressed(file, **made)
            print(f"{file.name}: {len(made)} cases, {file.stat().st_size / 1e3:.0f} kB")
            continue
        kept = np.load(file)
        for name, answer in made.items():
            same = np.isfinite(answer) == np.isfinite(kept[name])
            finite = np.isfinite(answer)
            difference = float(np.abs(kept[name][finite] - answer[finite]).max())
            print(f"{name:<34} {difference:.1e}")
            if difference > 1e-5 or not same.all():
                raise SystemExit(f"{name}: {file.name} differs from transformers")


if __name__ == "__main__":
    main()
