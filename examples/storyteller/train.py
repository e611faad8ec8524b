"""Trains `storyteller`, the bundled model, from nothing: python examples/storyteller/train.py

Design choices:
- A small but true Gemma 3: nine layers, so that a global layer has local ones after it; a hidden
  size that is no perfect square, so that a wrong embedding scale shows; a window shorter than
  its stories. Its backbone is the very one the Keras engine runs.
- Parameters live under their Hugging Face names and in that layout. They are reshaped for Keras
  inside the compiled step, so what is trained is what is saved.
- The last part of the run trains through the int4 grid (straight-through), because int4 is how
  the model ships.
- Seeded, and resumes from the last state: same seed, same data, same steps.
- Ends by writing the model in full precision to the work directory and as an int4 directory to
  `--output`, ready to be bundled. `evaluate.py` says how good it is.
"""

from __future__ import annotations

import argparse
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import corpus
import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import safe_open
from safetensors.numpy import save as serialise

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.checkpoint.checkpoint import ensure_free
from gemma_multi.checkpoint.provenance import APACHE, Provenance
from gemma_multi.config import ModelConfig, alternate
from gemma_multi.engines.keras_backbone import build_backbone, import_keras, weight_slots
from gemma_multi.files import write_atomically
from gemma_multi.quantization import int4, quantize
from gemma_multi.tokenizer import Tokenizer

CONFIG = ModelConfig(
    vocab_size=corpus.VOCAB_SIZE,
    hidden_size=160,
    num_hidden_layers=9,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=64,
    intermediate_size=448,
    sliding_window=64,
    layer_types=alternate(9, 6),
    max_position_embeddings=2048,
    query_pre_attn_scalar=64.0,
)
GENERATION = {  # what `generate` does when not told otherwise
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 40,
    "top_p": 0.95,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
}
STEPS = 1500
QAT_FROM = 0.75  # the share of the run after which weights go through the int4 grid
PEAK_LEARNING_RATE = 3e-3
SAVE_EVERY = 100


class Trainer:
    """Parameters, optimiser and the compiled step."""

    def __init__(self, steps: int, seed: int) -> None:
        self._run = {"steps": str(steps), "seed": str(seed), "config": repr(CONFIG)}
        keras = import_keras()
        import jax

        self._jax = jax
        self.names = list(CONFIG.tensor_shapes())
        rng = np.random.default_rng(seed)
        self.variables = [
            keras.Variable(_initial(name, shape, rng), dtype="float32", name=name.replace(".", "_"))
            for name, shape in CONFIG.tensor_shapes().items()
        ]
        schedule = keras.optimizers.schedules.CosineDecay(
            PEAK_LEARNING_RATE * 0.05,
            decay_steps=steps - 60,
            alpha=0.02,
            warmup_target=PEAK_LEARNING_RATE,
            warmup_steps=60,
        )
        # Muon gets as far as AdamW in three quarters of the steps here
        self.optimizer = keras.optimizers.Muon(
            schedule,
            weight_decay=0.05,
            adam_weight_decay=0.05,
            adam_beta_2=0.98,
            global_clipnorm=1.0,
            exclude_layers=["embed_tokens"],
        )
        self.optimizer.exclude_from_weight_decay(var_names=["norm"])
        self.optimizer.build(self.variables)
        self.values = [v.value for v in self.variables]
        self.state = [v.value for v in self.optimizer.variables]
        backbone = build_backbone(CONFIG, "float32")
        slots = weight_slots(backbone, CONFIG)
        order = {id(v): i for i, v in enumerate(backbone.trainable_variables)}
        self._places = [order[id(slots[name].variable)] for name in self.names]
        self._reshape = [slots[name].arrange for name in self.names]
        self._backbone = backbone
        self._step = jax.jit(self._compute_step, static_argnames="qat", donate_argnums=(0, 1))

    def _loss(self, values: list[Any], ids: Any, mask: Any, qat: bool) -> Any:
        jax, jnp = self._jax, self._jax.numpy
        if qat:
            values = [
                v if v.ndim == 1 else v + jax.lax.stop_gradient(int4.fake_quantize(jnp, v) - v)
                for v in values
            ]
        weights: list[Any] = [None] * len(values)
        for place, reshape, value in zip(self._places, self._reshape, values, strict=True):
            weights[place] = reshape(value)
        inputs = {"token_ids": ids[:, :-1], "padding_mask": jnp.ones_like(ids[:, :-1])}
        hidden, _ = self._backbone.stateless_call(weights, [], inputs)
        logits = hidden @ values[0].T
        target = ids[:, 1:, None]
        picked = jnp.take_along_axis(logits, target, -1)[..., 0]
        losses = jax.nn.logsumexp(logits, -1) - picked
        wanted = mask[:, 1:].astype(losses.dtype)
        return (losses * wanted).sum() / wanted.sum()

    def _compute_step(
        self, values: list[Any], state: list[Any], ids: Any, mask: Any, qat: bool
    ) -> tuple[list[Any], list[Any], Any]:
        loss = partial(self._loss, ids=ids, mask=mask, qat=qat)
        loss_value, gradients = self._jax.value_and_grad(loss)(values)
        values, state = self.optimizer.stateless_apply(state, gradients, values)
        return values, state, loss_value

    def step(self, ids: np.ndarray, mask: np.ndarray, qat: bool) -> float:
        self.values, self.state, loss = self._step(self.values, self.state, ids, mask, qat=qat)
        return float(loss)

    def save(self, path: Path, step: int) -> None:
        tensors = {n: np.asarray(v) for n, v in zip(self.names, self.values, strict=True)}
        tensors |= {f"optimizer.{i}": np.asarray(v) for i, v in enumerate(self.state)}
        write_atomically(path, serialise(tensors, {**self._run, "step": str(step)}))

    def resume(self, path: Path) -> int:
        """Takes up the state in `path`; the number of steps it has behind it, 0 without one."""
        if not path.exists():
            return 0
        jnp = self._jax.numpy
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            for name, value in self._run.items():
                if metadata.get(name) != value:
                    raise SystemExit(
                        f"{path} is of a run with {name} {metadata.get(name)}, this one has "
                        f"{value}; choose another --work or remove it"
                    )
            self.values = [jnp.asarray(file.get_tensor(name)) for name in self.names]
            self.state = [
                jnp.asarray(file.get_tensor(f"optimizer.{i}")) for i in range(len(self.state))
            ]
            return int(metadata["step"])


def _initial(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if len(shape) == 1:
        return np.zeros(shape, np.float32)  # norms multiply by 1 + w
    return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled storyteller.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build/storyteller"))
    parser.add_argument("--output", type=Path, default=Path("build/storyteller/int4"))
    options = parser.parse_args()

    ensure_free(options.output)
    tokenizer_path = options.work / "tokenizer.model"
    if not tokenizer_path.exists():
        write_atomically(tokenizer_path, corpus.train_tokenizer(seed=options.seed))
    tokenizer = Tokenizer(tokenizer_path.read_bytes())
    trainer = Trainer(options.steps, options.seed)
    state = options.work / "training.safetensors"
    first = trainer.resume(state)
    print(f"{CONFIG.num_parameters:,} parameters; steps {first} to {options.steps}")

    started, average = time.monotonic(), None
    with Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ) as progress:
        bar = progress.add_task("train", total=options.steps, completed=first, loss="-")
        for step in range(first, options.steps):
            ids, mask = corpus.batch(tokenizer, step, options.seed)
            loss = trainer.step(ids, mask, qat=step >= QAT_FROM * options.steps)
            if not np.isfinite(loss):
                raise SystemExit(f"the loss is {loss} at step {step}; the last state is kept")
            average = loss if average is None else 0.95 * average + 0.05 * loss
            progress.update(bar, advance=1, loss=f"{average:.3f}")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == options.steps:
                trainer.save(state, step + 1)
                progress.console.print(
                    f"step {step + 1}: loss {average:.4f}, {time.monotonic() - started:.0f} s"
                )
    print(f"{pack(trainer, options.work, options.output)} written")


def pack(trainer: Trainer, work: Path, output: Path) -> Path:
    """The full-precision model to `work/float32`, and its int4 directory to `output`."""
    tensors = {n: np.asarray(v) for n, v in zip(trainer.names, trainer.values, strict=True)}
    made = "trained from nothing on generated stories and tasks"
    checkpoint = Checkpoint(
        config=CONFIG,
        tensors=tensors,
        provenance=Provenance(license=APACHE, source="storyteller", modifications=(made,)),
        generation=GENERATION,
        path=work,  # where the tokenizer is
    )
    shutil.rmtree(work / "float32", ignore_errors=True)
    quantize(checkpoint.save(work / "float32"), output)
    return output


if __name__ == "__main__":
    main()
