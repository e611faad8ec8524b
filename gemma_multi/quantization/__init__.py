"""The weight grids, and `quantize`: any checkpoint to the int4 directory.

One definition of each grid serves NumPy, MLX and JAX (see `int4` and `int8`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_multi.config import EMBEDDING
from gemma_multi.errors import OptionError
from gemma_multi.quantization.int4 import GROUP_SIZE

if TYPE_CHECKING:
    from gemma_multi.checkpoint import Checkpoint
    from gemma_multi.checkpoint.checkpoint import Tensor

Progress = Callable[[int, int], None]  # parameters done, parameters in all


@dataclass(frozen=True)
class TensorError:
    """How well one tensor sits on its grid; `error` is root-mean-square, relative."""

    name: str
    shape: tuple[int, ...]
    bits: int
    error: float


@dataclass(frozen=True)
class Recovery:
    """How far an int4 model's probabilities are from the unquantised one's, on rows held out: the
    mean divergence a token, in nats, of plain rounding and after training."""

    before: float
    after: float


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` did to each tensor."""

    tensors: tuple[TensorError, ...]
    path: Path | None = None
    nbytes: int = 0
    recovery: Recovery | None = None

    def __str__(self) -> str:
        width = max(len(t.name) for t in self.tensors)
        rows = [f"{'tensor':<{width}}  {'shape':>13}  bits   error"]
        rows += [
            f"{t.name:<{width}}  {'x'.join(map(str, t.shape)):>13}  {t.bits:>4}  {t.error:>6.2%}"
            for t in self.tensors
        ]
        if self.recovery is not None:
            before, after = self.recovery.before, self.recovery.after
            rows.append(f"divergence from the original: {before:.4f} nats a token, "
                        f"recovered to {after:.4f}")  # fmt: skip
        return "\n".join(rows)


def quantize(
    src: str | Path | Checkpoint,
    dst: str | Path,
    bits: int = 4,
    embedding_bits: int = 4,
    progress: Progress | None = None,
    *,
    recover: Any = None,
    **options: Any,
) -> QuantizationReport:
    """Writes `src` as an int4 directory that mlx-lm and every engine here load as it is.

    `src` is whatever `load` takes; `embedding_bits=8` keeps the embedding in int8, one scale per
    row. `progress` is called with the parameters done and in all. With rows to `recover` on, as
    `finetune` takes them, the int4 model is trained to say what the unquantised one says;
    `options` are `finetune`'s then, and a run that was stopped goes on from `dst`-recovery.
    Raises OptionError for bits outside the format, CheckpointError for a checkpoint that is
    quantised already.
    """
    from gemma_multi.checkpoint import Checkpoint
    from gemma_multi.checkpoint.checkpoint import ensure_free
    from gemma_multi.checkpoint.resolve import resolve

    ensure_free(Path(dst))
    checkpoint = src if isinstance(src, Checkpoint) else resolve(src)
    if recover is None and options:
        raise OptionError(f"option {sorted(options)[0]!r} is for recover=..., which is not given")
    if recover is not None and (bits, embedding_bits) != (4, 4):
        raise OptionError(f"recover is for int4, received bits {bits} and {embedding_bits}")
    recovery = None
    if recover is None:
        quantized, report = quantize_checkpoint(checkpoint, bits, embedding_bits, progress)
        quantized.save(dst)
    else:
        from gemma_multi.training.recovery import recover as run

        work = Path(dst).with_name(f"{Path(dst).name}-recovery")
        quantized, recovery = run(checkpoint, recover, work, **options)
        quantized.save(dst)
        shutil.rmtree(work)
        report = _compared(quantized, checkpoint)
    return QuantizationReport(report.tensors, Path(dst), quantized.nbytes, recovery)


def _compared(quantized: Checkpoint, original: Checkpoint) -> QuantizationReport:
    """How far the weights of `quantized` are from the original's."""
    import numpy as np

    errors = []
    for name, shape in original.config.tensor_shapes().items():
        if len(shape) == 2:
            weight = original.weight(name).astype(np.float32)
            lost = np.linalg.norm(quantized.weight(name) - weight)
            whole = float(np.linalg.norm(weight))
            errors.append(TensorError(name, shape, 4, float(lost) / whole if whole else 0.0))
    return QuantizationReport(tuple(errors))


def quantize_checkpoint(
    checkpoint: Checkpoint,
    bits: int = 4,
    embedding_bits: int = 4,
    progress: Progress | None = None,
) -> tuple[Checkpoint, QuantizationReport]:
    """The same in memory: (checkpoint on the grid, report)."""
    from gemma_multi.errors import CheckpointError

    for name, value in (("bits", bits), ("embedding_bits", embedding_bits)):
        if type(value) is not int or value not in (4, 8):
            raise OptionError(f"{name} is {value!r}, expected 4 or 8")
    if checkpoint.is_quantized:
        raise CheckpointError(
            f"the checkpoint is {checkpoint.precision} already; quantise the original instead"
        )
    errors: list[TensorError] = []
    tensors: dict[str, Tensor] = {}
    for name, tensor, error in _quantized_tensors(checkpoint, bits, embedding_bits, progress):
        tensors[name] = tensor
        if error is not None:
            errors.append(error)
    how = f"quantised to int{bits} in groups of {GROUP_SIZE}, embedding int{embedding_bits}"
    return (
        checkpoint.replace(tensors=tensors, provenance=checkpoint.provenance.modified(how)),
        QuantizationReport(tuple(errors)),
    )


def _quantized_tensors(
    checkpoint: Checkpoint, bits: int, embedding_bits: int, progress: Progress | None
) -> Iterator[tuple[str, Tensor, TensorError | None]]:
    from gemma_multi.errors import CheckpointError
    from gemma_multi.quantization.tensor import BFLOAT16, quantize_tensor

    done, total = 0, checkpoint.config.num_parameters
    for name, shape in checkpoint.config.tensor_shapes().items():
        weight = checkpoint.weight(name)
        if len(shape) == 2:
            if shape[1] % GROUP_SIZE:
                raise CheckpointError(
                    f"tensor {name!r} has {shape[1]} inputs, not a multiple of {GROUP_SIZE}"
                )
            use = embedding_bits if name == EMBEDDING else bits
            quantized, error = quantize_tensor(weight, use)
            yield name, quantized, TensorError(name, shape, use, error)
        else:
            yield name, weight.astype(BFLOAT16), None
        done += weight.size
        if progress:
            progress(done, total)
