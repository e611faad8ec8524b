"""ONNX directories: what onnxruntime computes from them, what is in them, what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from in_onnxruntime import Exported, exported
from nats import divergence
from tiny import loud_checkpoint, tiny_checkpoint, tokenizer

import gemma_multi
from gemma_multi import BackendError, Checkpoint, CheckpointError, OptionError
from gemma_multi.chat_template import encode_prompt
from gemma_multi.config import EMBEDDING
from gemma_multi.engines import ALL, create_engine
from gemma_multi.quantization.tensor import QuantizedTensor
from gemma_multi.sources import open_checkpoint
from gemma_multi.transforms import quantize_checkpoint

TEXT = "Once upon a time there was a lighthouse keeper who answered every letter. "
PROMPT = "Tell me a bedtime story.\nHero: Pip the hedgehog\nSetting: an old lighthouse by the sea"


def int4(**changes: object) -> Checkpoint:
    return quantize_checkpoint(tiny_checkpoint(**changes))[0]


def story(count: int) -> np.ndarray:
    return np.array([tokenizer().bos_id, *tokenizer().encode(TEXT * 20)])[:count]


def by_keras(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
    return create_engine(checkpoint, "keras", "float32").session().read(ids, ALL)


def exactly(source: str | Checkpoint, folder: Path, **options: Any) -> Exported:
    """Multiplied in float32, where int4 takes int8 by itself."""
    return exported(source, folder, activations="float32", **options)


@cache
def storytellers_logits() -> np.ndarray:
    return by_keras(open_checkpoint("storyteller"), story(150))


@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_the_storyteller_computes_what_keras_does(precision: str, tmp_path: Path) -> None:
    """At once, step by step and in parts, over more than twice its window of 64."""
    model, ids = exactly("storyteller", tmp_path / "x", precision=precision), story(150)
    expected, close = storytellers_logits(), {"rtol": 0, "atol": 2e-4}
    np.testing.assert_allclose(model.read(ids)[0][0], expected, **close)
    logits, past = model.read(ids[:100])
    np.testing.assert_allclose(logits[0], expected[:100], **close)
    for i in range(100, 120):
        logits, past = model.read(ids[i : i + 1], past)
        np.testing.assert_allclose(logits[0, 0], expected[i], **close)
    np.testing.assert_allclose(model.read(ids[120:], past)[0][0], expected[120:], **close)


@pytest.mark.parametrize(
    "make",
    [int4,
     lambda: quantize_checkpoint(tiny_checkpoint(), 4, embedding_bits=8)[0],
     lambda: quantize_checkpoint(tiny_checkpoint(), 8, embedding_bits=8)[0],
     lambda: int4(num_key_value_heads=2, hidden_size=160),
     lambda: tiny_checkpoint(rope_scaling_factor=8.0),
     lambda: int4().replace(config=int4().config.replace(residual_scale=2.0**-4))],
    ids=["int4", "int8 embedding", "int8", "grouped heads", "scaled positions", "residual scale"],
)  # fmt: skip
def test_weights_are_the_checkpoints(make: object, tmp_path: Path) -> None:
    checkpoint: Checkpoint = make()  # type: ignore[operator]
    ids = np.random.default_rng(0).integers(4, 320, 40)
    logits, _ = exactly(checkpoint, tmp_path / "x").read(ids)
    np.testing.assert_allclose(logits[0], by_keras(checkpoint, ids), rtol=0, atol=2e-4)


def test_codes_and_scales_are_the_checkpoints_bit_for_bit(tmp_path: Path) -> None:
    """Read with onnx alone, by the rules of MatMulNBits."""
    original = int4()
    model = onnx.load(exported(original, tmp_path / "x").file)
    onnx.shape_inference.infer_shapes(model, strict_mode=False)
    found = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulNBits") == 8 * 7 + 1
    assert kinds.count("GatherBlockQuantized") == 1
    assert kinds.count("GroupQueryAttention") == 8
    for name, tensor in original.tensors.items():
        if isinstance(tensor, QuantizedTensor):
            bytes_ = found[name].reshape(tensor.shape[0], -1)
            codes = np.stack([bytes_ & 15, bytes_ >> 4], -1).reshape(*tensor.shape[:1], -1, 32)
            scales = found[f"{name.removesuffix('.weight')}.scales"]
            values = (codes.astype(np.float32) - 8) * scales[..., None]
            np.testing.assert_array_equal(values.reshape(tensor.shape), tensor.dequantize())


def test_rows_padded_on_the_left(tmp_path: Path) -> None:
    """As Transformers.js pads a batch: every row as if it were alone, then step by step."""
    model, ids = exactly("storyteller", tmp_path / "x"), story(92)
    expected = storytellers_logits()
    batch, mask = np.zeros((2, 90), np.int64), np.zeros((2, 90), np.int64)
    for row, length in enumerate((90, 35)):
        batch[row, -length:], mask[row, -length:] = ids[:length], 1
    logits, past = model.read(batch, mask=mask)
    np.testing.assert_allclose(logits[0], expected[:90], rtol=0, atol=2e-4)
    np.testing.assert_allclose(logits[1, -35:], expected[:35], rtol=0, atol=2e-4)
    for step in range(2):
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        tokens = np.array([[ids[90 + step]], [ids[35 + step]]])
        logits, past = model.read(tokens, past, mask)
        np.testing.assert_allclose(logits[0, 0], expected[90 + step], rtol=0, atol=2e-4)
        np.testing.assert_allclose(logits[1, 0], expected[35 + step], rtol=0, atol=2e-4)


def test_angles_are_exact_at_every_position(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(max_position_embeddings=32768, rope_scaling_factor=8.0)
    model = onnx.load(exported(checkpoint, tmp_path / "x").file)
    attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    tables = {True: attention[0].input[7:9], False: attention[5].input[7:9]}
    for names in tables.values():
        for name in names:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    inputs = {
        i.name: np.zeros((1, 1, 0, 32), np.float32) if i.name.startswith("past_")
        else np.ones((1, 1) if i.shape else (), np.int64)
        for i in session.get_inputs()
    }  # fmt: skip
    for sliding, (theta, factor) in {True: (1e4, 1.0), False: (1e6, 8.0)}.items():
        angles = np.arange(32768)[:, None] * theta ** (-np.arange(16) / 16) / factor
        cos, sin = session.run(list(tables[sliding]), inputs)
        np.testing.assert_allclose(cos, np.cos(angles), rtol=0, atol=2e-7)
        np.testing.assert_allclose(sin, np.sin(angles), rtol=0, atol=2e-7)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_logits_alone(keep: int, tmp_path: Path) -> None:
    model = exactly(int4(), tmp_path / "x")
    ids = np.random.default_rng(0).integers(4, 320, (2, 20))
    whole, last = model.read(ids)[0], model.read(ids, keep=keep)[0]
    assert last.shape == (2, keep, 320)
    np.testing.assert_allclose(last, whole[:, -keep:], rtol=0, atol=1e-5)


def test_a_conversation_is_continued_as_keras_continues_it(tmp_path: Path) -> None:
    model = exactly("storyteller", tmp_path / "x")
    engine = gemma_multi.load("storyteller", backend="keras", precision="float32")
    expected = engine.chat().send(PROMPT, temperature=0, max_tokens=40).tokens
    ids = encode_prompt(tokenizer(), [{"role": "user", "content": PROMPT}])
    tokens: list[int] = []
    logits, past = model.read(np.array(ids), keep=1)
    while len(tokens) < 40:
        tokens.append(int(logits[0, -1].argmax()))
        logits, past = model.read(np.array(tokens[-1:]), past)
    assert tuple(tokens) == expected


# float16 and int8


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ({"precision": "float16"}, "model_fp16.onnx"),
        ({"activations": "float16"}, "model_q4f16.onnx"),
    ],
)
def test_float16_is_close(options: dict, file: str, tmp_path: Path) -> None:
    model = exported("storyteller", tmp_path / "x", **options)
    assert model.file.name == file
    logits, _ = model.read(story(150))
    assert logits.dtype == np.float32
    assert divergence(storytellers_logits(), logits[0]) < 1e-4


def test_a_stream_beyond_float16(tmp_path: Path) -> None:
    """As Gemma 3's own is: every output finite, and the same words."""
    loud, ids = loud_checkpoint(), story(60)
    for source, options in (
        (loud, {"precision": "float16"}),
        (quantize_checkpoint(loud)[0], {"activations": "float16"}),
    ):
        logits, _ = exported(source, tmp_path / source.precision, **options).read(ids)
        assert divergence(by_keras(source, ids), logits[0]) < 1e-3


def test_int8_activations_are_near(tmp_path: Path) -> None:
    int8 = quantize_checkpoint(gemma_multi.open_checkpoint(dense_storyteller(tmp_path)), 8, 8)[0]
    for source, options in ((int8, {"activations": "int8"}), (open_checkpoint("storyteller"), {})):
        model = exported(source, tmp_path / source.precision, **options)
        assert 0 < divergence(by_keras(source, story(80)), model.read(story(80))[0][0]) < 5e-3


def dense_storyteller(folder: Path) -> Path:
    return gemma_multi.export(
        "storyteller", folder / "dense", format="huggingface", precision="float32", progress=False
    ).path


# the grids


def test_negative_scales_are_held_as_they_are(tmp_path: Path) -> None:
    checkpoint, name = int4(), "model.layers.0.mlp.up_proj.weight"
    tensor = checkpoint.tensors[name]
    assert isinstance(tensor, QuantizedTensor)
    scales = tensor.scales.astype(np.float32)
    scales[::2] *= -1
    scales[1, 0] = 0
    held = (scales.astype(ml_dtypes.bfloat16), (scales * -8).astype(ml_dtypes.bfloat16))
    signed = checkpoint.with_tensors(
        {name: dataclasses.replace(tensor, scales=held[0], biases=held[1])}
    )
    assert signed.grid == "signed"
    model, ids = exactly(signed, tmp_path / "x"), np.random.default_rng(0).integers(4, 320, 30)
    assert "refitted" not in (tmp_path / "x" / "NOTICE").read_text()
    logits, _ = model.read(ids)
    np.testing.assert_allclose(logits[0], by_keras(signed, ids), rtol=0, atol=2e-4)


def test_int8_in_groups_is_held_as_it_is(tmp_path: Path) -> None:
    """As GGUF's Q8_0; beside the other layers' rows. The activations of this one are int8."""
    checkpoint = quantize_checkpoint(tiny_checkpoint(), 8, embedding_bits=8)[0]
    tensor = checkpoint.tensors[EMBEDDING]
    assert isinstance(tensor, QuantizedTensor)
    scales = tensor.scales.astype(np.float32)
    scales[:, ::2] *= 0.5
    held = (scales.astype(ml_dtypes.bfloat16), (scales * -128).astype(ml_dtypes.bfloat16))
    grouped = checkpoint.with_tensors(
        {EMBEDDING: dataclasses.replace(tensor, scales=held[0], biases=held[1])}
    )
    model, ids = exported(grouped, tmp_path / "x"), np.arange(4, 60)
    assert 0 < divergence(by_keras(grouped, ids), model.read(ids)[0][0]) < 5e-3


def test_groups_with_a_bias_are_refitted_and_reported(tmp_path: Path) -> None:
    checkpoint, name = int4(), "model.layers.2.mlp.down_proj.weight"
    tensor = checkpoint.tensors[name]
    assert isinstance(tensor, QuantizedTensor)
    shifted = (tensor.biases.astype(np.float32) * 0.9).astype(ml_dtypes.bfloat16)
    affine = checkpoint.with_tensors({name: dataclasses.replace(tensor, biases=shifted)})
    report = gemma_multi.export(affine, tmp_path / "x", format="onnx")
    assert [error.name for error in report.refitted] == [name]
    assert 0 < report.refitted[0].error < 0.1
    assert "refitted" in (tmp_path / "x" / "NOTICE").read_text()


# the directory


def test_what_lies_beside_the_graph(tmp_path: Path) -> None:
    report = gemma_multi.export("storyteller", tmp_path / "x", format="onnx", context_length=512)
    assert (report.format, report.precision, report.context_length) == ("onnx", "int4", 512)
    files = {str(f.relative_to(report.path)): f for f in report.path.rglob("*") if f.is_file()}
    assert set(files) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "NOTICE", "README.md", "provenance.json", "onnx/model_q4.onnx",
    }  # fmt: skip
    assert report.nbytes == sum(file.stat().st_size for file in files.values())
    config = json.loads(files["config.json"].read_text())
    assert config["transformers.js_config"] == {"dtype": "q4"}
    assert (config["model_type"], config["max_position_embeddings"]) == ("gemma3_text", 512)
    assert json.loads(files["generation_config.json"].read_text())["eos_token_id"] == [1, 106]
    assert (
        "start_of_turn" in json.loads(files["tokenizer_config.json"].read_text())["chat_template"]
    )
    model = onnx.load(files["onnx/model_q4.onnx"])
    notes = {note.key: note.value for note in model.metadata_props}
    assert notes["NOTICE"] == files["NOTICE"].read_text()
    assert "exported to ONNX as int4" in notes["NOTICE"]


def test_a_tokenizer_that_the_source_had_goes_along(
    gemma_tokenizer_directory: Path, tmp_path: Path
) -> None:
    tiny = tiny_checkpoint().replace(path=gemma_tokenizer_directory)
    gemma_multi.export(tiny, tmp_path / "x", format="onnx")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        theirs = json.loads((gemma_tokenizer_directory / name).read_text())
        found = json.loads((tmp_path / "x" / name).read_text())
        assert {key: found[key] for key in theirs} == theirs


def test_positions_beyond_the_context_are_refused(tmp_path: Path) -> None:
    model = exported(tiny_checkpoint(), tmp_path / "x", context_length=128)
    model.read(np.full(128, 7))
    with pytest.raises(Exception, match="cos_cache"):
        model.read(np.full(129, 7))


def test_an_export_says_that_it_is_not_opened(tmp_path: Path) -> None:
    gemma_multi.export(int4(), tmp_path / "x", format="onnx")
    with pytest.raises(CheckpointError, match="ONNX export"):
        open_checkpoint(tmp_path / "x")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"precision": "bfloat16"}, "precision is 'bfloat16'"),
     ({"precision": "float32", "activations": "float16"}, "activations is 'float16'"),
     ({"activations": "bfloat16"}, "int8, float32, float16"),
     ({"context_length": 257}, "context_length is 257"),
     ({"prefill": [16]}, "takes no option 'prefill'")],
)  # fmt: skip
def test_options_are_checked_and_nothing_is_left(options: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=words):
        gemma_multi.export(int4(), tmp_path / "x", format="onnx", **options)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: QuantizedTensor) -> np.ndarray:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(QuantizedTensor, "dequantize", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        gemma_multi.export(int4(), tmp_path / "x", format="onnx", precision="float32")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").touch()
    with pytest.raises(OptionError, match="exists already"):
        gemma_multi.export(int4(), tmp_path / "x", format="onnx")


@pytest.mark.parametrize("largest", [1_500_000, 400_000])
def test_more_than_a_protobuf_holds_lies_in_files_beside_it(
    largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 2 GB made small: the embedding of 1.6 MB has a file of its own, whatever the most is."""
    source, ids = tiny_checkpoint(vocab_size=4096), np.arange(2, 30)
    whole = exported(source, tmp_path / "whole")
    monkeypatch.setattr("gemma_multi.exporters.onnx.graph.LARGEST", largest)
    path = gemma_multi.export(source, tmp_path / "x", format="onnx", progress=False).path
    model = path / "onnx" / "model.onnx"
    files = sorted(file.name for file in model.parent.iterdir())
    count = len(files) - 1
    numbered = [f"model.onnx_data{f'_{i}' if i else ''}" for i in range(count)]
    assert count > 1
    assert files == sorted(["model.onnx", *numbered])
    assert model.stat().st_size < 150_000
    settings = json.loads((path / "config.json").read_text())["transformers.js_config"]
    assert settings["use_external_data_format"] == count
    held, expected = (
        {
            one.name: onnx.numpy_helper.to_array(one)
            for one in onnx.load(str(file)).graph.initializer
        }
        for file in (model, whole.file)
    )
    assert set(held) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(held[name], values)
    session = Exported(path)
    np.testing.assert_array_equal(session.read(ids)[0], whole.read(ids)[0])


def test_without_onnx_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("decoder", "graph", "weights"):
        monkeypatch.delitem(sys.modules, f"gemma_multi.exporters.onnx.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendError, match=r"pip install 'gemma-multi\[onnx\]'"):
        gemma_multi.export(int4(), tmp_path / "x", format="onnx")


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    gemma_multi.export(
        int4(), tmp_path / "x", format="onnx", progress=lambda *now: told.append(now)
    )
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0
