"""One public grammar: every verb takes a model, its source, progress and an output alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi import Checkpoint, CheckpointError, OptionError
from gemma_multi.checkpoint import Adapter, Tensors
from gemma_multi.cli import cli
from gemma_multi.engines import backends, create_engine
from gemma_multi.exporters import exporters, save
from gemma_multi.formats import formats

VERBS = {
    "load": gemma_multi.load, "quantize": gemma_multi.quantize, "export": gemma_multi.export,
    "finetune": gemma_multi.finetune, "parity": gemma_multi.parity,
    "validation_loss": gemma_multi.validation_loss, "open_checkpoint": gemma_multi.open_checkpoint,
}  # fmt: skip
COMMANDS = [
    "quantize",
    "export",
    "finetune",
    "parity",
    "info",
    "merge",
    "generate",
    "chat",
    "data check",
]
ROWS = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(12)]


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_every_verb_has_the_same_words(verb: Callable[..., Any]) -> None:
    parameters = inspect.signature(verb).parameters
    assert next(iter(parameters)) == "model"
    for name, default in (("revision", None), ("local_files_only", False), ("progress", True)):
        assert parameters[name].default is default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert not {"src", "dst", "path", "target"} & set(parameters)


@pytest.mark.parametrize("name", ["quantize", "export", "finetune", "merge"])
def test_commands_that_write_take_an_output(name: str) -> None:
    options = {option for p in cli.commands[name].params for option in p.opts}
    assert {"-o", "--output", "--revision", "--local-files-only", "--progress"} <= options


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_that_take_a_model_take_where_it_comes_from(name: str) -> None:
    command: Any = cli
    for word in name.split():
        command = command.commands[word]
    options = {option for p in command.params for option in p.opts}
    assert {"--revision", "--local-files-only", "--progress"} <= options


@pytest.mark.parametrize("kind", ["name", "path", "checkpoint", "model"])
def test_a_model_may_be_a_name_a_path_a_checkpoint_or_a_model(kind: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(vocab_size=4096)
    path = save(checkpoint, tmp_path / "model")
    given: Any = {
        "name": str(path), "path": path, "checkpoint": checkpoint,
        "model": gemma_multi.load(checkpoint, backend="mlx"),
    }[kind]  # fmt: skip
    quiet = {"progress": False}
    assert gemma_multi.open_checkpoint(given).digest() == checkpoint.digest()
    assert gemma_multi.load(given, backend="mlx", **quiet).config == checkpoint.config
    assert gemma_multi.quantize(given, tmp_path / "int4", calibrate=None, **quiet).nbytes
    assert gemma_multi.export(given, tmp_path / "m.tflite", **quiet).nbytes
    assert gemma_multi.validation_loss(given, ROWS, **quiet).tokens
    prompts, backends = ["Good night."], ["mlx", "keras"]
    assert gemma_multi.parity(given, backends, prompts=prompts, max_tokens=2, **quiet).passed
    tuned = gemma_multi.finetune(given, ROWS, tmp_path / "tuned", epochs=1, backend="mlx", **quiet)
    assert tuned.model.generate("1?", max_tokens=1)


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_what_is_loaded_has_no_revision(verb: Callable[..., Any], tmp_path: Path) -> None:
    needed = {"output": tmp_path / "out.tflite", "data": ROWS, "backends": ["mlx", "keras"]}
    given = {n: v for n, v in needed.items() if n in inspect.signature(verb).parameters}
    with pytest.raises(OptionError, match="loaded already and has no revisions"):
        verb(tiny_checkpoint(), revision="main", **given)
    with pytest.raises(CheckpointError, match="expected a directory, a Hugging Face id"):
        verb(7, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", [n for n in VERBS if n != "open_checkpoint"])
def test_progress_is_a_function_of_done_and_total(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_MULTI_CACHE", str(tmp_path / "cache"))
    seen: list[tuple[int, int]] = []
    given: dict[str, Any] = {
        "load": {"backend": "litert", "precision": "int4"},
        "quantize": {"output": tmp_path / "q"},
        "export": {"output": tmp_path / "m.tflite", "precision": "int4"},
        "finetune": {"output": tmp_path / "f", "data": ROWS, "epochs": 1, "backend": "mlx"},
        "parity": {"backends": ["mlx", "keras"], "prompts": ["hi"], "max_tokens": 1},
        "validation_loss": {"data": ROWS},
    }[verb]
    checkpoint = tiny_checkpoint(vocab_size=4096)
    VERBS[verb](checkpoint, progress=lambda *p: seen.append(p), **given)
    assert seen
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]
    if "output" in given:
        given["output"] = given["output"].with_stem("again")
    with pytest.raises(OptionError, match="progress is 'bar', expected True, False, or a function"):
        VERBS[verb](checkpoint, progress="bar", **given)


def test_quantize_with_recover_passes_progress_on(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    gemma_multi.quantize(
        tiny_checkpoint(vocab_size=4096), tmp_path / "q", recover=ROWS, epochs=1, backend="mlx",
        progress=lambda *p: seen.append(p),
    )  # fmt: skip
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_bad_output_is_refused_before_a_model_is_looked_for(tmp_path: Path) -> None:
    """An hour of downloading should not end there."""
    (tmp_path / "used").write_text("mine")
    absent = "nobody/nothing"
    for verb, output, message in (
        (gemma_multi.quantize, tmp_path / "used", "exists already"),
        (gemma_multi.export, tmp_path / "used", "must end in"),
        (gemma_multi.export, tmp_path / "used" / "m.tflite", "cannot be written"),
    ):
        with pytest.raises((OptionError, CheckpointError), match=message):
            verb(absent, output, local_files_only=True)
    with pytest.raises(OptionError, match="exists already"):
        cli.main(["merge", absent, "x", "-o", str(tmp_path / "used")], standalone_mode=False)
    (tmp_path / "m.tflite").write_text("mine")
    for command in (["quantize", absent, "-o", str(tmp_path / "used")],
                    ["export", absent, "-o", str(tmp_path / "m.tflite")]):  # fmt: skip
        with pytest.raises(OptionError, match="exists already"):
            cli.main(command, standalone_mode=False)


# formats, backends and options are found where they stand


@pytest.mark.parametrize(
    "name",
    [
        "gguf",
        "huggingface",
        "keras",
        "litertlm",
        "mlx",
        "onnx",
        "sbs",
        "tflite",
    ],
)
def test_a_format_is_a_pair(name: str) -> None:
    assert formats()[name].name == exporters()[name].format == name


@pytest.mark.parametrize(
    ("name", "precision"), [("huggingface", "auto"), ("huggingface", "bfloat16"), ("mlx", "int4"),
                            ("mlx", "int8"), ("mlx", "float32")],
)  # fmt: skip
def test_directories_are_outputs_as_files_are(name: str, precision: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    report = gemma_multi.export(checkpoint, tmp_path / "m", format=name, precision=precision)
    opened = gemma_multi.open_checkpoint(tmp_path / "m")
    expected = "float32" if precision == "auto" else precision
    assert opened.precision == report.precision == expected
    # a dense directory for mlx-lm is a Hugging Face one
    assert opened.format == ("huggingface" if expected not in ("int4", "int8") else "mlx")
    assert report.nbytes == sum(f.stat().st_size for f in (tmp_path / "m").iterdir())
    assert sum(opened.provenance.notice().count(how) for how in ("quantised", "converted")) <= 1


def test_an_int4_model_is_no_hugging_face_directory_unless_made_dense(tmp_path: Path) -> None:
    int4 = gemma_multi.open_checkpoint("storyteller")
    with pytest.raises(CheckpointError, match="give format='mlx', or precision='float32'"):
        gemma_multi.export(int4, tmp_path / "m", format="huggingface")
    assert not list(tmp_path.iterdir())
    gemma_multi.export(int4, tmp_path / "m", format="huggingface", precision="float32")
    dense = gemma_multi.open_checkpoint(tmp_path / "m")
    for name in int4.tensors:
        np.testing.assert_array_equal(dense.weight(name), int4.weight(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"format": "gguf2"}, "format is 'gguf2', expected one of gguf, huggingface, jax, keras, "
      "litertlm, mlx, onnx, sbs, tflite"),
     ({"format": "mlx", "cache": "int8"}, "format 'mlx' takes no option 'cache'; expected one of"),
     ({"format": "mlx", "precision": "int3"}, "unknown precision 'int3'")],
)  # fmt: skip
def test_options_of_another_format_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        gemma_multi.export(tiny_checkpoint(), tmp_path / "m", **options)
    assert not list(tmp_path.iterdir())


def test_backends_say_what_they_are() -> None:
    known = backends()
    assert list(known) == ["mlx", "keras", "litert", "transformers"]
    assert [n for n, one in known.items() if one.is_reference] == ["transformers"]
    assert {n for n, one in known.items() if one.trains} == {"mlx", "keras"}
    for name, one in known.items():
        assert one.name == name
        assert one.install.startswith("pip install")
        assert one.suits(True) <= 9


def test_a_bug_of_ours_stays_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a framework's own failure is called one."""
    from gemma_multi.engines import mlx

    for error, expected in (
        (KeyError("typo"), KeyError), (TypeError("bug"), TypeError),
        (NotImplementedError("not yet"), NotImplementedError), (ValueError("bug"), ValueError),
        (RuntimeError("no device"), gemma_multi.BackendError),
        (MemoryError("full"), gemma_multi.BackendError),
    ):  # fmt: skip

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(mlx, "build_model", fail)
        with pytest.raises(expected):
            create_engine(tiny_checkpoint(), "mlx", "float32")


# values


def test_checkpoints_and_tensors_are_equal_when_they_say_the_same(tmp_path: Path) -> None:
    one = tiny_checkpoint()
    assert one == tiny_checkpoint()
    assert one != tiny_checkpoint(seed=1)
    assert one != one.replace(config=one.config.replace(rope_theta=5.0))
    assert one != one.replace(make_tokenizer=None)
    assert one != "a checkpoint"
    assert gemma_multi.open_checkpoint(save(one, tmp_path / "m")) == one
    int4 = gemma_multi.open_checkpoint("storyteller")
    name = "model.layers.0.mlp.up_proj.weight"
    assert int4.tensors[name] == gemma_multi.open_checkpoint("storyteller").tensors[name]
    assert int4.tensors[name] != int4.tensors["model.layers.1.mlp.up_proj.weight"]
    assert int4.tensors[name] != int4.weight(name).tolist()
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_what_a_file_holds_is_known_without_reading_its_tensors(tmp_path: Path) -> None:
    gemma_multi.export("storyteller", tmp_path / "m.litertlm")
    opened = gemma_multi.open_checkpoint(tmp_path / "m.litertlm")
    read: list[str] = []
    original = opened.tensors._read
    opened.tensors._read = lambda name: read.append(name) or original(name)  # type: ignore[method-assign, func-returns-value]
    facts = (opened.precision, opened.grid, opened.nbytes, opened.is_quantized, opened.identity)
    assert not read
    made = {name: opened.tensors[name] for name in opened.tensors}
    assert facts[:4] == ("int4", "portable", sum(t.nbytes for t in made.values()), True)
    for name, info in opened.tensors.infos.items():
        assert info.shape == made[name].shape
    assert Tensors.of(made) == opened.tensors


def test_a_merged_adapter_is_rounded_once_everywhere(tmp_path: Path) -> None:
    """On a bfloat16 base with int4 asked for, every backend and every file hold the same codes."""
    from training.test_adapters import random_adapter

    from gemma_multi.exporters.peft import save_adapter
    from gemma_multi.transforms import to_precision

    dense = tiny_checkpoint(vocab_size=4096)
    base = to_precision(dense.replace(config=dense.config.replace(dtype="bfloat16")), "bfloat16")
    adapter = random_adapter(3)
    path = save_adapter(adapter, tmp_path / "adapter")
    name = next(iter(adapter.tensors))
    exact = base.weight(name).astype(np.float32) + adapter.change(name)
    from gemma_multi.quantization.tensor import quantize_tensor

    expected, _ = quantize_tensor(exact, 4)
    held = {}
    for backend in ("mlx", "keras", "litert"):
        model = gemma_multi.load(base, backend=backend, precision="int4", adapter=path)
        held[backend] = model.engine.weight(name)
    model.export(tmp_path / "m.tflite", precision="int4", context_length=64)
    held["file"] = gemma_multi.open_checkpoint(tmp_path / "m.tflite").weight(name)
    for where, values in held.items():
        different = int((values != expected.dequantize()).sum())
        assert not different, f"{where}: {different} of {values.size}"
    saved = gemma_multi.open_checkpoint(model.save(tmp_path / "saved"))
    assert saved.precision == "bfloat16"


@pytest.mark.parametrize("kind", ["huggingface", "mlx"])
@pytest.mark.parametrize("verb", ["method", "function"])
def test_a_model_with_an_adapter_is_exported_in_the_type_it_is_stored_in(
    kind: str, verb: str, tmp_path: Path
) -> None:
    from training.test_adapters import random_adapter

    from gemma_multi.transforms import to_precision

    model = gemma_multi.load(
        to_precision(tiny_checkpoint(vocab_size=4096), "bfloat16"), backend="mlx"
    )
    model.add_adapter("a", random_adapter(0))
    model.switch_adapter("a")
    if verb == "method":
        report = model.export(tmp_path / "m", format=kind)
    else:
        report = gemma_multi.export(model, tmp_path / "m", format=kind)
    opened = gemma_multi.open_checkpoint(tmp_path / "m")
    assert {info.dtype for info in opened.tensors.infos.values()} == {"bfloat16"}
    assert report.precision == "bfloat16"
    assert opened.digest() == gemma_multi.open_checkpoint(model.save(tmp_path / "s")).digest()


def test_an_adapter_in_memory_is_checked_as_one_on_disk() -> None:
    model = gemma_multi.load(tiny_checkpoint(vocab_size=4096), backend="mlx")
    name = "model.layers.0.mlp.up_proj.weight"
    for tensors in (
        {"model.layers.99.mlp.up_proj.weight": (np.ones((2, 96)), np.ones((128, 2)))},
        {name: (np.ones((1, 1)), np.ones((1, 1)))},
        {"model.norm.weight": (np.ones((2, 96)), np.ones((96, 2)))},
    ):
        with pytest.raises(CheckpointError, match="is it for another model"):
            model.add_adapter("a", Adapter(2, 4.0, tensors))
    assert not model.adapters


def test_an_adapters_directory_says_how_it_is_used(tmp_path: Path) -> None:
    """Beside its base's config.json, too."""
    (tmp_path / "adapter_config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"is a LoRA adapter, not a model.*--adapter"):
            gemma_multi.open_checkpoint(tmp_path)
        (tmp_path / "config.json").write_text("{}")


def test_every_command_says_what_an_option_means() -> None:
    def look(command: click.Command, name: str) -> None:
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (name, parameter.name)
        for sub_name, sub in getattr(command, "commands", {}).items():
            look(sub, f"{name} {sub_name}")

    look(cli, "gemma-multi")


def test_nothing_public_is_missing_or_left_over() -> None:
    for name in gemma_multi.__all__:
        assert getattr(gemma_multi, name) is not None
    assert isinstance(tiny_checkpoint(), Checkpoint)
    for old in ("Checkpoint.open", "Checkpoint.save", "Model.adapter"):
        owner, _, name = old.partition(".")
        assert not hasattr(getattr(gemma_multi, owner), name)
