"""From the tensors that are trained to the weights the model computes with.

Transformations of a dict of weights, the same functions on JAX and on MLX: a LoRA adapter is
added to what it adapts, the scales of an int4 weight are changed, and everything goes through the
grid it will be stored on. Rounding has no useful gradient, so the gradient passes it by as if it
were not there (straight-through). Names and layouts are Hugging Face's, so what is trained is what
is saved.

Method "scales" leaves the codes as calibration chose them, and trains the scale of every group of
32 with the norms: 3 million numbers of 270 (PEQA: Kim et al. 2023). Codes that move one by one
undo what calibration weighed up between them, and cannot move at all at rates that are good for
a model; scales can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gemma_multi.checkpoint import Adapter, Checkpoint, Provenance
from gemma_multi.config import EMBEDDING, ModelConfig
from gemma_multi.errors import OptionError
from gemma_multi.quantization import int4
from gemma_multi.quantization.tensor import BFLOAT16, QuantizedTensor
from gemma_multi.training.options import TrainingOptions

Array = Any
LORA_A, LORA_B = ".lora_A", ".lora_B"  # behind the name of the weight they adapt
CHANGE = ".scale_change"  # likewise: f32[N, K / 32], by which share of itself each scale has grown


class Int4(NamedTuple):
    """A weight whose scales are trained."""

    codes: Array  # i8[N, K], -8..7
    scales: Array  # f32[N, K / 32], before training


Weights = Mapping[str, Array]
Frozen = Mapping[str, Array | Int4]


class Grid(NamedTuple):
    """The two ways onto the int4 grid, as an engine compiles them."""

    rounded: Callable[[Array], Array]  # `on_grid`
    rescaled: Callable[[Int4, Array], Array]  # `rescaled`


def effective_weights(
    frozen: Frozen, trained: Weights, scale: float, grid: Grid | None
) -> dict[str, Array]:
    """The weights that depend on `trained`, by name: LoRA added, or scales changed, and on the grid
    if there is one.

    `frozen` holds what is adapted; where it is neither, `trained` holds the weights themselves.
    """
    weights = {}
    for name, value in trained.items():
        if name.endswith(LORA_B):
            continue
        if grid is not None and name.endswith(CHANGE):
            target = name.removesuffix(CHANGE)
            weights[target] = grid.rescaled(frozen[target], value)
            continue
        target = name.removesuffix(LORA_A)
        if target != name:
            value = frozen[target] + scale * (trained[target + LORA_B] @ value)
        weights[target] = value if grid is None else grid.rounded(value)
    return weights


def trained_gradients(
    gradients: Weights, trained: Weights, scale: float, frozen: Frozen
) -> dict[str, Array]:
    """From the gradients by the effective weights to those by what is trained (straight through
    the grid)."""
    found = {}
    for name in trained:
        target = name.removesuffix(LORA_A).removesuffix(LORA_B).removesuffix(CHANGE)
        if name.endswith(LORA_A):
            found[name] = scale * (trained[target + LORA_B].T @ gradients[target])
        elif name.endswith(LORA_B):
            found[name] = scale * (gradients[target] @ trained[target + LORA_A].T)
        elif name.endswith(CHANGE):
            codes, scales = frozen[target]
            found[name] = int4.split_groups(gradients[target] * codes).sum(-1) * scales
        else:
            found[name] = gradients[name]
    return found


def on_grid(xp: Any, weight: Array) -> Array:
    """A weight as an int4 directory stores it: matrices on the grid, norms in bfloat16."""
    return (
        int4.fake_quantize(xp, weight) if weight.ndim == 2 else int4.round_to_bfloat16(xp, weight)
    )


def rescaled(xp: Any, weight: Int4, change: Array) -> Array:
    """An int4 weight with each scale grown by a share of itself, as it is stored: `f32[N, K]`."""
    return int4.dequantize(xp, weight.codes, changed_scales(xp, weight.scales, change))


def changed_scales(xp: Any, scales: Array, change: Array) -> Array:
    """`scales f32[N, K / 32]` grown by shares of themselves, on the grid."""
    return int4.portable_scale(xp, scales * (1 + change))


def initial_tensors(checkpoint: Checkpoint, options: TrainingOptions) -> dict[str, np.ndarray]:
    """What is trained, before the first step: `f32`. All weights; or LoRA's A and B, which begin
    as PEFT's do: A uniform in ±1/sqrt(inputs), B zero, so that nothing changes at first; or the
    norms and the changes of the scales, zero."""
    if options.method == "scales":
        norms = {
            n: checkpoint.weight(n).astype(np.float32)
            for n, shape in checkpoint.config.tensor_shapes().items()
            if len(shape) == 1
        }
        changes = {
            n + CHANGE: np.zeros(tensor.scales.shape, np.float32)
            for n, tensor in _rescalable(checkpoint).items()
        }
        return norms | changes
    if options.method == "full":
        return {
            n: checkpoint.weight(n).astype(np.float32) for n in checkpoint.config.tensor_shapes()
        }
    rng, tensors = np.random.default_rng(options.seed), {}
    for name, (out, inputs) in targeted(checkpoint.config, options.targets).items():
        if options.rank > min(out, inputs):
            raise OptionError(f"rank is {options.rank}, but {name!r} is only {out} x {inputs}")
        reach = inputs**-0.5
        shape = (options.rank, inputs)
        tensors[name + LORA_A] = rng.uniform(-reach, reach, shape).astype(np.float32)
        tensors[name + LORA_B] = np.zeros((out, options.rank), np.float32)
    return tensors


def targeted(config: ModelConfig, targets: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that LoRA adapts."""
    shapes = config.tensor_shapes()
    return {n: shape for n, shape in shapes.items() if n.split(".")[-2] in targets}


def _rescalable(checkpoint: Checkpoint) -> dict[str, QuantizedTensor]:
    """The matrices whose scales are trained: int4, and not the embedding, of which a few rows see
    a text."""
    tensors = {n: t for n, t in checkpoint.tensors.items() if n != EMBEDDING}
    return {n: t for n, t in tensors.items() if isinstance(t, QuantizedTensor) and t.bits == 4}


def frozen_weights(
    checkpoint: Checkpoint, options: TrainingOptions
) -> dict[str, np.ndarray | Int4]:
    """What stays as it is, `f32`. With LoRA the targets' own weights, and all others, these already
    on their grid where training goes through it; with "scales" the codes and scales that there
    were, and the embedding."""
    if options.method == "scales":
        return _codes_and_embedding(checkpoint)
    if options.method == "full":
        return {}
    adapted = targeted(checkpoint.config, options.targets)
    frozen = {}
    for name in checkpoint.config.tensor_shapes():
        weight = checkpoint.weight(name).astype(np.float32)
        stays = name in adapted or checkpoint.is_quantized or not options.qat
        frozen[name] = weight if stays else on_grid(np, weight)
    return frozen


def _codes_and_embedding(checkpoint: Checkpoint) -> dict[str, np.ndarray | Int4]:
    rescalable = _rescalable(checkpoint)
    frozen: dict[str, np.ndarray | Int4] = {}
    for name, shape in checkpoint.config.tensor_shapes().items():
        if tensor := rescalable.get(name):
            codes = tensor.codes().astype(np.int8) + np.int8(int4.CODE_MIN)
            frozen[name] = Int4(codes, tensor.scales.astype(np.float32))
        elif len(shape) == 2:
            frozen[name] = checkpoint.weight(name).astype(np.float32)
    return frozen


def with_changed_scales(
    checkpoint: Checkpoint, trained: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray | QuantizedTensor]:
    """The tensors of an int4 checkpoint that "scales" has trained, as they are stored."""
    rescalable = _rescalable(checkpoint)
    tensors: dict[str, np.ndarray | QuantizedTensor] = {}
    for name, value in trained.items():
        target = name.removesuffix(CHANGE)
        if target == name:
            tensors[name] = value.astype(BFLOAT16)
        else:
            before = rescalable[target]
            scales = changed_scales(np, before.scales.astype(np.float32), value)
            tensors[target] = QuantizedTensor.centred(before.packed, scales, before.bits)
    return tensors


def as_adapter(
    trained: Mapping[str, np.ndarray], options: TrainingOptions, base: Provenance
) -> Adapter:
    """What LoRA has trained, to be saved or merged."""
    tensors = {
        name.removesuffix(LORA_A): (value, trained[name.removesuffix(LORA_A) + LORA_B])
        for name, value in trained.items()
        if name.endswith(LORA_A)
    }
    return Adapter(options.rank, options.alpha, tensors, base.source, channels=base.channels)
