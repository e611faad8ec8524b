"""`finetune`, whole: what it writes, that int4 is what was trained, and that nothing is lost."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi import (
    CheckpointError,
    FineTune,
    OptionError,
    TrainingError,
    finetune,
    validation_loss,
)
from gemma_multi.exporters import save
from gemma_multi.training.history import read_history
from training.conftest import ROWS, wait_for_step

OPTIONS: dict[str, Any] = {
    "epochs": 2, "learning_rate": 2e-3, "batch_size": 4, "max_length": 64, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has storyteller's words."""
    directory = tmp_path_factory.mktemp("base") / "tiny"
    return save(tiny_checkpoint(vocab_size=4096, dtype="bfloat16"), directory)


def tuned(base: Path, output: Path, backend: str = "keras", **options: Any) -> FineTune:
    return finetune(base, ROWS, output=output, backend=backend, **{**OPTIONS, **options})


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_int4_model_is_the_one_that_was_validated(
    base: Path, tmp_path: Path, trainer_backend: str, method: str
) -> None:
    rate = {"full": 2e-3, "lora": 2e-2}[method]
    held = ROWS[:5]
    result = finetune(base, ROWS[5:], validation=held, output=tmp_path / "run", method=method,
                      backend=trainer_backend, **{**OPTIONS, "learning_rate": rate})  # fmt: skip
    assert result.model.describe()["weights"] == "int4"
    assert result.model.checkpoint.grid == "portable"
    measured = validation_loss(result.model, held)
    assert result.loss is not None
    assert measured.loss == pytest.approx(result.loss, abs=1e-3)
    before = next(r["validation_loss"] for r in result.history if "validation_loss" in r)
    assert result.loss < before - 0.5
    if method == "full":  # int4 weights, float32 activations: LiteRT rounds these, and is close
        exported = result.model.export(tmp_path / "model.litertlm", context_length=64)
        phone = validation_loss(gemma_multi.load(exported.path), held)
        assert phone.loss == pytest.approx(result.loss, abs=0.05)


def test_without_the_grid_the_model_keeps_its_type(base: Path, tmp_path: Path) -> None:
    result = tuned(base, tmp_path / "run", qat=False, accumulate=2, packing=True, epochs=5,
                   schedule="cosine", warmup=0.2)  # fmt: skip
    checkpoint = gemma_multi.open_checkpoint(result.path())
    assert checkpoint.precision == "bfloat16"
    assert "fine-tuned on 27 rows" in (result.path() / "NOTICE").read_text()
    rates = [r["learning_rate"] for r in result.history if "learning_rate" in r]
    assert rates[0] < max(rates)
    assert rates[-1] < 0.5 * max(rates)


def test_what_a_run_leaves_behind(base: Path, tmp_path: Path) -> None:
    result = tuned(base, tmp_path / "run", tensorboard=True)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"model", "history.jsonl", "curves.png", "run.json", "tensorboard"}
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    steps = [r["step"] for r in result.history if "loss" in r]
    assert steps == list(range(1, 15))
    assert "Validation loss fell from" in result.verdict
    again = finetune(base, ROWS, output=tmp_path / "run", resume=True, backend="keras", **OPTIONS)
    assert (again.loss, again.verdict) == (result.loss, result.verdict)


def test_overfitting_is_said_and_the_best_step_is_kept(base: Path, tmp_path: Path) -> None:
    """Held-out rows that contradict the training rows get worse while those are learned."""
    rows = [{"prompt": "Say it.", "completion": "yes yes yes"}, *ROWS[:3]]
    held = [{"prompt": "Say it.", "completion": "no no no"}] * 2
    result = finetune(base, rows, validation=held, output=tmp_path / "run", backend="keras",
                      **{**OPTIONS, "epochs": 30, "evaluate_every": 2})  # fmt: skip
    assert "overfits" in result.verdict
    assert result.best_step is not None
    assert 0 < result.best_step < 30
    assert result.best_loss is not None
    assert result.loss is not None
    assert result.best_loss < result.loss
    assert result.path(best=True).name == "best-model"
    assert validation_loss(result.best, held).loss == pytest.approx(result.best_loss, abs=1e-3)
    assert validation_loss(result.model, held).loss == pytest.approx(result.loss, abs=1e-3)


def test_ten_rows_are_learned_by_heart(tmp_path: Path) -> None:
    """What the model is for: a handful of examples, a new answer, the bundled model to start."""
    rows = [{"prompt": f"Word {w}", "completion": f"{w} is a fine word"} for w in
            "cat dog hen fox owl bee cow ant pig elk".split()]  # fmt: skip
    result = finetune(
        "storyteller", rows, output=tmp_path / "run", epochs=12, batch_size=5, learning_rate=1e-3,
        validation=0, backend="keras", progress=False,
    )  # fmt: skip
    answer = result.model.generate("Word fox", temperature=0.0)
    assert answer.text == "fox is a fine word"
    assert result.best_step is None


def test_both_engines_learn_alike(tmp_path: Path) -> None:
    """The same seed, order and float32: the losses of 20 steps within 1e-3."""
    losses = {}
    for backend in ("keras", "mlx"):
        result = finetune(
            tiny_checkpoint(vocab_size=4096), ROWS * 2, output=tmp_path / backend, qat=False,
            backend=backend, epochs=2, learning_rate=1e-4, batch_size=5, max_length=64,
            validation=0.15, progress=False,
        )  # fmt: skip
        losses[backend] = [r["loss"] for r in result.history if "loss" in r][:20]
    assert len(losses["keras"]) == 20
    np.testing.assert_allclose(losses["keras"], losses["mlx"], rtol=0, atol=1e-3)


# Nothing lost -------------------------------------------------------------------------------------

SCRIPT = """
import sys, json
import gemma_multi
rows = [json.loads(line) for line in open(sys.argv[3])]
options = json.loads(sys.argv[4])
gemma_multi.finetune(sys.argv[1], sys.argv[3], output=sys.argv[2], save_every=0, **options)
"""


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def start(base: Path, output: Path, rows: Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(base), str(output), str(rows), json.dumps(options)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def same_weights(one: Path, other: Path) -> bool:
    return all(
        gemma_multi.open_checkpoint(one / name).digest()
        == gemma_multi.open_checkpoint(other / name).digest()
        for name in ("model", "best-model")
        if (one / name).exists() or (other / name).exists()
    )


def test_a_killed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    base: Path, tmp_path: Path, rows_file: Path, trainer_backend: str
) -> None:
    options = {**OPTIONS, "backend": trainer_backend, "epochs": 3, "evaluate_every": 2}
    whole = finetune(base, rows_file, output=tmp_path / "whole", **options)
    cut = tmp_path / "cut"
    for resume, step in ((False, 3), (True, 9)):
        process = start(base, cut, rows_file, resume=resume, **options)
        wait_for_step(cut, step, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (cut / "model").exists()
    ended = finetune(base, rows_file, output=cut, resume=True, **options)
    assert same_weights(whole.output, cut)
    for field in ("loss", "validation_loss", "gradient_norm"):
        assert [r.get(field) for r in ended.history] == [r.get(field) for r in whole.history]
    assert (ended.best_step, ended.best_loss) == (whole.best_step, whole.best_loss)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(base: Path, tmp_path: Path, rows_file: Path) -> None:
    output = tmp_path / "run"
    command = [
        sys.executable, "-m", "gemma_multi", "finetune", str(base), str(rows_file), "-o",
        str(output), "-b", "keras", "--epochs", "60", "--batch-size", "4",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_step(output, 2, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "resume=True (--resume)" in said
    assert "Traceback" not in said
    assert (output / "state.safetensors").exists()
    ended = subprocess.run([*command, "--resume", "--epochs", "60"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (output / "model").exists()


def test_what_a_user_keeps_in_the_output_is_never_taken_for_a_runs(
    base: Path, tmp_path: Path, rows_file: Path
) -> None:
    for name in ("data", "notes"):
        (tmp_path / name / "mine").mkdir(parents=True)
        with pytest.raises(OptionError, match="exists already"):
            finetune(base, rows_file, tmp_path / name, **OPTIONS)
        kept = tmp_path / "project" / "data" / "rows.jsonl"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(rows_file.read_bytes())
        with pytest.raises(OptionError, match="exists already"):
            finetune(base, kept, tmp_path / "project", **OPTIONS)
        assert kept.exists()


@pytest.mark.parametrize(
    ("name", "error"), [("x" * 300, CheckpointError), ("a\0b", OptionError)]
)  # fmt: skip
def test_an_output_that_is_no_path_is_refused_by_name(
    base: Path, tmp_path: Path, rows_file: Path, name: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        finetune(base, rows_file, tmp_path / name, **OPTIONS)


def test_two_runs_do_not_share_an_output(base: Path, tmp_path: Path, rows_file: Path) -> None:
    """The second is refused, whether it begins or resumes; the first goes on undisturbed."""
    output = tmp_path / "run"
    process = start(base, output, rows_file, **{**OPTIONS, "backend": "keras", "epochs": 200})
    wait_for_step(output, 2, process)
    before = read_history(output / "history.jsonl")
    with pytest.raises(TrainingError, match="another process is training there"):
        finetune(base, rows_file, output, resume=True, **{**OPTIONS, "backend": "keras"})
    with pytest.raises(OptionError, match="exists already"):
        finetune(base, rows_file, output, **{**OPTIONS, "backend": "keras"})
    wait_for_step(output, before[-1]["step"] + 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # a killed process holds nothing
    options = {**OPTIONS, "backend": "keras", "epochs": 200}
    assert (output / ".lock").exists()
    with pytest.raises(TrainingError, match="epochs is 1, but the run began with 200"):
        finetune(base, rows_file, output, resume=True, **{**options, "epochs": 1})
    assert not (output / ".lock").exists()


def test_a_run_is_resumed_only_as_it_was(base: Path, tmp_path: Path, rows_file: Path) -> None:
    output = tmp_path / "run"
    options = {**OPTIONS, "backend": "keras", "epochs": 50}
    process = start(base, output, rows_file, **options)
    wait_for_step(output, 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = (output / "run.json").read_bytes()
    for change, message in (
        ({"learning_rate": 1e-4}, "learning_rate is 0.0001, but the run began with 0.002"),
        ({"backend": "mlx"}, "the backend has changed"),
    ):
        with pytest.raises(TrainingError, match=message):
            finetune(base, rows_file, output=output, resume=True, **{**options, **change})
    with rows_file.open("a") as file:
        file.write(json.dumps({"prompt": "one", "completion": "more"}) + "\n")
    with pytest.raises(TrainingError, match="the training data has changed"):
        finetune(base, rows_file, output=output, resume=True, **options)
    assert (output / "run.json").read_bytes() == kept
    assert (output / "state.safetensors").exists()
    with pytest.raises(TrainingError, match="no run to resume there"):
        finetune(base, rows_file, output=tmp_path / "absent", resume=True, **options)


def test_a_loss_that_is_no_number_names_the_step_and_the_rows(
    base: Path, tmp_path: Path, rows_file: Path, trainer_backend: str
) -> None:
    """A layer whose products overflow float32."""
    wild = gemma_multi.open_checkpoint(base)
    tensors = dict(wild.tensors)
    name = "model.layers.3.mlp.down_proj.weight"
    tensors[name] = np.full(tensors[name].shape, 3e38, np.float32)
    wild = wild.replace(tensors=tensors)
    with pytest.raises(TrainingError, match=r"(loss|norm) is (nan|inf) at step 1") as caught:
        finetune(wild, rows_file, output=tmp_path / "run", backend=trainer_backend,
                 validation=0, **{**OPTIONS, "qat": False})  # fmt: skip
    assert "rows.jsonl:" in str(caught.value)
    assert "lower learning rate" in str(caught.value)
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(TrainingError, match="the validation loss is nan after step 0"):
        finetune(wild, rows_file, output=tmp_path / "other", backend=trainer_backend,
                 **{**OPTIONS, "qat": False})  # fmt: skip


def test_a_run_killed_while_it_read_its_data_can_begin(base: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / ".rows").mkdir(parents=True)
    (tmp_path / "run" / ".rows" / "training.i32").write_bytes(b"half")
    assert tuned(base, tmp_path / "run", resume=True).path().exists()


def test_a_full_disk_leaves_the_last_state(base: Path, tmp_path: Path, rows_file: Path) -> None:
    """Files may not grow past a limit that the second state, now longer, does not fit."""
    output = tmp_path / "run"
    options = {**OPTIONS, "backend": "keras", "epochs": 40}
    process = start(base, output, rows_file, **options)
    wait_for_step(output, 2, process)
    limit = (output / "state.safetensors").stat().st_size // 2
    before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert before[0] == resource.RLIM_INFINITY
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "cannot be saved" in said
    assert "is kept in" in said
    assert not list(output.glob(".state*"))
    ended = finetune(base, rows_file, output=output, resume=True, **options)
    assert ended.path().exists()
