"""`finetune`: a model and some rows in, a specialist out.

One call's way through this package: `rows` reads and checks the data, `examples` tokenises it to
disk, `batches` decides what is learned together, a trainer (`keras_trainer`, `mlx_trainer`)
computes the steps with the weights of `weights` and the loss of `head`, and `run` goes through
them, watching and saving. `result` writes what comes out.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.config import EMBEDDING
from gemma_multi.engines import backends, choose_backend
from gemma_multi.errors import DataError, OptionError, TrainingError
from gemma_multi.files import check_output, locked, write_atomically
from gemma_multi.model import Model
from gemma_multi.progress import Progress
from gemma_multi.rows import Data
from gemma_multi.sources import Source, open_checkpoint
from gemma_multi.training.batches import Batches
from gemma_multi.training.calibrated import calibrated
from gemma_multi.training.display import Display
from gemma_multi.training.examples import Examples, check_enough, checked_rows, prepare
from gemma_multi.training.options import TrainingOptions
from gemma_multi.training.result import (
    ROWS_DIRECTORY,
    RUN_FILE,
    FineTune,
    read_result,
    read_run,
    write_results,
)
from gemma_multi.training.run import Run
from gemma_multi.training.trainer import Job, Trainer
from gemma_multi.training.vocabulary import likely_words
from gemma_multi.training.weights import frozen_weights, initial_tensors
from gemma_multi.transforms import fit_float16, original

LOCK_FILE = ".lock"  # held while a run goes on


def finetune(
    model: Source,
    data: Data,
    output: str | Path,
    *,
    backend: str = "auto",
    validation: float | Data = 0.1,
    devices: int | Sequence[str] | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Progress = True,
    **options: Any,
) -> FineTune:
    """Trains `model` on `data` and writes the result to the directory `output`.

    model, revision, local_files_only: what to train; see `open_checkpoint`.
    data: a JSONL, CSV or Parquet file, or dicts, with `messages`, with `prompt` and `completion`,
        or with `text`. See `gemma-multi data check`.
    validation: the share of the rows to hold out, or rows of their own; 0 for none.
    backend: "keras" (on JAX), "mlx", or "auto".
    devices: how many, or which, of JAX's devices share each batch; None for one.
    resume: go on where a run in `output` was stopped or killed; the options and the data must be
        the same.
    options:
        method: "full"; "lora" with `rank`, `alpha` and `targets` (names of layers); or "scales",
            which leaves an int4 model's codes and trains their scales and the norms. A calibrated
            model gets it where nothing is said; an original that is to have it is calibrated first,
            once, and kept in the cache.
        qat: train through the int4 grid, so that the int4 model is the one that was trained.
        epochs, learning_rate (5e-5, with LoRA 2e-4, with scales 1e-3), schedule ("constant" or
            "cosine"), warmup (a share of the steps), weight_decay, clip (the gradient's norm),
            seed.
        batch_size (rows), accumulate (batches a step), max_length (tokens a row), packing.
        loss_on: "answer" or "all" tokens. too_long: "refuse", "cut" or "skip" rows beyond
            max_length.
        dtype: of activations, "float32", "bfloat16" or "float16"; "auto" for what the device is
            fast at. Weights and optimiser are float32 always.
        gradient_checkpointing: compute layers twice rather than keep what they gave; if None, in
            batches of which that is more than 1 GB.
        evaluate_every: steps; after each epoch if None. save_every: seconds between states.

    Writes `model/` (after QAT an int4 directory) or `adapter/` (PEFT's layout), `best-...` where
    an earlier step was better, `history.jsonl`, `curves.png` and `run.json`.

    Raises OptionError, DataError, CheckpointError or BackendError before anything is trained;
    TrainingError where the loss is not finite or the disk is full; TrainingStopped on Ctrl-C.
    """
    if isinstance(model, Model) and backend == "auto" and backends()[model.backend].trains:
        backend = model.backend
    base = open_checkpoint(
        model, revision=revision, local_files_only=local_files_only, progress=progress is True
    )
    if not base.is_int4:  # int8 stands for the weights it was made of
        base = original(base)
    chosen = _check_options(base, validation, options)
    backend = choose_trainer(backend)
    if chosen.method == "scales" and not base.is_int4:
        _check_output(Path(output), resume)
        data = checked_rows(data)
        base = calibrated(base, progress)
    return train(base, data, Path(output), backend, validation, chosen,
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
    texts: int | None = None,
    devices: Any = None,
    resume: bool = False,
    progress: Progress = True,
    tensorboard: bool = False,
) -> FineTune:
    """`finetune` with checked options; with a `teacher`, its probabilities are the target. `texts`:
    as how many texts it wrote the data, if it did."""
    leader = leads(backend)
    display = Display(progress if leader else False)
    with ExitStack() as cleanup:
        with _refused_together(backend), _as_training_errors(output):
            finished = False
            own = output
            if leader:
                _check_output(output, resume)
                begins = cleanup.enter_context(_alone_in(output))
                finished = _check_output(output, resume)  # nobody can change it any more
            else:
                own = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
            trained = initial_tensors(base, options)
            _check_grid(base, options, display)
            rows = _read_data(base, data, validation, options, own / ROWS_DIRECTORY, display)
            facts = {**_facts(base, rows, options, backend, teacher, devices), "texts": texts}
            begun = resume and (output / RUN_FILE).exists()
            if begun:
                _check_same_run(output, facts)
        if _any(backend, finished):
            return read_result(output, base, backend, options)
        with _refused_together(backend), _as_training_errors(output):
            words = None
            if teacher and EMBEDDING not in trained:
                with display.counting("asking for likely words") as count:
                    words = likely_words(teacher, rows[0], count)
            module = trainer_module(backend)
            dtype = module.fast_type() if options.dtype == "auto" else options.dtype
            if dtype == "float16":
                base = fit_float16(base)
            frozen = frozen_weights(base, options)
            job = Job(base.config, trained, frozen, options, dtype, teacher, devices, words)
            trainer: Trainer = module.create(job)
            place = {"device": trainer.device, "dtype": dtype}
            if begun:
                _check_same_run(output, place)
            writer = _tensorboard(output) if tensorboard and leader else None
            if leader:
                facts |= place
                _write_json(output / RUN_FILE, facts)
                begins.done = True

        def batches(part: Examples) -> Batches:
            return Batches(part, options.batch_size, options.max_length, options.accumulate,
                           options.packing, options.seed)  # fmt: skip

        held = batches(rows[1]) if rows[1] is not None else None
        try:
            run = Run(trainer, batches(rows[0]), held, options, output, display, writer)
            run.resume()
            run.train()
            if leader:
                write_results(run, base, output)
                position = run.position
                ended = {"best_step": position.best_step, "best_loss": position.best_loss}
                _write_json(output / RUN_FILE, {**facts, "finished": True, **ended})
            trainer.any_of(False)  # the others wait until it is written
        except OSError as error:
            raise TrainingError(
                f"{output}: cannot be written: {error.strerror or error}; what was saved there is "
                "intact. Make room and go on with resume=True"
            ) from error
        finally:
            if writer is not None:
                writer.close()
        return read_result(output, base, backend, options)


@dataclass
class _Beginning:
    """Whether a run has begun, so that its directory stays."""

    done: bool = False


@contextmanager
def _alone_in(output: Path) -> Iterator[_Beginning]:
    """Holds a run's directory, made if need be, against a second run. A directory that was made
    here goes again where the run did not begin. Raises TrainingError where there is another."""
    created, begins = False, _Beginning()
    with _as_training_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            output.mkdir()
            created = True
        except FileExistsError:
            pass
    busy = f"{output}: another process is training there; wait for it, or choose another output"
    try:
        with locked(output / LOCK_FILE, busy):
            yield begins
    finally:
        if created and not begins.done:
            shutil.rmtree(output, ignore_errors=True)


@contextmanager
def _as_training_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{output}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _refused_together(backend: str) -> Iterator[None]:
    """What one process of `mlx.launch` refuses, all refuse: a follower would wait for ever."""
    try:
        yield
    except BaseException:
        _any(backend, True)
        raise
    if _any(backend, False):
        raise TrainingError("another process of this run refused it; its message says why")


def _any(backend: str, flag: bool) -> bool:
    """Whether a flag is set in any process of the run."""
    if backend != "mlx":
        return flag
    import mlx.core as mx

    group = mx.distributed.init()
    if group.size() == 1:
        return flag
    return bool(mx.distributed.all_sum(mx.array(float(flag))).item() != 0)


def leads(backend: str) -> bool:
    """Whether this process speaks and writes: all do but the followers of `mlx.launch`."""
    if backend != "mlx":
        return True
    import mlx.core as mx

    return mx.distributed.init().rank() == 0


def choose_trainer(backend: str) -> str:
    """The backend to train on: as named, or for "auto" what `load` takes for a dense model."""
    trainers = {name: one for name, one in backends().items() if one.trains}
    if backend != "auto" and not choose_backend(backend).trains:
        able = " or ".join(map(repr, trainers))
        raise OptionError(f"backend {backend!r} cannot train; use {able}, then export")
    if backend == "auto":
        ranked = sorted(trainers.values(), key=lambda one: -one.suits(False))
        backend = next((one.name for one in ranked if not one.missing()), ranked[0].name)
    trainers[backend].check_installed()
    return backend


def trainer_module(backend: str) -> ModuleType:
    """The module of a backend's trainer: `create`, and `fast_type` of activations."""
    return import_module(f"gemma_multi.training.{backend}_trainer")


def _check_options(
    base: Checkpoint, validation: float | Data, given: dict[str, Any]
) -> TrainingOptions:
    share = validation if isinstance(validation, int | float) else 0.0
    calibrated_codes = base.is_int4 and base.provenance.channels  # worth keeping as they are
    return TrainingOptions.checked(
        {**given, "validation": share}, base.config.max_position_embeddings,
        "scales" if calibrated_codes else "full",
    )  # fmt: skip


def check_run(output: Path, facts: dict[str, Any] | None) -> None:
    """Whether a run can go to `output`: a new one, or with facts one to resume that has them.
    Raises OptionError, TrainingError."""
    _check_output(output, facts is not None)
    if facts is not None:
        _check_same_run(output, facts)


def _check_output(output: Path, resume: bool) -> bool:
    """Whether the run there is finished. Raises OptionError, TrainingError."""
    try:
        left = {path.name for path in output.iterdir()} if output.is_dir() else set()
    except OSError:  # a name too long, say
        check_output(output, directory=True)
        raise
    left = {name for name in left if name != LOCK_FILE and not name.startswith(".run.json.")}
    if left == {ROWS_DIRECTORY}:
        return False  # a run that was killed while its data was read has not begun
    if not resume:
        if left or not output.is_dir():
            check_output(output, directory=True)
        return False
    if RUN_FILE not in left:
        raise TrainingError(f"{output}: no run to resume there ({RUN_FILE} is missing)")
    return bool(read_run(output).get("finished"))


def _read_data(
    base: Checkpoint, data: Data, validation: float | Data, options: TrainingOptions,
    directory: Path, display: Display,
) -> tuple[Examples, Examples | None]:  # fmt: skip
    """(training, validation), tokenised into files in `directory`."""

    def prepared(given: Data, name: str) -> Examples:
        with display.counting("reading rows") as count:
            return prepare(
                given, base.tokenizer, directory / name, max_length=options.max_length,
                loss_on=options.loss_on, too_long=options.too_long, progress=count,
            )  # fmt: skip

    rows = prepared(data, "training.i32")
    check_enough(rows.name, len(rows))
    held: Examples | None = None
    if not isinstance(validation, int | float):
        held = prepared(validation, "validation.i32")
    elif options.validation:
        rows, held = rows.split(options.validation, options.seed)
        if not len(held):
            raise DataError(
                f"{rows.name}: all {len(rows)} rows are the same, so none can be held out; give it "
                "more, or validation=0"
            )
    for part in filter(None, (rows, held)):
        for count, what in ((part.skipped, "skipped"), (part.cut, "cut")):
            if count:
                display.say(f"{part.name}: {count} rows were longer than {options.max_length} "
                            f"tokens and were {what}")  # fmt: skip
    if held is not None and (shared := rows.count_shared(held)):
        display.say(f"{shared} of {len(held)} validation rows are training rows as well: the "
                    "validation loss will look better than it is")  # fmt: skip
    return rows, held


def _check_grid(base: Checkpoint, options: TrainingOptions, display: Display) -> None:
    """Scales are those of our own grid. An adapter is trained on the grid that its merge will be
    on, or it says so."""
    if options.method == "scales" and base.grid != "portable":
        raise OptionError(
            "method 'scales' trains the scales of int4 as `quantize` writes it, and this model is "
            f"on the {base.grid} grid; give it the original, or choose another method"
        )
    if options.method != "lora" or not base.is_quantized:
        return
    if options.qat and base.precision != "int4":
        raise OptionError(
            f"qat is for int4, but the model is {base.precision}, and so would be the merged one; "
            "train from the original, or with qat=False"
        )
    if not options.qat:
        display.say(f"the model is {base.precision}: without qat the adapter is trained off the "
                    "grid that it will be merged on")  # fmt: skip


def _facts(
    base: Checkpoint, rows: tuple[Examples, Examples | None], options: TrainingOptions,
    backend: str, teacher: Checkpoint | None, devices: Any,
) -> dict[str, Any]:  # fmt: skip
    """What a run is, for `run.json`; a resumed one must agree in all of it."""
    training, held = rows
    return {
        "base": base.provenance.source,
        "base_sha256": base.digest(),
        "teacher_sha256": teacher.digest() if teacher else None,
        "backend": backend,
        "devices": devices if devices is None or isinstance(devices, int) else list(devices),
        "options": options.to_dict(),
        "rows": len(training),
        "validation_rows": len(held) if held is not None else 0,
        "data_sha256": training.fingerprint,
        "validation_sha256": held.fingerprint if held is not None else None,
    }


def _check_same_run(output: Path, facts: dict[str, Any]) -> None:
    before = read_run(output)
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
                    "validation_rows": "the validation data has",
                    "texts": "the number of texts has"}  # fmt: skip
            raise TrainingError(
                f"{output}: cannot resume: {what.get(name, f'the {name} has')} changed since the "
                "run began; give it what it had, or start anew in another directory"
            )


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(facts, indent=2).encode() + b"\n")


def _tensorboard(output: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise OptionError("tensorboard=True needs: pip install tensorboardX") from None
    return SummaryWriter(str(output / "tensorboard"))
