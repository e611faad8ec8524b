"""Transforms: a Checkpoint in, another one out. To a precision, with an adapter merged, with
its residual stream at a scale that float16 holds, and with a smaller vocabulary."""

from gemma_multi.transforms.merge import cast_to_stored, merge
from gemma_multi.transforms.precision import (
    DENSE,
    GRIDS,
    original,
    quantize_checkpoint,
    tensor_error,
    to_precision,
    without_sfp8,
)
from gemma_multi.transforms.report import (
    Calibration,
    Closeness,
    QuantizationReport,
    Recovery,
    TensorError,
)
from gemma_multi.transforms.rescale import fit_float16, rescaled
from gemma_multi.transforms.trim import trimmed

__all__ = [
    "DENSE",
    "GRIDS",
    "Calibration",
    "Closeness",
    "QuantizationReport",
    "Recovery",
    "TensorError",
    "cast_to_stored",
    "fit_float16",
    "merge",
    "original",
    "quantize_checkpoint",
    "rescaled",
    "tensor_error",
    "to_precision",
    "trimmed",
    "without_sfp8",
]
