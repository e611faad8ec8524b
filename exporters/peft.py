"""LoRA adapters as Hugging Face PEFT loads them. An adapter is no checkpoint, so there is no
record here: training and `save_adapter` write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemma_multi.checkpoint import Adapter
from gemma_multi.errors import CheckpointError
from gemma_multi.files import check_output, new_directory, write_json
from gemma_multi.formats.peft import CHANNELS, CONFIG_FILE, PREFIX, WEIGHTS_FILE
from gemma_multi.safetensors_file import write_safetensors


def save_adapter(adapter: Adapter, output: str | Path) -> Path:
    """Writes a directory that PEFT loads as it is. Raises OptionError, CheckpointError."""
    output = Path(output)
    check_output(output, directory=True)
    flat = {}
    for name, (a, b) in adapter.tensors.items():
        stem = PREFIX + name.removesuffix(".weight")
        flat[f"{stem}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
        flat[f"{stem}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "target_modules": list(adapter.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": bool(adapter.scaling),
        "use_dora": False,
        "inference_mode": True,
        **({CHANNELS: adapter.channels} if adapter.channels else {}),
    }
    try:
        with new_directory(output) as temporary:
            write_safetensors(flat, temporary / WEIGHTS_FILE, {"format": "pt"})
            write_json(temporary / CONFIG_FILE, settings)
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be saved: {error.strerror or error}") from error
    return output
