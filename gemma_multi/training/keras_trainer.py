"""Training on Keras and JAX: keras-hub's layers and Keras's Adam, compiled.

Design choices:
- A step is three programs: weights to their grid (compiled once per shape), the gradients, and the
  update. As one, XLA would take half a minute to compile it, and hold more at a time.
- Weights live under their Hugging Face names in that layout and are arranged for Keras's layers
  inside the compiled code, so the grid is the exported one and what is trained is what is saved.
- The tied embedding gets its gradient from both its ends: the head's, made chunk by chunk with
  the loss, and on top of it, row by row, what comes back through the layers.
- keras-hub's layers attend by `attention.attend`, which keeps packed examples apart and gives
  sliding layers only the keys they can see.
- Over several devices each takes its rows of a batch (`keras.distribution.DataParallel`); losses
  and gradients are summed, so the result is that of one device up to rounding.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

from gemma_multi.config import EMBEDDING
from gemma_multi.engines.keras_backbone import (
    build_backbone,
    import_keras,
    run_block,
    weight_slots,
)
from gemma_multi.engines.keras_runtime import KerasRuntime
from gemma_multi.errors import BackendError, OptionError
from gemma_multi.training.attention import attend
from gemma_multi.training.batches import IGNORE_INDEX, Batch
from gemma_multi.training.head import chunk_loss
from gemma_multi.training.loss_scale import LossScale
from gemma_multi.training.trainer import BETAS, EPSILON, Job, StepResult, Trainer
from gemma_multi.training.vocabulary import compared
from gemma_multi.training.weights import (
    Grid,
    effective_weights,
    on_grid,
    rescaled,
    trained_gradients,
)

_ALL_SEEN = np.ones((1, 1, 1), bool)
_LAST_NORM = "model.norm.weight"
_GRID_ROWS = 512  # of a weight, put on its grid together
_HEAD_BYTES = {"cpu": 1 << 28, "gpu": 1 << 30}  # of a chunk's logits
_SHORT_CHUNK = 16  # positions, where an answer of a token or two would leave a long one empty


def create(job: Job) -> Trainer:
    return KerasTrainer(job)


def fast_type() -> str:
    """Of activations, on this device."""
    _ask_for_the_same_sums()
    return KerasRuntime(import_keras()).fast


class KerasTrainer(Trainer):
    def __init__(self, job: Job) -> None:
        _ask_for_the_same_sums()
        keras = import_keras()
        runtime = KerasRuntime(keras)
        if not runtime.on_jax:
            raise BackendError("training on Keras needs JAX; set KERAS_BACKEND=jax")
        self._jax, self._job = runtime.jax, job
        self._scope = keras.src.backend.common.stateless_scope.StatelessScope
        self.device = runtime.device
        self.dtype = job.dtype
        self._loss_scale = LossScale(needed=job.dtype == "float16")
        self._distribution = _distribution(keras, job)
        self._build_layers()
        self._evaluated: dict[str, Any] | None = None  # effective weights that validation has made
        with self._distribution.scope() if self._distribution else nullcontext():
            self._place(keras)
        jax = self._jax
        self._grid = None
        if job.options.qat:
            as_stored = jax.jit(partial(rescaled, jax.numpy))
            self._grid = Grid(jax.jit(self._rows_on_grid), as_stored)
        self._gradients = jax.jit(self._over_devices(self._loss_and_gradients))
        self._add = jax.jit(partial(jax.tree.map, jax.numpy.add), donate_argnums=0)
        self._update = jax.jit(self._updated, donate_argnums=(0, 1))
        self._loss_only = jax.jit(self._over_devices(self._loss))
        self._norm = jax.jit(_norm)

    def _build_layers(self) -> None:
        config = self._job.config
        self._backbone = build_backbone(config, self.dtype)
        self._slots = weight_slots(self._backbone, config)
        self._segments: Any = None  # of the batch that is being traced
        for i, layer in enumerate(self._backbone.transformer_layers):
            window = config.sliding_window if config.is_sliding(i) else None
            layer.attention._compute_attention = partial(self._attend, window)

    def _place(self, keras: Any) -> None:
        """Moves the job's tensors to the devices, and makes the optimiser for them."""
        job, jnp = self._job, self._jax.numpy
        self._names = list(job.trained)
        variables = []
        for name in self._names:
            value = job.trained.pop(name)
            variables.append(keras.Variable(value, dtype="float32", name=name.replace(".", "_")))
        # a constant in place of a schedule, so that the rate is a variable that can be set
        self._optimizer = keras.optimizers.Adam(
            1.0, beta_1=BETAS[0], beta_2=BETAS[1], epsilon=EPSILON, name="adam"
        )
        self._optimizer.build(variables)
        self._values = [v.value for v in variables]
        self._state = [v.value for v in self._optimizer.variables]
        places = {id(v): i for i, v in enumerate(self._optimizer.variables)}
        self._rate_at = places[id(self._optimizer._learning_rate)]
        self._steps_at = places[id(self._optimizer.iterations)]
        for variable in (*variables, *self._optimizer.variables):
            variable._value = None  # the arrays are ours now, and are given away at each step
        self._frozen = {}
        for name in list(job.frozen):
            weight = self._jax.tree.map(jnp.asarray, job.frozen.pop(name))
            self._frozen[name] = self._jax.tree.map(self._replicated, weight)
        teacher = {
            name: self._replicated(jnp.asarray(value, self.dtype))
            for name, value in job.teacher_weights()
        }
        self._teacher = teacher or None

    # What is compiled ---------------------------------------------------------------------------

    def _updated(
        self, values: list, state: list, gradients: Any, frozen: Any, rate: Any, count: Any
    ) -> tuple[list, list, Any]:
        """(values, optimiser's state, norm of the gradient) after a step of AdamW."""
        jnp, job = self._jax.numpy, self._job
        trained = dict(zip(self._names, values, strict=True))
        by_name = trained_gradients(gradients, trained, job.scale, frozen)
        found = [by_name[name] for name in self._names]
        norm = _norm(found) / count
        factor = jnp.minimum(1.0, job.options.clip / (norm + 1e-6)) / count
        if decay := job.options.weight_decay:  # apart from Adam's own step, and not of norms
            values = [v * (1 - rate * decay) if v.ndim == 2 else v for v in values]
        state = [*state]
        state[self._rate_at] = rate
        # Keras adds epsilon before it corrects the bias of the second moment, torch and MLX after
        # it, which is another step for small gradients
        steps = state[self._steps_at].astype("float32") + 1
        self._optimizer.epsilon = EPSILON * jnp.sqrt(1 - BETAS[1] ** steps)
        values, state = self._optimizer.stateless_apply(state, [g * factor for g in found], values)
        return values, state, norm

    def _rows_on_grid(self, weight: Any) -> Any:
        """`on_grid`, some rows at a time: the search for scales takes several times the memory of
        what it looks at."""
        jax = self._jax
        if weight.ndim == 1 or weight.shape[0] % _GRID_ROWS:
            return on_grid(jax.numpy, weight)
        parts = weight.reshape(-1, _GRID_ROWS, weight.shape[1])
        return jax.lax.map(partial(on_grid, jax.numpy), parts).reshape(weight.shape)

    def _loss_and_gradients(
        self, weights: Any, frozen: Any, teacher: Any, micro: Any, scale: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Of one micro-batch: the summed loss, and its gradient by each effective weight. `scale`
        is a `LossScale`'s."""
        jax = self._jax
        ids, labels, segments = micro
        cast = {n: w.astype(self.dtype) for n, w in {**frozen, **weights}.items()}
        embedding = cast.pop(EMBEDDING)
        layers = {n: cast.pop(n) for n in weights if n != EMBEDDING}

        def trunk(layers: Any, embedded: Any) -> Any:
            return self._hidden({**cast, **layers}, embedded, segments)

        hidden, back = jax.vjp(trunk, layers, embedding[ids])
        target = self._teacher_hidden(teacher, ids, segments)
        learned = EMBEDDING in weights
        over = compared(self._job.vocabulary, embedding, target)
        loss, d_hidden, d_embedding = self._head(
            hidden, labels, *over, gradient=True, learned=learned
        )
        if self._loss_scale.needed:
            d_hidden = d_hidden * scale.astype(d_hidden.dtype)
        gradients, d_embedded = jax.tree.map(lambda g: g.astype("float32"), back(d_hidden))
        if self._loss_scale.needed:
            gradients, d_embedded = jax.tree.map(lambda g: g / scale, (gradients, d_embedded))
        if learned:
            gradients[EMBEDDING] = d_embedding.at[ids].add(d_embedded)
        return loss, gradients

    def _loss(self, weights: Any, frozen: Any, teacher: Any, micro: Any) -> Any:
        ids, labels, segments = micro
        cast = {n: w.astype(self.dtype) for n, w in {**frozen, **weights}.items()}
        embedding = cast.pop(EMBEDDING)
        hidden = self._hidden(cast, embedding[ids], segments)
        target = self._teacher_hidden(teacher, ids, segments)
        return self._head(hidden, labels, embedding, target)[0]

    def _hidden(self, weights: Any, embedded: Any, segments: Any) -> Any:
        """`[B, T, D]` embedded tokens through the layers and the last norm."""
        jnp, config, backbone = self._jax.numpy, self._job.config, self._backbone
        x = embedded * jnp.asarray(config.stream_scale, embedded.dtype)
        twice = self._job.computes_twice(segments.size)
        for i, layer in enumerate(backbone.transformer_layers):
            prefix = f"model.layers.{i}."
            own = {n: w for n, w in weights.items() if n.startswith(prefix)}
            run = partial(self._run, partial(_block, layer))
            if twice:
                run = _recomputed(self._jax, run)
            x = run(own, segments, x)
        last = {_LAST_NORM: weights[_LAST_NORM]}
        return self._run(backbone.layer_norm, last, segments, x)

    def _run(self, part: Any, weights: Any, segments: Any, x: Any) -> Any:
        """A part of the backbone, whose variables have the values of `weights`."""
        self._segments = segments
        mapping = [
            (self._slots[name].variable, self._slots[name].arrange(value))
            for name, value in weights.items()
        ]
        with self._scope(state_mapping=mapping):
            return part(x)

    def _attend(
        self, window: int | None, q: Any, k: Any, v: Any, attention_mask: Any, **_: Any
    ) -> Any:
        scale = self._job.config.query_scale
        return attend(self._jax, q, k, v, self._segments, window, scale)

    def _teacher_hidden(self, teacher: Any, ids: Any, segments: Any) -> Any:
        if teacher is None:
            return None
        layers = dict(teacher)
        embedding = layers.pop(EMBEDDING)
        return self._hidden(layers, embedding[ids], segments), embedding

    def _head(
        self, hidden: Any, labels: Any, embedding: Any, teacher: Any, log_weights: Any = None,
        *, gradient: bool = False, learned: bool = False,
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """(summed loss, its gradient by hidden, by the embedding), over positions that have one."""
        jax, jnp = self._jax, self._jax.numpy
        rows, width = hidden.shape[0] * hidden.shape[1], hidden.shape[2]
        flat, flat_labels = hidden.reshape(rows, width), labels.reshape(rows)
        size = self._chunk_size(embedding.shape[0])
        if self.device == "cpu" and not learned:  # nothing large is summed up with each chunk
            size = min(size, _SHORT_CHUNK)
        size = min(size, rows)
        # positions with a loss first, then as many others as fill the last chunk
        order = jnp.argsort(flat_labels == IGNORE_INDEX, stable=True)
        order = jnp.pad(order, (0, -rows % size), constant_values=rows)
        chunks = -(-jnp.sum(flat_labels != IGNORE_INDEX) // size)

        def add(i: Any, sums: Any) -> Any:
            loss, d_hidden, d_embedding = sums
            at = jax.lax.dynamic_slice(order, (i * size,), (size,))
            pick = partial(jnp.take, indices=at, axis=0, mode="fill")
            rows_labels = pick(flat_labels, fill_value=IGNORE_INDEX)
            found = chunk_loss(
                jnp, pick(flat, fill_value=0), embedding, rows_labels,
                teacher and (pick(teacher[0].reshape(rows, width), fill_value=0), teacher[1]),
                log_weights, gradient=gradient,
            )  # fmt: skip
            if gradient:
                d_hidden = d_hidden.at[at].set(found.hidden, mode="drop")
            if learned:
                picked = pick(flat, fill_value=0)
                d_embedding = self._add_product(d_embedding, found.logits, picked)
            return loss + found.loss, d_hidden, d_embedding

        start = (
            jnp.float32(0),
            jnp.zeros_like(flat) if gradient else None,
            jnp.zeros(embedding.shape, jnp.float32) if learned else None,
        )
        loss, d_hidden, d_embedding = jax.lax.fori_loop(0, chunks, add, start)
        return loss, d_hidden.reshape(hidden.shape) if gradient else None, d_embedding

    def _chunk_size(self, words: int) -> int:
        """Positions whose logits are held at a time."""
        rows = _HEAD_BYTES.get(self.device, 1 << 30) // (4 * words)
        return 1 << max(4, min(12, rows.bit_length() - 1))

    def _add_product(self, sums: Any, logits: Any, hidden: Any) -> Any:
        """`sums + logits.T @ hidden`, some rows at a time: the whole product is 671 MB."""
        lax = self._jax.lax
        rows_at_once = next(n for n in (1 << 14, 1 << 10, 1 << 6, 1) if sums.shape[0] % n == 0)

        def add(i: Any, sums: Any) -> Any:
            part = lax.dynamic_slice_in_dim(logits, i * rows_at_once, rows_at_once, 1).T @ hidden
            old = lax.dynamic_slice_in_dim(sums, i * rows_at_once, rows_at_once, 0)
            return lax.dynamic_update_slice_in_dim(sums, old + part, i * rows_at_once, 0)

        return lax.fori_loop(0, sums.shape[0] // rows_at_once, add, sums)

    # Devices ------------------------------------------------------------------------------------

    def _over_devices(self, function: Any) -> Any:
        """`function(weights, frozen, teacher, micro, *more)` on each device's rows, its results
        summed."""
        if self._distribution is None:
            return function
        from jax.sharding import PartitionSpec

        whole, rows = PartitionSpec(), PartitionSpec("batch")

        def over(*given: Any) -> Any:
            specs = (whole, whole, whole, rows, *[whole] * (len(given) - 4))
            return self._jax.shard_map(
                lambda *given: self._jax.lax.psum(function(*given), "batch"),
                mesh=self._distribution.device_mesh.backend_mesh,
                in_specs=specs, out_specs=whole, check_vma=False,
            )(*given)  # fmt: skip

        return over

    def _replicated(self, array: Any) -> Any:
        if self._distribution is None:
            return array
        from jax.sharding import NamedSharding, PartitionSpec

        mesh = self._distribution.device_mesh.backend_mesh
        return self._jax.device_put(array, NamedSharding(mesh, PartitionSpec()))

    # What the run asks for ----------------------------------------------------------------------

    def step(self, batch: Batch, learning_rate: float) -> StepResult:
        weights = self._evaluated or self._effective()
        self._evaluated = None
        loss, gradients = self._loss_scale.apply(
            lambda scale: self._summed(weights, batch, np.float32(scale)),
            lambda found: bool(np.isfinite(self._norm(found[1]))),
        )
        weights = {}  # room for the update
        self._values, self._state, norm = self._update(
            self._values, self._state, gradients, self._frozen, np.float32(learning_rate),
            np.float32(max(1, batch.loss_tokens)),
        )  # fmt: skip
        return StepResult(loss, norm)

    def _summed(self, weights: Any, batch: Batch, scale: np.float32) -> tuple[Any, dict[str, Any]]:
        """(loss, gradients by the effective weights) over a batch's micro-batches."""
        total: Any = None
        for micro in self._micro_batches(batch):
            found = self._gradients(weights, self._frozen, self._teacher, micro, scale)
            if self._distribution and self.device == "cpu":
                # programs that wait for each other share a CPU's few threads: one at a time
                self._jax.block_until_ready(found)
            total = found if total is None else self._add(total, found)
        return total

    def evaluate(self, batch: Batch) -> float:
        if self._evaluated is None:
            self._evaluated = self._effective()
        weights = self._evaluated
        return sum(
            float(self._loss_only(weights, self._frozen, self._teacher, micro))
            for micro in self._micro_batches(batch)
        )

    def _effective(self) -> dict[str, Any]:
        trained = dict(zip(self._names, self._values, strict=True))
        return effective_weights(self._frozen, trained, self._job.scale, self._grid)

    @staticmethod
    def _micro_batches(batch: Batch) -> Iterator[tuple[np.ndarray, ...]]:
        return zip(batch.ids, batch.labels, batch.segments, strict=True)

    def tensors(self) -> dict[str, np.ndarray]:
        return {n: np.asarray(v) for n, v in zip(self._names, self._values, strict=True)}

    def optimizer_state(self) -> dict[str, np.ndarray]:
        paths = [v.path for v in self._optimizer.variables]
        arrays = {p: np.asarray(v) for p, v in zip(paths, self._state, strict=True)}
        return arrays | self._loss_scale.state()

    def restore(
        self, tensors: Mapping[str, np.ndarray], optimizer: Mapping[str, np.ndarray]
    ) -> None:
        place = lambda new, old: self._jax.device_put(np.asarray(new, old.dtype), old.sharding)  # noqa: E731
        paths = [v.path for v in self._optimizer.variables]
        self._values = [
            place(tensors[n], v) for n, v in zip(self._names, self._values, strict=True)
        ]
        self._state = [place(optimizer[p], v) for p, v in zip(paths, self._state, strict=True)]
        self._loss_scale.restore(optimizer)


def _block(layer: Any, x: Any) -> Any:
    """With a mask that hides nothing, since `attend` knows what is to be seen."""
    return run_block(layer, x, partial(layer.attention, attention_mask=_ALL_SEEN))


def _ask_for_the_same_sums() -> None:
    """GPUs add up the rows of an embedding's gradient in any order, unless told otherwise before
    JAX starts; a resumed run is to end bit for bit where an uninterrupted one does."""
    flag = "--xla_gpu_deterministic_ops=true"
    if "jax" not in sys.modules and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def _norm(gradients: Any) -> Any:
    """Of all of them together."""
    import jax

    return jax.numpy.sqrt(sum(jax.numpy.sum(g**2) for g in jax.tree.leaves(gradients)))


def _recomputed(jax: Any, layer: Any) -> Any:
    """`layer(weights, segments, x)`, computed anew for its gradient instead of kept: a fifth of the
    memory. (`jax.checkpoint` saves none on a CPU, where XLA finds the two computations equal and
    keeps the first. Here the second waits for the gradient that comes back.)"""

    def run(weights: Any, segments: Any, x: Any) -> Any:
        return layer(weights, segments, x)

    def forward(weights: Any, segments: Any, x: Any) -> Any:
        return layer(weights, segments, x), (weights, segments, x)

    def backward(kept: Any, gradient: Any) -> Any:
        weights, segments, x = kept
        _, back = jax.vjp(lambda weights, x: layer(weights, segments, x), weights, x + 0 * gradient)
        d_weights, d_x = back(gradient)
        return d_weights, None, d_x

    computed_twice = jax.custom_vjp(run)
    computed_twice.defvjp(forward, backward)
    return computed_twice


def _distribution(keras: Any, job: Job) -> Any:
    """Keras's DataParallel over the devices asked for; None for one."""
    if job.devices is None:
        return None
    found = keras.distribution.list_devices()
    many = type(job.devices) is int
    names = found[: job.devices] if many else job.devices
    listed = isinstance(names, list | tuple) and len(set(names)) == len(names)
    enough = len(names) == job.devices if many and listed else bool(names)
    if not listed or not enough or not names or not set(names) <= set(found):
        raise OptionError(
            f"devices is {job.devices!r}, but there are {len(found)}: {', '.join(found)}"
        )
    if job.options.batch_size % len(names):
        raise OptionError(
            f"batch_size is {job.options.batch_size}, not a multiple of the {len(names)} devices"
        )
    return keras.distribution.DataParallel(devices=list(names), auto_shard_dataset=False)
