"""LiteRT's GPU delegate, on a Vulkan in software: what Chromium brings, where there is no GPU.

A delegate that fails may end the process, so everything runs in one of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from graph_in_numpy import Graph
from software_gpu import logits_on_gpu, python
from tiny import loud_checkpoint, tiny_checkpoint

import gemma_multi
from gemma_multi.errors import BackendError, OptionError

PROMPT = "Tell me a bedtime story.\nHero: Pip the hedgehog\nSetting: an old lighthouse by the sea"
_TELL = """
import json, sys, gemma_multi
told = []
for source in sys.argv[2:]:
    model = gemma_multi.load(source, backend="litert", device="gpu", context_length=None)
    chat = model.chat()
    texts = (sys.argv[1], "And then?")
    said = [chat.send(text, temperature=0, max_tokens=24).text for text in texts]
    told.append([model.engine.device, model.engine.runtime.whole_on_gpu, *said])
print(json.dumps(told))
"""

_IN_LITERT_LM = """
import sys, litert_lm
litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
litert_lm.Engine(sys.argv[1], litert_lm.Backend.GPU())
"""

_SCORED_IN_LITERT_LM = """
import json, sys, litert_lm
litert_lm.set_min_log_severity(litert_lm.LogSeverity.FATAL)
def scores(backend, times):
    with litert_lm.Engine(sys.argv[1], backend) as engine:
        for _ in range(times):
            with engine.create_session(apply_prompt_template=False) as session:
                session.run_prefill([sys.argv[2]])
                yield session.run_text_scoring([sys.argv[3]]).scores[0]
print(json.dumps([*scores(litert_lm.Backend.CPU(), 1), *scores(litert_lm.Backend.GPU(), 4)]))
"""


def test_it_says_what_keras_says(software_gpu: dict[str, str], tmp_path: Path) -> None:
    """In two turns, so that what prefill wrote is read; from a checkpoint and from its file, and
    nothing of the delegate's talk on the terminal."""
    file = tmp_path / "story.tflite"
    gemma_multi.export("storyteller", file, target="gpu", context_length=256)
    done = python(software_gpu, "-c", _TELL, PROMPT, "storyteller", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    chat = gemma_multi.load("storyteller", backend="keras").chat()
    expected = [chat.send(t, temperature=0, max_tokens=24).text for t in (PROMPT, "And then?")]
    assert told == [["gpu", True, *expected]] * 2
    assert "delegate" not in done.stderr
    assert "Dawn" not in done.stderr


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_its_logits_are_numpys(
    software_gpu: dict[str, str], tmp_path: Path, precision: str
) -> None:
    """Over more positions than the window; on CPUs int8 weights round activations, too."""
    file = tmp_path / "story.tflite"
    gemma_multi.export("storyteller", file, target="gpu", precision=precision, context_length=256)
    ids = np.random.default_rng(0).integers(3, 4000, 144)
    theirs = logits_on_gpu(software_gpu, file, ids, tmp_path)
    np.testing.assert_allclose(theirs, Graph(file).read(ids), rtol=0, atol=1e-3)


def test_a_vocabulary_beyond_a_texture(software_gpu: dict[str, str], tmp_path: Path) -> None:
    """Gemma's is: four words to a column, of which GPUs have 8,192 to 32,768. The delegate makes
    zeros of a file that does not mind."""
    wide = tiny_checkpoint(vocab_size=40_000)
    for target in ("cpu", "gpu"):
        gemma_multi.export(wide, tmp_path / f"{target}.tflite", target=target, context_length=32)
    ids = np.arange(2, 34)
    theirs = logits_on_gpu(software_gpu, tmp_path / "gpu.tflite", ids, tmp_path)
    expected = Graph(tmp_path / "gpu.tflite").read(ids)
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-4)
    done = python(
        software_gpu, "-m", "gemma_multi", "generate", "hi", "-m", str(tmp_path / "cpu.tflite"),
        "-b", "litert", "--device", "gpu", "--enforce-f32",
    )  # fmt: skip
    assert done.returncode == 2
    assert "this GPU does not hold what the file asks for (Texture size" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("precision", ["int4", "float32"])
def test_a_bundle_for_cpus_is_refused_on_a_gpu(
    software_gpu: dict[str, str], tmp_path: Path, precision: str
) -> None:
    """By LiteRT-LM, which would answer with nonsense (int4) or end the process (float32)."""
    file = tmp_path / "story.litertlm"
    gemma_multi.export("storyteller", file, precision=precision, context_length=256)
    done = python(software_gpu, "-c", _IN_LITERT_LM, str(file))
    assert done.returncode == 1
    assert "Model requires one of [cpu] but Main backend is GPU" in done.stderr


def test_litert_lm_reads_a_prompt_in_parts_on_a_gpu(
    software_gpu: dict[str, str], tmp_path: Path
) -> None:
    """A sentence is as likely after it as on the CPU, where activations are rounded to int8, in
    conversation after conversation. Read in 16s alone, it is not."""
    file = tmp_path / "story.litertlm"
    gemma_multi.export("storyteller", file, target="gpu", context_length=256)
    asked = f"{PROMPT}\nTwist: the monster was a hungry kitten\nTheme: courage\nLength: medium. "
    asked += "Tell it slowly, and with many small details."
    prompt = f"<start_of_turn>user\n{asked}<end_of_turn>\n<start_of_turn>model\n"
    told = "In an old lighthouse by the sea there once lived a sleepy hedgehog called Pip."
    done = python(software_gpu, "-c", _SCORED_IN_LITERT_LM, str(file), prompt, told)
    assert done.returncode == 0, done.stderr[-2000:]
    on_cpu, *on_gpu = json.loads(done.stdout.splitlines()[-1])  # the engine talks before
    np.testing.assert_allclose(on_gpu, [on_cpu] * 4, rtol=0, atol=0.2)
    assert max(on_gpu) - min(on_gpu) < 1e-3


def test_a_bundle_for_gpus_holds_no_float32(tmp_path: Path) -> None:
    file = tmp_path / "story.litertlm"
    with pytest.raises(OptionError, match="would hold float32, on which LiteRT-LM ends"):
        gemma_multi.export("storyteller", file, target="gpu", precision="float32")
    assert not file.exists()


@pytest.mark.slow
def test_the_suite_passes_on_the_gpu(software_gpu: dict[str, str]) -> None:
    here = Path(__file__).parent
    done = python(
        {**software_gpu, "GEMMA_MULTI_TEST_GPU": "1"}, "-m", "pytest", "-p", "no:xdist",
        "-k", "litert-float32", str(here / "test_conformance.py"),
        str(here / "test_conformance_of_many.py"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_parity_with_it(software_gpu: dict[str, str], tmp_path: Path) -> None:
    """Past the window. A GPU may compute in float16, so that is the row of the tolerances."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time. " * 20 + "\nThe end\n")
    done = python(
        software_gpu, "-m", "gemma_multi", "parity", "--backends", "keras,litert:gpu",
        "--precision", "float32", "--prompts", str(prompts), "--max-tokens", "16", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["passed"]


def test_parity_on_it_needs_weights_that_it_holds() -> None:
    with pytest.raises(OptionError, match=r"holds int4 weights as int8 rows.*litert:gpu:float32"):
        gemma_multi.parity("storyteller", ["keras", "litert:gpu"], progress=False)


def test_doctor_names_it(software_gpu: dict[str, str]) -> None:
    hidden = {**software_gpu, "VK_DRIVER_FILES": "/nowhere.json"}
    with_one, without = (
        json.loads(python(e, "-m", "gemma_multi", "doctor", "--json").stdout)["backends"]["litert"][
            "gpu"
        ]
        for e in (software_gpu, hidden)
    )
    assert "SwiftShader" in with_one
    assert with_one.endswith("Vulkan, in software")
    assert without.startswith("none: LiteRT finds no GPU here")


def test_without_a_gpu_it_says_so(software_gpu: dict[str, str]) -> None:
    hidden = {**software_gpu, "VK_DRIVER_FILES": "/nowhere.json"}
    command = ["-m", "gemma_multi", "generate", "hi", "-b", "litert", "--device", "gpu"]
    done = python(hidden, *command)
    assert done.returncode == 2
    assert "LiteRT finds no GPU here" in done.stderr
    assert "use device='cpu'" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_would_end_the_process_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "int4.tflite"
    gemma_multi.export("storyteller", file, context_length=256)
    with pytest.raises(BackendError, match=r"int4 in blocks.*export the model again with target"):
        gemma_multi.load(file, backend="litert", device="gpu")
    with pytest.raises(OptionError, match="'int4' is not for target 'gpu'"):
        gemma_multi.export("storyteller", tmp_path / "x.tflite", target="gpu", precision="int4")


def test_a_stream_beyond_float16_is_refused_or_scaled(tmp_path: Path) -> None:
    loud = loud_checkpoint()
    gemma_multi.export(loud, tmp_path / "cpu.tflite", precision="int8", context_length=64)
    gemma_multi.export(loud, tmp_path / "gpu.tflite", precision="int8", context_length=64,
                       target="gpu")  # fmt: skip
    with pytest.raises(BackendError, match=r"does not hold; export .* or load it with enforce_f32"):
        gemma_multi.load(tmp_path / "cpu.tflite", backend="litert", device="gpu")
    assert gemma_multi.open_checkpoint(tmp_path / "gpu.tflite").config.residual_scale < 1


def test_int4_becomes_int8_rows_for_gpus(tmp_path: Path) -> None:
    report = gemma_multi.export(
        "storyteller", tmp_path / "x.tflite", target="gpu", context_length=256
    )
    assert report.precision == "int8"
    assert {error.bits for error in report.refitted} == {8}
    assert 0 < max(error.error for error in report.refitted) < 0.02
    assert gemma_multi.load(tmp_path / "x.tflite", backend="litert").generate(PROMPT).text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "npu"}, "device is 'npu', expected cpu or gpu"),
        ({"enforce_f32": True}, "enforce_f32 is for device 'gpu'"),
    ],
)
def test_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        gemma_multi.load("storyteller", backend="litert", **options)
