"""`finetune`: a model and some rows in, a specialist out.

One call's way through this package: `rows` reads and checks the data, `examples` tokenises it to
disk, `batches` decides what is learned together, a trainer (`keras_trainer`, `mlx_trainer`)
computes the steps with the weights of `weights` and the loss of `head`, and `run` goes through
them, watching and saving. What comes out is written here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.checkpoint.adapter import Adapter
from gemma_multi.checkpoint.checkpoint import ensure_free
from gemma_multi.checkpoint.resolve import resolve
from gemma_multi.engines import check_installed, choose_backend
from gemma_multi.errors import DataError, OptionError, TrainingError
from gemma_multi.files import write_atomically
from gemma_multi.loading import load
from gemma_multi.model import Model
from gemma_multi.quantization import quantize_checkpoint
from gemma_multi.training.batches import Batches
from gemma_multi.training.curves import draw_curves
from gemma_multi.training.display import Display
from gemma_multi.training.examples import Examples, prepare
from gemma_multi.training.history import History, read_history, verdict
from gemma_multi.training.options import TrainingOptions
from gemma_multi.training.rows import Data
from gemma_multi.training.run import Run
from gemma_multi.training.trainer import Job, Trainer
from gemma_multi.training.weights import as_adapter, frozen_weights, initial_tensors

BACKENDS = ("keras", "mlx")
RUN_FILE, CURVES_FILE = "run.json", "curves.png"


@dataclass
class FineTune:
    """A finished run, all of it in the directory `output`."""

    output: Path
    base: Checkpoint
    backend: str
    options: TrainingOptions
    history: list[dict[str, Any]]  # as in history.jsonl
    best_step: int | None  # with the lowest validation loss; None: nothing was held out
    best_loss: float | None
    loss: float | None  # the last validation loss
    verdict: str  # what came out, in a sentence or two

    @cached_property
    def model(self) -> Model:
        """The model after the last step."""
        return load(self.checkpoint(), backend=self.backend)

    @cached_property
    def best(self) -> Model:
        """The model of the step with the lowest validation loss."""
        return load(self.checkpoint(best=True), backend=self.backend)

    def checkpoint(self, best: bool = False) -> Checkpoint:
        """What was trained, as it ships: with the adapter merged, on the grid after QAT."""
        if best and self.best_step == 0:
            return self.base
        path = self.path(best)
        if self.options.method == "full":
            return Checkpoint.open(path)
        adapter = Adapter.open(path, self.base.config)
        return adapter.merge(self.base, bits=4 if self.options.qat else None)

    def path(self, best: bool = False) -> Path:
        """The directory of the model, or with LoRA of the adapter."""
        name = "model" if self.options.method == "full" else "adapter"
        kept = self.output / f"best-{name}"
        return kept if best and kept.exists() else self.output / name

    def __str__(self) -> str:
        return f"{self.path()}\n{self.verdict}"


def finetune(
    model: str | Path | Checkpoint | Model,
    data: Data,
    *,
    output: str | Path,
    backend: str = "auto",
    validation: float | Data = 0.1,
    devices: int | Sequence[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    tensorboard: bool = False,
    **options: Any,
) -> FineTune:
    """Trains `model` on `data` and writes the result to the directory `output`.

    model: what `load` takes, or a Model.
    data: a JSONL, CSV or Parquet file, or dicts, with `messages`, with `prompt` and `completion`,
        or with `text`. See `gemma-multi data check`.
    validation: the share of the rows to hold out, or rows of their own; 0 for none.
    backend: "keras" (on JAX), "mlx", or "auto".
    devices: how many, or which, of JAX's devices share each batch; None for one.
    resume: go on where a run in `output` was stopped or killed; the options and the data must be
        the same.
    options:
        method: "full", or "lora" with `rank`, `alpha` and `targets` (names of layers).
        qat: train through the int4 grid, so that the int4 model is the one that was trained.
        epochs, learning_rate (5e-5, with LoRA 2e-4), schedule ("constant" or "cosine"), warmup
            (a share of the steps), weight_decay, clip (the gradient's norm), seed.
        batch_size (rows), accumulate (batches a step), max_length (tokens a row), packing.
        loss_on: "answer" or "all" tokens. too_long: "refuse", "cut" or "skip" rows beyond
            max_length.
        dtype: of activations, "float32" or "bfloat16"; "auto" for what the device is fast at.
            Weights and optimiser are float32 always.
        gradient_checkpointing: compute layers twice rather than keep what they gave.
        evaluate_every: steps; after each epoch if None. save_every: seconds between states.

    Writes `model/` (after QAT an int4 directory) or `adapter/` (PEFT's layout), `best-...` where
    an earlier step was better, `history.jsonl`, `curves.png` and `run.json`.

    Raises OptionError, DataError, CheckpointError or BackendError before anything is trained;
    TrainingError where the loss is not finite or the disk is full; TrainingStopped on Ctrl-C.
    """
    if isinstance(model, Model):
        backend = model.backend if backend == "auto" and model.backend in BACKENDS else backend
        model = model.checkpoint
    base = model if isinstance(model, Checkpoint) else resolve(model)
    chosen = _check_options(base, validation, options)
    return train(base, data, Path(output), choose_trainer(backend), validation, chosen,
                 devices=devices, resume=resume, progress=progress,
                 tensorboard=tensorboard)  # fmt: skip


def train(
    base: Checkpoint,
    data: Data,
    output: Path,
    backend: str,
    validation: float | Data,
    options: TrainingOptions,
    *,
    teacher: Checkpoint | None = None,
    devices: Any = None,
    resume: bool = False,
    progress: bool = True,
    tensorboard: bool = False,
) -> FineTune:
    """`finetune` with checked options; with a `teacher`, its probabilities are the target."""
    finished = _check_output(output, resume)
    trained = initial_tensors(base, options)
    rows = _read_data(base, data, validation, options, output, Display(progress))
    facts = _facts(base, rows, options, backend, teacher)
    if resume:
        _check_same_run(output, facts)
    if finished:
        return _result(output, base, backend, options)
    write_atomically(output / RUN_FILE, json.dumps(facts, indent=2).encode() + b"\n")
    job = Job(base.config, trained, frozen_weights(base, options), options, teacher, devices)
    trainer = create_trainer(backend, job)

    def batches(part: Examples) -> Batches:
        return Batches(part, options.batch_size, options.max_length, options.accumulate,
                       options.packing, options.seed)  # fmt: skip

    training = batches(rows[0])
    held = batches(rows[1]) if rows[1] is not None else None
    with ExitStack() as stack:
        writer = stack.enter_context(_tensorboard(output)) if tensorboard else None
        run = Run(trainer, training, held, options, output, Display(progress), writer)
        run.take_up()
        run.train()
    _write_results(run, base, output)
    write_atomically(output / RUN_FILE, json.dumps(
        {**facts, "finished": True, "best_step": run.position.best_step,
         "best_loss": run.position.best_loss}, indent=2).encode() + b"\n")  # fmt: skip
    _clear(output)
    return _result(output, base, backend, options)


def choose_trainer(backend: str) -> str:
    """The backend to train on: as named, or for "auto" what `load` takes for a dense model."""
    if backend == "litert":
        raise OptionError("backend 'litert' cannot train; use 'mlx' or 'keras', then export")
    found = choose_backend(backend)
    if found == "litert":  # nothing else is installed
        found = "keras"
    check_installed(found)
    return found


def create_trainer(backend: str, job: Job) -> Trainer:
    if backend == "mlx":
        from gemma_multi.training.mlx_trainer import MlxTrainer

        return MlxTrainer(job)
    from gemma_multi.training.keras_trainer import KerasTrainer

    return KerasTrainer(job)


def _check_options(
    base: Checkpoint, validation: float | Data, given: dict[str, Any]
) -> TrainingOptions:
    share = validation if isinstance(validation, int | float) else 0.0
    return TrainingOptions.checked(
        {**given, "validation": share}, base.config.max_position_embeddings
    )


def _check_output(output: Path, resume: bool) -> bool:
    """Whether the run there is finished. Raises OptionError, TrainingError."""
    if not resume:
        ensure_free(output)
        return False
    if not (output / RUN_FILE).is_file():
        raise TrainingError(f"{output}: no run to resume there ({RUN_FILE} is missing)")
    return bool(_read_run(output).get("finished"))


def _read_run(output: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((output / RUN_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{output / RUN_FILE}: cannot be read: {error}") from error


def _read_data(
    base: Checkpoint, data: Data, validation: float | Data, options: TrainingOptions, output: Path,
    display: Display,
) -> tuple[Examples, Examples | None]:  # fmt: skip
    """(training, validation), tokenised into `output/data`."""
    directory = output / "data"

    def prepared(given: Data, name: str) -> Examples:
        return prepare(
            given, base.tokenizer, directory / name, max_length=options.max_length,
            loss_on=options.loss_on, too_long=options.too_long,
        )  # fmt: skip

    created = not output.exists()
    try:
        rows = prepared(data, "training.i32")
        if len(rows) < 2:
            raise DataError(f"{rows.name}: one row is too few to learn from; give it 10 or more")
        held: Examples | None = None
        if not isinstance(validation, int | float):
            held = prepared(validation, "validation.i32")
        elif options.validation:
            rows, held = rows.split(options.validation, options.seed)
        if held is not None and not len(rows):
            raise DataError(f"{rows.name}: all rows are the same; nothing is left to validate on")
    except BaseException:
        shutil.rmtree(output if created else directory, ignore_errors=True)
        raise
    for part in filter(None, (rows, held)):
        for count, what in ((part.skipped, "left away"), (part.cut, "cut")):
            if count:
                display.say(f"{part.name}: {count} rows were longer than {options.max_length} "
                            f"tokens and were {what}")  # fmt: skip
    if held is not None and (shared := rows.count_shared(held)):
        display.say(f"{shared} of {len(held)} validation rows are training rows as well: the "
                    "validation loss will look better than it is")  # fmt: skip
    return rows, held


def _facts(
    base: Checkpoint, rows: tuple[Examples, Examples | None], options: TrainingOptions,
    backend: str, teacher: Checkpoint | None,
) -> dict[str, Any]:  # fmt: skip
    """What a run is, for `run.json`; a resumed one must agree in all of it."""
    training, held = rows
    return {
        "base": base.provenance.source,
        "base_sha256": base.digest(),
        "teacher_sha256": teacher.digest() if teacher else None,
        "backend": backend,
        "options": options.to_dict(),
        "rows": len(training),
        "validation_rows": len(held) if held is not None else 0,
        "data_sha256": training.fingerprint,
        "validation_sha256": held.fingerprint if held is not None else None,
    }


def _check_same_run(output: Path, facts: dict[str, Any]) -> None:
    before = _read_run(output)
    for name, now in facts.items():
        then = before.get(name)
        if name == "options" and isinstance(then, dict):
            changed = [key for key in now if key != "save_every" and then.get(key) != now[key]]
            if changed:
                key = changed[0]
                raise TrainingError(
                    f"{output}: cannot resume: {key} is {now[key]!r}, but the run began with "
                    f"{then.get(key)!r}; give it the same, or start anew in another directory"
                )
        elif then != now:
            what = {"data_sha256": "the training data has", "rows": "the training data has",
                    "validation_sha256": "the validation data has", "base_sha256": "the model has",
                    "validation_rows": "the validation data has"}  # fmt: skip
            raise TrainingError(
                f"{output}: cannot resume: {what.get(name, f'the {name} has')} changed since the "
                "run began; give it what it had, or start anew in another directory"
            )


def _write_results(run: Run, base: Checkpoint, output: Path) -> None:
    """The models or adapters, and the picture."""
    options, position = run.options, run.position
    best = position.best_step
    kept = {"": run.trainer.tensors()}
    if best is not None and 0 < best < run.steps:
        kept["best-"] = load_file(run.best_path(best))
    for prefix, tensors in kept.items():
        name = "model" if options.method == "full" else "adapter"
        target = output / f"{prefix}{name}"
        shutil.rmtree(target, ignore_errors=True)  # of a process killed right here
        if options.method == "lora":
            as_adapter(tensors, options, base.provenance.source).save(target)
        else:
            _trained_checkpoint(base, tensors, options, run).save(target)
    title = f"{base.provenance.source}, {options.method}" + ", QAT int4" * options.qat
    if not draw_curves(run.history, output / CURVES_FILE, title):
        run.display.say(f"{CURVES_FILE} needs: pip install 'gemma-multi[train]'")


def _trained_checkpoint(
    base: Checkpoint, tensors: dict[str, np.ndarray], options: TrainingOptions, run: Run
) -> Checkpoint:
    rows = len(run.batches.examples)
    how = f"fine-tuned on {rows} rows" + " through the int4 grid" * options.qat
    checkpoint = base.replace(tensors=tensors, provenance=base.provenance.modified(how))
    if options.qat:
        return quantize_checkpoint(checkpoint)[0]
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, base.config.dtype, base.config.dtype))
    return checkpoint.replace(tensors={n: t.astype(dtype) for n, t in tensors.items()})


def _clear(output: Path) -> None:
    """What only an unfinished run needs."""
    shutil.rmtree(output / "data", ignore_errors=True)
    for path in (*output.glob("best-*.safetensors"), output / "state.safetensors"):
        path.unlink(missing_ok=True)


def _result(output: Path, base: Checkpoint, backend: str, options: TrainingOptions) -> FineTune:
    run = _read_run(output)
    history = History(output / "history.jsonl")
    history.records = read_history(history.path)
    _, validated = history.curve("validation_loss")
    _clear(output)
    return FineTune(
        output, base, backend, options, history.records, run.get("best_step"),
        run.get("best_loss"), validated[-1] if validated else None, verdict(history),
    )  # fmt: skip


def _tensorboard(output: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise OptionError("tensorboard=True needs: pip install tensorboardX") from None
    return SummaryWriter(str(output / "tensorboard"))
