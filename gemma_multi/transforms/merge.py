"""An adapter merged into a checkpoint: computed in float32 and rounded once.

A quantised weight goes back on its own grid here, from float32, and never through a framework's
quantiser. A dense one stays float32: what is done with it next, another grid or the stored type
(`cast_to_stored`), is then the only rounding.
"""

from __future__ import annotations

import numpy as np

from gemma_multi.checkpoint import Adapter, Checkpoint, Tensor
from gemma_multi.quantization.tensor import SFP8, PackedTensor, sfp8_tensor
from gemma_multi.transforms.precision import DENSE


def merge(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """`checkpoint` with the adapter in its weights."""
    adapter.check(checkpoint.config, checkpoint.provenance.channels)
    how = f"LoRA adapter of rank {adapter.rank} merged"
    return checkpoint.with_tensors(merged_tensors(checkpoint, adapter), how)


def merged_tensors(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, Tensor]:
    """The tensors that the adapter changes: on their grid where they have one, else `f32`."""
    merged: dict[str, Tensor] = {}
    for name in adapter.tensors:
        before = checkpoint.tensors[name]
        changed = checkpoint.weight(name).astype(np.float32) + adapter.change(name)
        merged[name] = before.packed_like(changed) if isinstance(before, PackedTensor) else changed
    return merged


def cast_to_stored(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """`checkpoint` with each dense tensor in the type that `base` holds it in."""
    changes: dict[str, Tensor] = {}
    for name, info in checkpoint.tensors.infos.items():
        stored = base.tensors.infos[name].dtype
        if not info.is_packed and info.dtype != stored:
            dense = checkpoint.weight(name)
            changes[name] = sfp8_tensor(dense) if stored == SFP8 else dense.astype(DENSE[stored])
    return checkpoint.with_tensors(changes) if changes else checkpoint
