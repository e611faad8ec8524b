"""What is installed: light imports, a complete wheel, a bundled model of the promised size."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from needs import missing

import gemma_multi
from gemma_multi.sources import BUNDLED

FRAMEWORKS = ("mlx", "keras", "keras_hub", "jax", "tensorflow", "torch", "transformers")
ROOT = Path(__file__).parents[1]


def loaded_after(script: str) -> set[str]:
    code = f"import sys\n{script}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_no_framework() -> None:
    loaded = loaded_after("import gemma_multi; gemma_multi.load; gemma_multi.Checkpoint")
    assert not loaded & set(FRAMEWORKS)
    assert not {"numpy", "rich", "click"} & loaded_after("import gemma_multi")


@pytest.mark.parametrize(
    ("backend", "others"),
    [("mlx", ("keras", "jax", "tensorflow", "torch", "transformers")),
     ("keras", ("mlx", "tensorflow", "torch", "transformers")),
     ("litert", ("mlx", "keras", "jax", "tensorflow", "torch", "transformers"))],
)  # fmt: skip
def test_a_backend_imports_no_other_framework(backend: str, others: tuple[str, ...]) -> None:
    run = f"import gemma_multi; gemma_multi.load(backend={backend!r}).generate('hi', max_tokens=2)"
    assert not loaded_after(run) & set(others)


def test_the_light_imports_leave_the_real_packages_whole() -> None:
    script = (
        "import gemma_multi\n"
        "for b in ('mlx', 'keras'): gemma_multi.load(backend=b).generate('hi', max_tokens=2)\n"
        "import mlx_lm, mlx_lm.models.cache, keras_hub, tensorflow\n"
        "assert mlx_lm.models.cache.KVCache and mlx_lm.load and tensorflow.constant(1) == 1\n"
        # keras-hub was given a stand-in for TensorFlow; its tokenizers need the real one
        "from keras_hub.src.utils.tensor_utils import tf\n"
        "assert tf.strings.lower('A') == b'a'\n"
    )
    loaded_after(script)


def test_public_names_are_there_and_documented() -> None:
    for name in gemma_multi.__all__:
        assert getattr(gemma_multi, name).__doc__, name
    assert set(gemma_multi.__all__) <= set(dir(gemma_multi))
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = gemma_multi.absent


def test_the_wheel_carries_the_model_the_types_and_the_exporters(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path),
         str(ROOT)],
        check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("gemma_multi-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "gemma_multi/py.typed",
        "gemma_multi/comparison/prompts.jsonl",
        "gemma_multi/evaluation/instructions.jsonl",
        "gemma_multi/exporters/__init__.py",
        "gemma_multi/models/storyteller/model.safetensors",
        "gemma_multi/models/storyteller/tokenizer.model",
        "gemma_multi/models/storyteller/NOTICE",
    } <= names
    packaged = {n for n in names if n.endswith(".py")}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "gemma_multi").rglob("*.py")}
    sources |= {f"gemma_multi/{p.relative_to(ROOT)}" for p in (ROOT / "exporters").rglob("*.py")}
    assert packaged == sources
    assert not any(name.startswith(("tests", "benchmarks", "exporters/")) for name in names)
    (entries,) = (n for n in names if n.endswith("entry_points.txt"))
    assert "[pytest11]" in zipfile.ZipFile(wheel).read(entries).decode()


def test_the_source_package_has_all_that_the_repository_has(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        missing("this is no clone: git does not say what belongs to it")
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert set(listed.stdout.splitlines()) <= packed


def test_the_bundled_model_is_what_was_promised() -> None:
    directory = BUNDLED["storyteller"]
    assert sum(p.stat().st_size for p in directory.iterdir()) <= 6_000_000
    checkpoint = gemma_multi.open_checkpoint(directory)
    config = checkpoint.config
    assert (checkpoint.precision, checkpoint.grid) == ("int4", "portable")
    assert config.num_hidden_layers >= 8
    globals_ = [i for i in range(config.num_hidden_layers) if not config.is_sliding(i)]
    assert max(globals_) < config.num_hidden_layers - 1  # a local layer follows a global one
    assert round(config.hidden_size**0.5) ** 2 != config.hidden_size
    assert 4096 <= checkpoint.tokenizer.vocab_size <= 8192
    assert checkpoint.provenance.license == "apache-2.0"
    assert "Apache License" in (directory / "NOTICE").read_text()


def test_no_two_classes_share_a_name() -> None:
    """A name means one thing, wherever it is read."""
    root, where = Path(__file__).parents[1], {}
    for file in (*(root / "gemma_multi").rglob("*.py"), *(root / "exporters").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(str(file.relative_to(root)))
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


def test_no_two_files_of_tests_share_a_name() -> None:
    """Which pytest would say only where both are collected in one run."""
    files = (
        f for f in (ROOT / "tests").rglob("*.py") if f.name not in ("__init__.py", "conftest.py")
    )
    alone = [f.name for f in files if not (f.parent / "__init__.py").exists()]
    assert sorted(set(alone)) == sorted(alone)
