"""From the tensors that are trained to the weights the model computes with.

Two transformations of a dict of weights, the same functions on JAX and on MLX: a LoRA adapter is
added to what it adapts, and everything goes through the grid it will be stored on. Rounding has
no useful gradient, so the gradient passes it by as if it were not there (straight-through).
Names and layouts are Hugging Face's, so what is trained is what is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Adapter, Checkpoint, Provenance
from gemma_multi.config import ModelConfig
from gemma_multi.errors import OptionError
from gemma_multi.quantization import int4
from gemma_multi.training.options import TrainingOptions

Array = Any
Weights = Mapping[str, Array]
LORA_A, LORA_B = ".lora_A", ".lora_B"  # behind the name of the weight they adapt


def effective_weights(
    frozen: Weights, trained: Weights, scale: float, on_grid: Callable[[Array], Array] | None
) -> dict[str, Array]:
    """The weights that depend on `trained`, by name: LoRA added, then on the grid if there is one.

    `frozen` holds what LoRA adapts; without LoRA `trained` holds the weights themselves.
    """
    weights = {}
    for name, value in trained.items():
        if name.endswith(LORA_B):
            continue
        target = name.removesuffix(LORA_A)
        if target != name:
            value = frozen[target] + scale * (trained[target + LORA_B] @ value)
        weights[target] = value if on_grid is None else on_grid(value)
    return weights


def trained_gradients(gradients: Weights, trained: Weights, scale: float) -> dict[str, Array]:
    """From the gradients by the effective weights to those by what is trained (straight through
    the grid)."""
    found = {}
    for name in trained:
        target = name.removesuffix(LORA_A).removesuffix(LORA_B)
        if name.endswith(LORA_A):
            found[name] = scale * (trained[target + LORA_B].T @ gradients[target])
        elif name.endswith(LORA_B):
            found[name] = scale * (gradients[target] @ trained[target + LORA_A].T)
        else:
            found[name] = gradients[name]
    return found


def on_grid(xp: Any, weight: Array) -> Array:
    """A weight as an int4 directory stores it: matrices on the grid, norms in bfloat16."""
    return (
        int4.fake_quantize(xp, weight) if weight.ndim == 2 else int4.round_to_bfloat16(xp, weight)
    )


def initial_tensors(checkpoint: Checkpoint, options: TrainingOptions) -> dict[str, np.ndarray]:
    """What is trained, before the first step: `f32`. All weights, or LoRA's A and B, which begin
    as PEFT's do: A uniform in ±1/sqrt(inputs), B zero, so that nothing changes at first."""
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


def frozen_weights(checkpoint: Checkpoint, options: TrainingOptions) -> dict[str, np.ndarray]:
    """What LoRA leaves as it is, `f32`: the targets' own weights, and all others, these already on
    their grid where training goes through it."""
    if options.method == "full":
        return {}
    adapted = targeted(checkpoint.config, options.targets)
    frozen = {}
    for name in checkpoint.config.tensor_shapes():
        weight = checkpoint.weight(name).astype(np.float32)
        stays = name in adapted or checkpoint.is_quantized or not options.qat
        frozen[name] = weight if stays else on_grid(np, weight)
    return frozen


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
