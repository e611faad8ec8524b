"""Training on MLX: mlx-lm's layers and MLX's Adam.

Design choices:
- The same batches, transformations of weights and chunks of the loss as on Keras, in the same
  order, so the two engines' losses agree.
- The loss gives its gradients by hidden and embedding along with its value (see `head`). MLX
  differentiates one number, so it is given one whose gradient is just that:
  `sum(hidden * d_hidden)`, with `d_hidden` held fixed.
- With `mlx.launch` each process takes its rows of a batch, and gradients are summed over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from gemma_multi.config import EMBEDDING
from gemma_multi.engines.mlx import fast_type as fast_type_of
from gemma_multi.engines.mlx_model import build_model
from gemma_multi.errors import OptionError
from gemma_multi.training.batches import IGNORE_INDEX, Batch
from gemma_multi.training.head import chunk_loss
from gemma_multi.training.loss_scale import LossScale
from gemma_multi.training.trainer import BETAS, EPSILON, Job, StepResult, Trainer
from gemma_multi.training.vocabulary import Vocabulary, compared
from gemma_multi.training.weights import (
    Grid,
    Int4,
    effective_weights,
    on_grid,
    rescaled,
    trained_gradients,
)

_HEAD_BYTES = 1 << 28  # of a chunk's logits


def create(job: Job) -> Trainer:
    return MlxTrainer(job)


def fast_type() -> str:
    """Of activations, on this device."""
    import mlx.core as mx

    return fast_type_of(mx)


class MlxTrainer(Trainer):
    def __init__(self, job: Job) -> None:
        import mlx.core as mx
        import mlx.optimizers as optimizers

        if job.devices is not None:
            raise OptionError("devices is for backend 'keras'; on MLX start with mlx.launch")
        on_gpu = mx.default_device() == mx.Device(mx.gpu)
        if not on_gpu:
            mx.disable_compile()  # on a CPU it runs a C++ compiler, see engines/mlx.py
        self._mx, self._job = mx, job
        self.device = "gpu" if on_gpu else "cpu"
        self._compute = getattr(mx, job.dtype)
        self._loss_scale = LossScale(needed=job.dtype == "float16")
        self._group = mx.distributed.init()
        self.rank = self._group.rank()
        self._evaluated: dict[str, Any] | None = None  # effective weights that validation has made
        if job.options.batch_size % self._group.size():
            raise OptionError(
                f"batch_size is {job.options.batch_size}, not a multiple of the "
                f"{self._group.size()} processes"
            )
        self._model = build_model(job.config)
        self._trained = {n: mx.array(job.trained.pop(n)) for n in list(job.trained)}
        self._frozen = {n: _placed(mx, job.frozen.pop(n)) for n in list(job.frozen)}
        self._teacher = {n: mx.array(w, self._compute) for n, w in job.teacher_weights()}
        self._words = job.vocabulary and Vocabulary(*map(mx.array, job.vocabulary))
        self._grid = Grid(partial(on_grid, mx), partial(rescaled, mx)) if job.options.qat else None
        self._optimizer = optimizers.Adam(0.0, betas=BETAS, eps=EPSILON, bias_correction=True)
        self._optimizer.init(self._trained)

    def step(self, batch: Batch, learning_rate: float) -> StepResult:
        mx, options = self._mx, self._job.options
        weights = self._evaluated or self._effective()
        self._evaluated = None
        loss, gradients = self._loss_scale.apply(
            lambda scale: self._summed(weights, batch, scale),
            lambda found: bool(mx.isfinite(_norm(mx, found[1])).item()),
        )
        count = max(1, batch.loss_tokens)
        by_name = trained_gradients(gradients, self._trained, self._job.scale, self._frozen)
        norm = _norm(mx, by_name) / count
        factor = mx.minimum(1.0, options.clip / (norm + 1e-6)) / count
        if decay := options.weight_decay:  # apart from Adam's own step, and not of norms
            shrunk = 1 - learning_rate * decay
            self._trained = {n: w * shrunk if w.ndim == 2 else w for n, w in self._trained.items()}
        self._optimizer.learning_rate = learning_rate
        scaled = {n: g * factor for n, g in by_name.items()}
        self._trained = self._optimizer.apply_gradients(scaled, self._trained)
        mx.eval(self._trained, self._optimizer.state, loss, norm)
        return StepResult(loss.item(), norm.item())

    def _summed(
        self, weights: dict[str, Any], batch: Batch, scale: float
    ) -> tuple[Any, dict[str, Any]]:
        """(loss, gradients by the effective weights) over a batch's micro-batches, and over the
        processes."""
        mx, loss, gradients = self._mx, self._mx.array(0.0), None
        for micro in self._micro_batches(batch):
            found, by_weight = self._loss_and_gradients(weights, *micro, scale)
            loss = loss + found
            if gradients is None:
                gradients = by_weight
            else:
                gradients = {n: gradients[n] + g for n, g in by_weight.items()}
            mx.eval(loss, gradients)
        assert gradients is not None
        if self._group.size() > 1:
            loss = mx.distributed.all_sum(loss)
            gradients = {n: mx.distributed.all_sum(g) for n, g in gradients.items()}
        return loss, gradients

    def evaluate(self, batch: Batch) -> float:
        mx, total = self._mx, self._mx.array(0.0)
        if self._evaluated is None:
            self._evaluated = self._effective()
        weights = self._evaluated
        for ids, labels, segments in self._micro_batches(batch):
            hidden, embedding = self._hidden({**self._frozen, **weights}, ids, segments)
            target = self._teacher_hidden(ids, segments)
            total = total + self._head(hidden, labels, embedding, target, gradient=False)[0]
            mx.eval(total)
        if self._group.size() > 1:
            total = mx.distributed.all_sum(total)
        return float(np.array(total))

    def any_of(self, flag: bool) -> bool:
        if self._group.size() == 1:
            return flag
        return bool(self._mx.distributed.all_sum(self._mx.array(float(flag))).item() != 0)

    def _effective(self) -> dict[str, Any]:
        scale = self._job.scale
        weights = effective_weights(self._frozen, self._trained, scale, self._grid)
        self._mx.eval(weights)
        return weights

    def _loss_and_gradients(
        self, weights: dict[str, Any], ids: Any, labels: Any, segments: Any, scale: float
    ) -> tuple[Any, dict[str, Any]]:
        """The summed loss, and its gradient by each effective weight. `scale` is a
        `LossScale`'s."""
        mx = self._mx
        target = self._teacher_hidden(ids, segments)

        def stand_in(weights: dict[str, Any]) -> tuple[Any, Any]:
            hidden, embedding = self._hidden({**self._frozen, **weights}, ids, segments)
            fixed = mx.stop_gradient(hidden), mx.stop_gradient(embedding)
            learned = EMBEDDING in weights
            over = compared(self._words, fixed[1], target)
            loss, d_hidden, d_embedding = self._head(fixed[0], labels, *over, learned=learned)
            value = mx.sum(hidden.astype(mx.float32) * d_hidden)
            if learned:
                value = value + mx.sum(weights[EMBEDDING] * d_embedding)
            return scale * value, loss

        (_, loss), gradients = mx.value_and_grad(stand_in)(weights)
        if self._loss_scale.needed:
            gradients = {name: g / scale for name, g in gradients.items()}
        return loss, gradients

    def _hidden(self, weights: dict[str, Any], ids: Any, segments: Any) -> tuple[Any, Any]:
        """(`[B, T, D]` behind the last norm, the embedding), in the type of the activations."""
        mx, config, model = self._mx, self._job.config, self._model
        cast = {n: w.astype(self._compute) for n, w in weights.items()}
        model.load_weights(list(cast.items()))
        positions = mx.arange(ids.shape[1])
        behind = positions[:, None] - positions[None, :]
        causal = (behind >= 0) & (segments[:, None, :, None] == segments[:, None, None, :])
        sliding = causal & (behind < config.sliding_window)
        x = cast[EMBEDDING][ids] * mx.array(config.stream_scale, self._compute)
        twice = self._job.computes_twice(ids.size)
        for i, layer in enumerate(model.layers):
            run = _checkpointed(mx, layer) if twice else layer
            x = run(x, sliding if config.is_sliding(i) else causal)
        return model.model.norm(x), cast[EMBEDDING]

    def _teacher_hidden(self, ids: Any, segments: Any) -> tuple[Any, Any] | None:
        return self._hidden(self._teacher, ids, segments) if self._teacher else None

    def _head(
        self, hidden: Any, labels: np.ndarray, embedding: Any, teacher: Any,
        log_weights: Any = None, *, gradient: bool = True, learned: bool = False,
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """(summed loss, its gradient by hidden, by the embedding), over positions that have one."""
        mx = self._mx
        flat = hidden.reshape(-1, hidden.shape[-1])
        positions = np.flatnonzero(labels.reshape(-1) != IGNORE_INDEX)
        loss = mx.array(0.0)
        d_hidden = mx.zeros(flat.shape)
        d_embedding = mx.zeros(embedding.shape) if learned else None
        size = self._chunk_size(len(embedding))
        for start in range(0, len(positions), size):
            at = positions[start : start + size]
            chosen, rows = mx.array(at), mx.array(labels.reshape(-1)[at])
            theirs = teacher and (teacher[0].reshape(flat.shape)[chosen], teacher[1])
            found = chunk_loss(
                mx, flat[chosen], embedding, rows, theirs, log_weights, gradient=gradient
            )
            loss = loss + found.loss
            if found.hidden is not None and found.logits is not None:
                d_hidden[chosen] = found.hidden.astype(mx.float32)
            if learned and found.logits is not None:
                d_embedding = d_embedding + (found.logits.T @ flat[chosen]).astype(mx.float32)
            mx.eval(loss, d_hidden, d_embedding)  # or the logits of all chunks would be held
        return loss, d_hidden.reshape(hidden.shape), d_embedding

    @staticmethod
    def _chunk_size(words: int) -> int:
        """Positions whose logits are held at a time."""
        return max(16, _HEAD_BYTES // (4 * words))

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Any, np.ndarray, Any]]:
        """This process's rows. The labels stay in NumPy: they say how many chunks there are."""
        rank, size = self._group.rank(), self._group.size()
        for micro in zip(batch.ids, batch.labels, batch.segments, strict=True):
            ids, labels, segments = (x[rank::size] for x in micro)
            yield self._mx.array(ids), labels, self._mx.array(segments)

    def tensors(self) -> dict[str, np.ndarray]:
        return {name: np.array(value) for name, value in self._trained.items()}

    def optimizer_state(self) -> dict[str, np.ndarray]:
        from mlx.utils import tree_flatten

        arrays = {n: np.array(v) for n, v in tree_flatten(self._optimizer.state)}
        return arrays | self._loss_scale.state()

    def restore(
        self, tensors: Mapping[str, np.ndarray], optimizer: Mapping[str, np.ndarray]
    ) -> None:
        from mlx.utils import tree_map_with_path

        self._trained = {name: self._mx.array(tensors[name]) for name in self._trained}
        self._optimizer.state = tree_map_with_path(
            lambda path, old: self._mx.array(optimizer[path], old.dtype), self._optimizer.state
        )
        self._loss_scale.restore(optimizer)
        self._evaluated = None


def _norm(mx: Any, gradients: Mapping[str, Any]) -> Any:
    """Of all of them together."""
    return mx.sqrt(sum(mx.sum(g * g) for g in gradients.values()))


def _placed(mx: Any, weight: np.ndarray | Int4) -> Any:
    if isinstance(weight, Int4):
        return Int4(mx.array(weight.codes), mx.array(weight.scales))
    return mx.array(weight)


def _checkpointed(mx: Any, layer: Any) -> Any:
    """`layer(x, mask)`, computed anew for its gradient instead of kept."""

    def run(parameters: Any, x: Any, mask: Any) -> Any:
        layer.update(parameters)
        return layer(x, mask)

    return lambda x, mask: mx.checkpoint(run)(layer.trainable_parameters(), x, mask)
