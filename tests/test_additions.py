"""How little it takes to add something: a throwaway format, backend and option, found by itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FORMAT = """
from pathlib import Path
import numpy as np
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.formats import Format, formats

def read(path):
    return formats()["huggingface"].read(Path(path.read_text()))

FORMAT = Format(name="pointer", what="a .pointer file", suffix=".pointer", read=read,
                looks_like=lambda path: path.suffix == ".pointer" and path.is_file())
"""
EXPORTER = """
from dataclasses import dataclass
from pathlib import Path
from gemma_multi.exporters import save
from gemma_multi.exporters.base import Exporter, ExportReport
from gemma_multi.options import option

@dataclass(frozen=True)
class Options:
    beside: str = option("beside", "The directory's name.")

def write(checkpoint, output, options, progress):
    save(checkpoint, output.with_name(options.beside))
    output.write_text(str(output.with_name(options.beside)))
    return ExportReport(output, output.stat().st_size, "pointer", checkpoint.precision, 1)

EXPORTER = Exporter(format="pointer", options=Options, write=write)
"""
BACKEND = """
from dataclasses import dataclass
from gemma_multi.engines import mlx
from gemma_multi.engines.backend import Backend
from gemma_multi.engines.precision import prepare
from gemma_multi.options import option

@dataclass(frozen=True)
class Options:
    colour: str = option("red", "Of nothing at all.")

class Engine(mlx.MlxEngine):
    name = "throwaway"

def create(checkpoint, request):
    import mlx.core as mx
    engine = Engine(mx, prepare(checkpoint, request, "float32"))
    engine.device = request.options.colour
    return engine

BACKEND = Backend(
    name="throwaway", title="Throwaway", order=5, create=create, modules=lambda: ("mlx.core",),
    packages=("mlx",), install="pip install mlx", precisions=("float32",), options=Options,
    suits=lambda quantized: 1,
)
"""
SETUP = """
import sys, gemma_multi.formats, gemma_multi.exporters, gemma_multi.engines
for package in (gemma_multi.formats, gemma_multi.exporters, gemma_multi.engines):
    package.__path__.append(f"{sys.argv[1]}/{package.__name__.split('.')[-1]}")
sys.path.insert(0, sys.argv[2])
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str], str]:
    """Runs code in a process whose gemma_multi has three files more."""
    for folder, name, text in (("formats", "pointer", FORMAT), ("exporters", "pointer", EXPORTER),
                               ("engines", "throwaway", BACKEND)):  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.py").write_text(text)

    def run(code: str) -> str:
        command = [sys.executable, "-c", SETUP + code, str(tmp_path), str(Path(__file__).parent)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


def test_a_format_is_two_files(run) -> None:
    shown = run("""
import gemma_multi
from tiny import tiny_checkpoint
checkpoint = tiny_checkpoint()
gemma_multi.export(checkpoint, "m.pointer", beside="there")
print(gemma_multi.open_checkpoint("m.pointer") == checkpoint)
try:
    gemma_multi.export(checkpoint, "other.pointer", color="red")
except gemma_multi.OptionError as error:
    print(error)
from gemma_multi.cli import cli
cli.main(["export", "--help"], standalone_mode=False)
""")
    assert shown.startswith("True")
    assert "format 'pointer' takes no option 'color'; expected one of beside" in shown
    assert "--beside" in shown
    assert "pointer: The directory's" in shown


def test_a_backend_is_one_file_and_so_is_an_option(run) -> None:
    shown = run("""
import gemma_multi
from tiny import tiny_checkpoint
model = gemma_multi.load(tiny_checkpoint(), backend="throwaway", colour="blue")
print(model.engine.name, model.engine.device)
found = gemma_multi.parity(tiny_checkpoint(vocab_size=4096), ["mlx", "throwaway"], prompts=["hi"],
                     max_tokens=2)
print(found.passed)
from gemma_multi.diagnosis import diagnose
print([d.backend for d in diagnose()])
from gemma_multi.cli import cli
cli.main(["generate", "--help"], standalone_mode=False)
""")
    lines = shown.splitlines()
    assert lines[:2] == ["throwaway blue", "True"]
    assert "'throwaway'" in lines[2]
    assert "--colour" in shown
    assert "Throwaway: Of nothing at all." in shown
