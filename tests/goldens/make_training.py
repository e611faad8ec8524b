"""Reference training from torch, transformers and PEFT: python tests/goldens/make_training.py
[--check]

Needs `pip install 'gemma-multi[reference]'`. Writes `training.npz`, the losses and gradient norms
of some steps of torch's AdamW on transformers' Gemma 3, and `peft_adapter/`, an adapter as PEFT
saves it, with the logits it gives. `--check` makes the numbers again and compares, and loads an
adapter of ours in PEFT.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import random_tensors, tiny_config

from gemma_multi.engines import ALL
from gemma_multi.exporters.peft import save_adapter
from gemma_multi.formats.peft import read_adapter
from gemma_multi.transforms import merge

FILE = Path(__file__).with_name("training.npz")
ADAPTER = Path(__file__).with_name("peft_adapter")
CONFIG = tiny_config()
STEPS, RATE, DECAY, CLIP = 6, 3e-4, 0.1, 1.0
RANK, ALPHA, TARGETS = 2, 6.0, ("q_proj", "o_proj", "down_proj")


def batches() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, labels, lengths) of each step: rows of several lengths, loss on some tokens only."""
    rng = np.random.default_rng(5)
    made = []
    for _ in range(STEPS):
        ids = rng.integers(3, CONFIG.vocab_size, (3, 48)).astype(np.int32)
        labels = np.where(rng.random(ids.shape) < 0.6, np.roll(ids, -1, 1), -1).astype(np.int32)
        labels[:, -1] = -1
        lengths = rng.integers(20, 49, 3)
        for row, length in enumerate(lengths):
            labels[row, length - 1 :] = -1
        made.append((ids, labels, lengths))
    return made


def adapter_ids() -> np.ndarray:
    return np.random.default_rng(6).integers(3, CONFIG.vocab_size, 24)


def their_model() -> Any:
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    fields = {k: v for k, v in CONFIG.to_dict().items() if k != "architectures"}
    del fields["rope_scaling"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(**fields, attn_implementation="eager")).float()
    weights = {name: torch.from_numpy(w) for name, w in random_tensors(CONFIG).items()}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    model.model.embed_tokens.embed_scale = torch.tensor(CONFIG.embedding_scale)
    return model


def reference_training() -> dict[str, np.ndarray]:
    """Losses and gradient norms of each step, and a trained weight."""
    import torch

    model = their_model().train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}],
        lr=RATE,
    )
    losses, gradient_norms = [], []
    for ids, labels, lengths in batches():
        mask = torch.arange(ids.shape[1])[None] < torch.from_numpy(lengths)[:, None]
        logits = model(torch.from_numpy(ids).long(), attention_mask=mask.long()).logits
        targets = torch.from_numpy(labels).long()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-1
        )
        optimizer.zero_grad()
        loss.backward()
        gradient_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        losses.append(float(loss))
    trained = model.model.layers[5].mlp.up_proj.weight.detach().numpy()
    return {"losses": np.array(losses), "norms": np.array(gradient_norms), "weight": trained}


def make_adapter(directory: Path) -> np.ndarray:
    """Saves an adapter with PEFT; the logits it gives, `f32[T, V]`."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS),
                          task_type="CAUSAL_LM", init_lora_weights=False)  # fmt: skip
    model = get_peft_model(their_model(), settings).eval()
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    return their_logits(model)


def their_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(adapter_ids())[None]).logits[0].numpy()


def check_ours() -> float:
    """An adapter that we wrote, in PEFT: the largest difference of a logit."""
    from peft import PeftModel

    from gemma_multi.checkpoint import Checkpoint
    from gemma_multi.engines import create_engine

    base = Checkpoint(CONFIG, random_tensors(CONFIG))
    adapter = read_adapter(ADAPTER, CONFIG)
    ours = (
        create_engine(merge(base, adapter), "keras", "float32").session().read(adapter_ids(), ALL)
    )
    with tempfile.TemporaryDirectory() as work:
        save_adapter(adapter, Path(work, "ours"))
        model = PeftModel.from_pretrained(their_model(), str(Path(work, "ours"))).eval()
        return float(np.abs(their_logits(model) - ours).max())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make or check the reference training.")
    parser.add_argument("--check", action="store_true", help="compare with the files instead")
    if not parser.parse_args().check:
        made = reference_training()
        made["adapter_logits"] = make_adapter(ADAPTER)
        np.savez_compressed(FILE, **made)
        print(f"{FILE.name}: {FILE.stat().st_size / 1e3:.0f} kB")
        return
    kept = np.load(FILE)
    with tempfile.TemporaryDirectory() as work:
        made = {**reference_training(), "adapter_logits": make_adapter(Path(work))}
    for name, value in made.items():
        difference = float(np.abs(kept[name] - value).max())
        print(f"{name:<34} {difference:.1e}")
        if difference > 1e-4:
            raise SystemExit(f"{name}: {FILE.name} differs from the reference")
    difference = check_ours()
    print(f"{'our adapter in PEFT':<34} {difference:.1e}")
    if difference > 2e-4:
        raise SystemExit("PEFT computes something else from our adapter")


if __name__ == "__main__":
    main()
