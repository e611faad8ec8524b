"""ONNX directories in Transformers.js: in Node, and in a real browser, offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from browser import WEBGPU, in_a_browser
from needs import missing
from other_peoples_files import transformers_js
from reading import assert_same_but_for_ties

import gemma_multi
from gemma_multi import Model
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.sources import open_checkpoint
from gemma_multi.transforms import quantize_checkpoint, to_precision

HERE = Path(__file__).parent
PROMPTS = [
    "Tell me a bedtime story.\nHero: Pip the hedgehog\nSetting: an old lighthouse by the sea",
    "Tell me a bedtime story.\nHero: Luna the owl",
]
COUNT = 24
_NODE = 18  # the oldest that it runs in
_TIE = 0.5  # logits; rounding activations to int8 moves the storyteller's by 0.25


def int8() -> Checkpoint:
    return quantize_checkpoint(to_precision(open_checkpoint("storyteller"), "float32"), 8, 8)[0]


@cache
def keras() -> Model:
    return gemma_multi.load("storyteller", backend="keras", precision="float32")


@cache
def answers() -> list[str]:
    """What Keras says in float32."""
    return [keras().chat().send(p, temperature=0, max_tokens=COUNT).text for p in PROMPTS]


def assert_said(told: list[str], exactly: bool = True) -> None:
    """Keras' answers to the first prompts, or as good ones at every token: rounded activations
    may decide a near tie otherwise."""
    assert all(len(text) > 10 for text in told)
    if exactly:
        assert told == answers()[: len(told)]
        return
    for prompt, text in zip(PROMPTS, told, strict=False):
        turns = [{"role": "user", "content": prompt}]
        assert_same_but_for_ties(keras(), keras().encode(turns), text, _TIE, stopped=False)


def in_node(folder: Path, model: str) -> dict[str, Any]:
    node = shutil.which("node")
    if node is None:
        missing("no Node.js on the PATH (Debian: apt-get install nodejs; macOS: brew install node)")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.lstrip("v").split(".")[0]) < _NODE:
        missing(f"Node.js is {version.strip()}, Transformers.js needs {_NODE} or newer")
    shutil.copy(HERE / "transformers_js.mjs", folder)
    (folder / "node_modules").symlink_to(transformers_js())
    job = {"folder": f"{folder}/", "model": model, "prompts": PROMPTS, "count": COUNT}
    done = subprocess.run(
        [node, str(folder / "transformers_js.mjs"), json.dumps(job)], cwd=folder, timeout=240,
        env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "options",
    [{}, {"activations": "float32"}, {"activations": "float16"}, {"precision": "float32"},
     {"precision": "float16"}],
    ids=["q4", "q4 exactly", "q4f16", "fp32", "fp16"],
)  # fmt: skip
def test_node_gives_the_same_text(options: dict[str, str], tmp_path: Path) -> None:
    """With no word on the dtype, alone and in a batch of rows of unequal length."""
    gemma_multi.export("storyteller", tmp_path / "model", format="onnx", **options)
    told = in_node(tmp_path, "model")
    for texts in (told["alone"], told["together"]):
        assert len(texts) == len(PROMPTS)
        assert_said(texts, exactly=bool(options))


@pytest.mark.parametrize(
    ("make", "plain"),
    [(lambda: open_checkpoint("storyteller"), True), (int8, False)],
    ids=["int4 in the plain build", "int8 in the default build"],
)
def test_a_browser_gives_the_same_text(make: Any, plain: bool, tmp_path: Path) -> None:
    gemma_multi.export(make(), tmp_path / "model", format="onnx")
    told = ask_in_a_browser(tmp_path, {"plain": plain})
    assert_said([told["text"]], exactly=not plain)


@pytest.mark.slow
def test_webgpu_gives_the_same_text(tmp_path: Path) -> None:
    """In the default build, whose operators for GPUs have all that int4 asks for."""
    gemma_multi.export("storyteller", tmp_path / "model", format="onnx")
    told = ask_in_a_browser(tmp_path, {"plain": False, "device": "webgpu", "count": 8}, *WEBGPU)
    assert_said([told["text"]], exactly=False)


def ask_in_a_browser(folder: Path, job: dict[str, Any], *flags: str) -> dict[str, Any]:
    (folder / "node_modules").symlink_to(transformers_js())
    whole = {"prompt": PROMPTS[0], "count": COUNT, **job}
    return in_a_browser(folder, HERE / "transformers_js.html", whole, *flags)
