"""`.tflite` files: what is in them, bit for bit, and what refuses to become one."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.interpreter import Interpreter
from tiny import tiny_checkpoint, tiny_config, tokenizer

import gemma_multi
from gemma_multi import Checkpoint, CheckpointError, OptionError
from gemma_multi.engines import ALL, create_engine
from gemma_multi.engines import HIDDEN as WANT_HIDDEN
from gemma_multi.exporters.tflite.flatbuffer import ModelWriter
from gemma_multi.exporters.tflite.operators import Subgraph
from gemma_multi.formats.tflite.layout import (
    DECODE,
    HIDDEN,
    LOGITS,
    RING_SPARE,
    SCORE,
    cache_positions,
    fused_tensors,
)
from gemma_multi.quantization.tensor import QuantizedTensor
from gemma_multi.sources import open_checkpoint
from gemma_multi.transforms import quantize_checkpoint


def export(checkpoint: Checkpoint, path: Path, **options: object) -> Checkpoint:
    gemma_multi.export(checkpoint, path, **options)
    return open_checkpoint(path)


def int4(**changes: object) -> Checkpoint:
    return quantize_checkpoint(tiny_checkpoint(**changes))[0]


def with_bfloat16_norms(checkpoint: Checkpoint) -> Checkpoint:
    tensors = dict(checkpoint.tensors)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 1:
            tensors[name] = np.asarray(tensor, np.float32).astype(ml_dtypes.bfloat16)
    return checkpoint.with_tensors(tensors)


@pytest.mark.parametrize(
    ("make", "precision"),
    [(int4, "auto"),
     (lambda: quantize_checkpoint(tiny_checkpoint(), 4, embedding_bits=8)[0], "auto"),
     (lambda: quantize_checkpoint(tiny_checkpoint(), 8, embedding_bits=8)[0], "auto"),
     (lambda: with_bfloat16_norms(tiny_checkpoint()), "float32"),
     (lambda: int4(num_key_value_heads=2), "auto")],
    ids=["int4", "int4 with an int8 embedding", "int8", "float32", "grouped heads"],
)  # fmt: skip
def test_a_file_opens_as_the_checkpoint_it_was_made_from(
    make: object, precision: str, tmp_path: Path
) -> None:
    original = make()  # type: ignore[operator]
    opened = export(original, tmp_path / "model.tflite", precision=precision)
    assert opened.config == original.config
    assert opened.tokenizer.encode("Once upon a time") == original.tokenizer.encode(
        "Once upon a time"
    )
    assert opened.digest() == original.digest()


def test_effective_weights_are_the_checkpoints_bit_for_bit(tmp_path: Path) -> None:
    """Read with the schema alone, by the rules of the format, without our reader."""
    original = int4()
    gemma_multi.export(original, tmp_path / "model.tflite")
    data = (tmp_path / "model.tflite").read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    decode = next(
        model.subgraphs[s.subgraphIndex] for s in model.signatureDefs if s.signatureKey == b"decode"
    )
    found = {tensor.name.decode(): tensor for tensor in decode.tensors}
    compared = 0
    for fused, names in fused_tensors(original.config).items():
        tensor = found[fused]
        assert tensor.type == schema.TensorType.INT4
        details = tensor.quantization.details
        scales = model.buffers[decode.tensors[details.scales].buffer].data.view(np.float16)
        packed = model.buffers[tensor.buffer].data
        codes = np.stack([packed & 15, packed >> 4], axis=-1).astype(np.int8).reshape(tensor.shape)
        codes = np.where(codes > 7, codes - 16, codes)  # two's complement
        groups = codes.reshape(tensor.shape[0], -1, details.blockSize)
        values = groups * scales.reshape(tensor.shape[0], -1, 1).astype(np.float32)
        expected = np.concatenate([original.weight(name) for name in names])
        np.testing.assert_array_equal(values.reshape(tensor.shape), expected)
        compared += expected.size
        assert (scales > 0).all()
    assert compared == sum(int(np.prod(s)) for s in original.config.tensor_shapes().values()
                           if len(s) == 2)  # fmt: skip


def test_embedding_and_head_share_one_buffer_in_all_signatures(tmp_path: Path) -> None:
    gemma_multi.export(int4(), tmp_path / "model.tflite")
    data = (tmp_path / "model.tflite").read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    names = [s.signatureKey.decode() for s in model.signatureDefs]
    assert names == ["prefill_16", "prefill_64", "prefill_128", DECODE, HIDDEN, SCORE]
    buffers = {t.buffer for g in model.subgraphs for t in g.tensors
               if t.name == b"model.embed_tokens.weight"}  # fmt: skip
    assert len(buffers) == 1


@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_the_plain_interpreter_runs_it(precision: str, tmp_path: Path) -> None:
    checkpoint = export(tiny_checkpoint(), tmp_path / "model.tflite", precision=precision)
    ids = np.random.default_rng(0).integers(4, 320, 40)
    expected = create_engine(checkpoint, "litert").session().read(ids, ALL)
    interpreter = Interpreter(str(tmp_path / "model.tflite"))
    decode = interpreter.get_signature_runner(DECODE)
    caches = {n: np.zeros(d["shape"], d["dtype"]) for n, d in decode.get_input_details().items()
              if n.startswith("kv_cache_")}  # fmt: skip
    for i, token in enumerate(ids):
        result = decode(tokens=np.array([[token]], np.int32), input_pos=np.array([i], np.int32),
                        **caches)  # fmt: skip
        logits = result.pop(LOGITS)
        caches = result
        tolerance = 3e-5 if precision == "float32" else 0.15
        np.testing.assert_allclose(logits[0, 0], expected[i], rtol=0, atol=tolerance)


def test_local_layers_keep_their_window_and_global_ones_the_context(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    gemma_multi.export(checkpoint, tmp_path / "model.tflite", context_length=100)
    model = CompiledModel.from_file(str(tmp_path / "model.tflite"))
    details = model.get_input_tensor_details(DECODE)
    for i in range(checkpoint.config.num_hidden_layers):
        positions = details[f"kv_cache_k_{i}"]["shape"][2]
        assert positions == cache_positions(checkpoint.config, i, 100)
        assert positions == (16 + RING_SPARE if checkpoint.config.is_sliding(i) else 100)


def test_the_hidden_state_times_the_embedding_is_the_logits() -> None:
    checkpoint = tiny_checkpoint()
    engine = create_engine(checkpoint, "litert", "float32")
    ids = np.random.default_rng(0).integers(4, 320, 50)
    session = engine.session()
    hidden = session.read(ids, WANT_HIDDEN)
    assert hidden.shape == (checkpoint.config.hidden_size,)
    assert session.length == 50
    logits = checkpoint.weight("model.embed_tokens.weight") @ hidden
    np.testing.assert_allclose(logits, engine.session().read(ids), rtol=0, atol=3e-5)
    again = engine.session()
    again.read(ids)
    np.testing.assert_allclose(session.read([7]), again.read([7]), rtol=0, atol=3e-5)


@pytest.mark.parametrize("prefill", [(2,), (5, 7, 60), (256,)])
def test_any_prefill_sizes_give_the_same_logits(prefill: tuple[int, ...], tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(4, 320, 250)
    checkpoint = tiny_checkpoint()
    expected = create_engine(checkpoint, "keras", "float32").session().read(ids)
    opened = export(checkpoint, tmp_path / "model.tflite", prefill=prefill)
    session = create_engine(opened, "litert").session()
    np.testing.assert_allclose(session.read(ids), expected, rtol=0, atol=2e-4)


def test_int8_caches_are_close_and_do_not_depend_on_how_a_text_is_read(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(4, 320, 200)
    narrow = create_engine(export(tiny_checkpoint(), tmp_path / "narrow.tflite", cache="int8",
                                  precision="float32"), "litert")  # fmt: skip
    wide = create_engine(tiny_checkpoint(), "litert", "float32")
    at_once, session = narrow.session().read(ids, ALL), narrow.session()
    session.read(ids[:90])
    np.testing.assert_allclose(session.read(ids[90:]), at_once[-1], rtol=0, atol=3e-5)
    difference = np.abs(at_once - wide.session().read(ids, ALL)).max()
    assert 0 < difference < 0.05


def test_long_contexts_get_int8_caches_when_the_weights_are_narrow(tmp_path: Path) -> None:
    config = {"max_position_embeddings": 32768}
    for length, precision, kind in ((8192, "int4", "float32"), (8193, "int4", "int8"),
                                    (32768, "float32", "float32")):  # fmt: skip
        path = tmp_path / f"{length}{precision}.tflite"
        opened = export(tiny_checkpoint(**config), path, context_length=length,
                        precision=precision)  # fmt: skip
        assert opened.tensors.origin.facts["cache"] == kind


def test_rotations_are_exact_at_every_position(tmp_path: Path) -> None:
    """The runtime's sine and cosine, at the angles of a context of 32,768."""
    angles = np.arange(32768, dtype=np.float32)
    model = ModelWriter("angles")
    graph = Subgraph(model, "turn")
    x = graph.input("x", angles.shape)
    graph.output("cos", graph.cos(x))
    graph.output("sin", graph.sin(x))
    graph.finish()
    (tmp_path / "angles.tflite").write_bytes(model.pack())
    runner = CompiledModel.from_file(str(tmp_path / "angles.tflite"))
    inputs = {"x": runner.create_input_buffer_by_name("turn", "x")}
    outputs = {n: runner.create_output_buffer_by_name("turn", n) for n in ("cos", "sin")}
    inputs["x"].write(angles)
    runner.run_by_name("turn", inputs, outputs)
    for name, function in (("cos", np.cos), ("sin", np.sin)):
        actual = outputs[name].read(len(angles), np.float32)
        np.testing.assert_allclose(actual, function(angles.astype(np.float64)), rtol=0, atol=2e-6)


# the signed grid


def signed_checkpoint() -> Checkpoint:
    """As Google's Q4_0: some scales negative, one group all zero with scale zero."""
    checkpoint = int4()
    tensors = dict(checkpoint.tensors)
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = tensors[name]
    assert isinstance(tensor, QuantizedTensor)
    scales = tensor.scales.astype(np.float32)
    scales[::2] *= -1
    scales[1, 0] = 0
    held = scales.astype(ml_dtypes.bfloat16)
    tensors[name] = dataclasses.replace(
        tensor, scales=held, biases=(scales * -8).astype(ml_dtypes.bfloat16)
    )
    return checkpoint.with_tensors(tensors)


def test_scales_that_litert_refuses_are_refitted_and_reported(tmp_path: Path) -> None:
    signed = signed_checkpoint()
    assert signed.grid == "signed"
    report = gemma_multi.export(signed, tmp_path / "model.tflite")
    (error,) = report.refitted
    assert error.name == "model.layers.0.mlp.up_proj.weight"
    assert 0 < error.error < 0.1
    opened = open_checkpoint(tmp_path / "model.tflite")
    assert opened.grid == "portable"
    assert any("refitted" in how for how in opened.provenance.modifications)
    before, after = signed.weight(error.name), opened.weight(error.name)
    lost = np.linalg.norm(before - after) / np.linalg.norm(before)
    assert lost == pytest.approx(error.error, rel=1e-3)
    for name in set(signed.tensors) - {error.name}:
        np.testing.assert_array_equal(signed.weight(name), opened.weight(name))
    logits = create_engine(opened, "litert").session().read([5, 6, 7])
    assert np.isfinite(logits).all()


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [({"context_length": 257}, "context_length is 257, expected 1 to 256"),
     ({"context_length": 0}, "context_length is 0"),
     ({"context_length": 1}, "expected at least 2"),
     ({"prefill": [0]}, "prefill size is 0, expected 2 to 256"),
     ({"prefill": [16, 1000]}, "prefill size is 1000, expected 2 to 256"),
     ({"prefill": ["16"]}, "prefill size is '16'"),
     ({"precision": "float16"}, "precision is 'float16', expected one of"),
     ({"cache": "int4"}, "cache is 'int4'"),
     ({"prefill": 16}, "prefill is 16, expected a list"),
     ({"colour": "red"}, "takes no option 'colour'")],
)  # fmt: skip
def test_options_outside_the_format_are_refused(
    options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        gemma_multi.export(tiny_checkpoint(), tmp_path / "model.tflite", **options)
    assert not list(tmp_path.iterdir())


def test_a_stored_precision_is_not_quantised_a_second_time(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the checkpoint is int4 already"):
        gemma_multi.export(int4(), tmp_path / "model.tflite", precision="int8")


@pytest.mark.parametrize("name", ["model", "model.gguf2", "model.tflite.txt"])
def test_an_unknown_suffix_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        OptionError,
        match=r"must end in \.gguf, \.litertlm, \.sbs or \.tflite, to say what it is; for a "
        "directory give",
    ):
        gemma_multi.export(tiny_checkpoint(), tmp_path / name)


def test_a_target_in_use_or_out_of_reach_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_text("mine")
    with pytest.raises(OptionError, match="exists already"):
        gemma_multi.export(tiny_checkpoint(), tmp_path / "model.tflite")
    assert (tmp_path / "model.tflite").read_text() == "mine"
    with pytest.raises(CheckpointError, match="cannot be written"):
        gemma_multi.export(tiny_checkpoint(), tmp_path / "model.tflite" / "inside.tflite")


def test_a_model_past_two_gigabytes_is_refused_before_any_work(tmp_path: Path) -> None:
    dense = Checkpoint(tiny_config(vocab_size=1 << 20, hidden_size=1024), {},
                       make_tokenizer=tokenizer)  # fmt: skip
    with pytest.raises(OptionError, match="holds less than 2; use a smaller precision"):
        gemma_multi.export(dense, tmp_path / "model.tflite", precision="float32")


def test_mixed_precisions_are_exported_in_float32(tmp_path: Path) -> None:
    mixed, eight = int4(), quantize_checkpoint(tiny_checkpoint(), 8, embedding_bits=8)[0]
    name = "model.layers.0.self_attn.v_proj.weight"
    mixed = mixed.with_tensors({name: eight.tensors[name]})
    opened = export(mixed, tmp_path / "model.tflite")
    assert opened.precision == "float32"
    for name in mixed.tensors:
        np.testing.assert_array_equal(opened.weight(name), mixed.weight(name))


def test_tensors_put_in_by_hand_are_not_taken_for_those_of_the_file(tiny_copy: Path) -> None:
    checkpoint = open_checkpoint(tiny_copy)
    before = create_engine(checkpoint, "litert", "float32").session().read([5, 6, 7])
    for change in ("__setitem__", "update", "pop", "clear", "setdefault"):
        assert not hasattr(checkpoint.tensors, change)
    with pytest.raises(ValueError, match="read-only"):
        checkpoint.tensors["model.norm.weight"][0] = 9
    norm = {"model.norm.weight": checkpoint.weight("model.norm.weight") + 1}
    changed = checkpoint.with_tensors(norm)
    assert changed.identity != checkpoint.identity
    after = create_engine(changed, "litert", "float32").session().read([5, 6, 7])
    assert np.abs(after - before).max() > 0.1


def test_a_file_exported_with_less_context_says_so(tmp_path: Path) -> None:
    opened = export(tiny_checkpoint(), tmp_path / "model.tflite", context_length=64)
    with pytest.raises(OptionError, match="was exported with 64; export it with more"):
        create_engine(opened, "litert", context_length=128)
    with pytest.raises(OptionError, match="was exported as float32"):
        create_engine(opened, "litert", "int4")
    with pytest.raises(OptionError, match="computes in float32"):
        create_engine(opened, "litert", "bfloat16")
    with pytest.raises(OptionError, match="threads is 0"):
        create_engine(opened, "litert", options={"threads": 0})
    with pytest.raises(OptionError, match="backend 'keras' takes no option 'threads'"):
        create_engine(opened, "keras", options={"threads": 2})


def test_a_killed_export_leaves_nothing_or_everything(tmp_path: Path) -> None:
    """kill -9 at ten moments of a process that exports in a loop."""
    script = (
        "import sys, pathlib, gemma_multi\n"
        "for i in range(10**6):\n"
        "    for kind in ('tflite', 'litertlm'):\n"
        "        path = pathlib.Path(sys.argv[1], f'{i}.{kind}')\n"
        "        gemma_multi.export('storyteller', path)\n"
        "        print(path, flush=True)\n"
    )
    rng, seen = random.Random(0), 0
    for attempt in range(10):
        target = tmp_path / str(attempt)
        target.mkdir()
        process = subprocess.Popen([sys.executable, "-c", script, str(target)],
                                   stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()  # it is at work
        time.sleep(rng.uniform(0, 1))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path in target.iterdir():
            if not path.name.startswith("."):  # an abandoned temporary file
                assert open_checkpoint(path).config.num_hidden_layers == 9
                seen += 1
    assert seen >= 10
