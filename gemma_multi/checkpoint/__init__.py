"""The hub of the star: everything that is read becomes a Checkpoint, everything written comes
from one."""

from gemma_multi.checkpoint.adapter import LINEAR_LAYERS, Adapter
from gemma_multi.checkpoint.checkpoint import Checkpoint
from gemma_multi.checkpoint.provenance import Provenance
from gemma_multi.checkpoint.tensors import Origin, Tensor, TensorInfo, Tensors, dense, rows_of

__all__ = [
    "LINEAR_LAYERS",
    "Adapter",
    "Checkpoint",
    "Origin",
    "Provenance",
    "Tensor",
    "TensorInfo",
    "Tensors",
    "dense",
    "rows_of",
]
