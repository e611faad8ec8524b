"""keras-hub in a process of its own: it imports TensorFlow, and its backend is chosen once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

# Reads a preset as anyone would, and tells what it makes of a text.
CONSUMER = """
import sys, numpy as np, keras_hub
path, output, text = sys.argv[1:]
model = keras_hub.models.Gemma3CausalLM.from_preset(path, dtype="float32")
ids = np.array(model.preprocessor.tokenizer(text)).tolist()
ids = [model.preprocessor.tokenizer.start_token_id, *ids]
hidden = model.backbone({"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)))})
logits = np.array(model.backbone.token_embedding(hidden, reverse=True))[0]
np.savez(output, ids=ids, logits=logits)
"""
AND_MORE = """
generated = model.generate(text, max_length=len(ids) + 4)
assert generated.startswith(text), generated
model.save_to_preset(f"{output}.preset")
"""


def read_by_keras_hub(
    path: Path, text: str, output: Path, more: bool = False
) -> tuple[list[int], np.ndarray]:
    """(ids, `f32[T, V]` logits) of a text. With `more` it generates as well, and saves the preset
    again beside `output`, as `.preset`."""
    code = CONSUMER + AND_MORE * more
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(output), text],
        capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": "jax"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(f"{output}.npz")
    return found["ids"].tolist(), found["logits"]
