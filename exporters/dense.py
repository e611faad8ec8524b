"""Dense weights for programs that hold no grid of ours: in which type, and some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Tensor, dense, rows_of
from gemma_multi.errors import OptionError
from gemma_multi.quantization.tensor import BFLOAT16

PRECISION_HELP = "float32 or bfloat16, or auto: as stored, float32 where it is quantised (exactly)."
_PRECISIONS = ("bfloat16", "float32")
_EXACT = {"int4": "float32", "int8": "float32", "sfp8": "bfloat16"}


def dense_types(checkpoint: Checkpoint, precision: str) -> tuple[dict[str, np.dtype], str]:
    """(what each tensor is written as, one name for the linear layers' or "mixed"). Raises
    OptionError."""
    if precision not in ("auto", *_PRECISIONS):
        raise OptionError(
            f"precision is {precision!r}, expected one of auto, {', '.join(_PRECISIONS)}"
        )
    types = {}
    for name, info in checkpoint.tensors.infos.items():
        one = _EXACT.get(info.dtype, info.dtype) if precision == "auto" else precision
        types[name] = BFLOAT16 if one == "bfloat16" else np.dtype(one).newbyteorder("<")
    linear = {dtype.name for name, dtype in types.items() if name.endswith("_proj.weight")}
    return types, linear.pop() if len(linear) == 1 else "mixed"


def dense_rows(
    tensor: Tensor, dtype: np.dtype, at_a_time: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """A tensor in parts, and which rows each is."""
    for begin in range(0, tensor.shape[0], at_a_time):
        part = slice(begin, begin + at_a_time)
        yield part, dense(rows_of(tensor, part)).astype(dtype, copy=False)
