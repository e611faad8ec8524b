"""`.gguf` files: what other readers find in them, and that they open as what they were made of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import dequantized, entries, export, speaking, write_gguf
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi import Checkpoint, CheckpointError, OptionError
from gemma_multi.checkpoint import Provenance
from gemma_multi.cli import cli
from gemma_multi.config import EMBEDDING
from gemma_multi.demo import STORY
from gemma_multi.formats.gguf.layout import NORMS, stored_name
from gemma_multi.quantization.tensor import BFLOAT16, QuantizedTensor, pack
from gemma_multi.transforms import quantize_checkpoint

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"
TEXTS = ("Once upon a time", "  two  spaces\n\n\nand <unused7> lines", "naïve 日本 🦜", "<b>\t</b>")


def int4(**changes: Any) -> Checkpoint:
    return quantize_checkpoint(speaking(**changes))[0]


def published() -> Checkpoint:
    """As in Google's 240 MB file: int4 layers, an int8 embedding."""
    return quantize_checkpoint(speaking(), 4, embedding_bits=8)[0]


def dense(dtype: Any, norms: Any) -> Checkpoint:
    stored = speaking()
    return stored.with_tensors(
        {n: t.astype(norms if t.ndim == 1 else dtype) for n, t in stored.tensors.items()}
    )


def float32_norms() -> Checkpoint:
    """Norms of which `1 + w` in float32 loses some."""
    return speaking().with_tensors({NORM: tiny_checkpoint().weight(NORM)})


KINDS: list[tuple[Callable[[], Checkpoint], str, str]] = [
    (int4, "Q4_0", "Q4_0"),
    (published, "Q8_0", "Q4_0"),
    (lambda: quantize_checkpoint(speaking(), 8, embedding_bits=8)[0], "Q8_0", "Q8_0"),
    (lambda: dense(BFLOAT16, BFLOAT16), "BF16", "BF16"),
    (lambda: dense(np.float16, np.float16), "F16", "F16"),
    (lambda: dense(np.float32, np.float32), "F32", "F32"),
    (float32_norms, "F32", "F32"),
    (lambda: int4(num_key_value_heads=2), "Q4_0", "Q4_0"),
]  # fmt: skip
NAMES = ("int4", "int8 embedding", "int8", "bfloat16", "float16", "float32", "norms", "heads")


@pytest.mark.parametrize(("make", "embedding", "linear"), KINDS, ids=NAMES)
def test_a_file_opens_as_what_it_was_made_of(
    make: Callable[[], Checkpoint], embedding: str, linear: str, tmp_path: Path
) -> None:
    made = make()
    original = made.replace(
        generation={"temperature": 0.5, "eos_token_id": [1, 106]},
        provenance=Provenance("gemma", "google/some-model", "abc", ("trained",), "Thanks.", "x1"),
        config=made.config.replace(residual_scale=2.0**-4),
    )
    path = tmp_path / "model.gguf"
    opened = export(original, path)
    assert opened.config == original.config
    assert opened.digest() == original.digest()
    assert opened.generation == original.generation
    assert opened.stop_ids == original.stop_ids
    assert [opened.tokenizer.encode(t) for t in TEXTS] == [
        original.tokenizer.encode(t) for t in TEXTS
    ]
    kinds = ", ".join(sorted({embedding, linear}))
    assert opened.provenance == original.provenance.modified(f"exported as GGUF in {kinds}")
    again = export(opened, tmp_path / "again.gguf")
    assert again.digest() == original.digest()
    assert len(again.provenance.modifications) == 3
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert (found["token_embd.weight"], found["blk.0.ffn_up.weight"]) == (embedding, linear)
    assert found["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(("make", "embedding", "linear"), KINDS, ids=NAMES)
def test_other_readers_find_the_same_weights(
    make: Callable[[], Checkpoint], embedding: str, linear: str, tmp_path: Path
) -> None:
    """The gguf package's, and MLX's where the type is one that it keeps packed."""
    original, path = make(), tmp_path / "model.gguf"
    gemma_multi.export(original, path, progress=False)
    found, in_mlx = dequantized(path), mx.load(str(path))
    assert set(found) == {stored_name(name) for name in original.tensors}
    for name, info in original.tensors.infos.items():
        weight = original.weight(name).astype(np.float32) + np.float32(len(info.shape) == 1)
        np.testing.assert_array_equal(found[stored_name(name)], weight, strict=True)
        if info.dtype == "bfloat16":  # of which MLX makes float16
            continue
        held, stem = in_mlx[stored_name(name)], stored_name(name).removesuffix(".weight")
        if info.is_quantized:
            scales, biases = (
                in_mlx[f"{stem}.{part}"].astype(mx.float32) for part in ("scales", "biases")
            )
            bits = 4 if info.dtype == "int4" else 8
            held = mx.dequantize(held, scales, biases, group_size=32, bits=bits)
        np.testing.assert_array_equal(np.array(held.astype(mx.float32)), weight)


def test_llama_cpps_own_scales_come_back_to_the_byte(tmp_path: Path) -> None:
    """Google's Q4_0 files have scales of either sign, which float16 alone holds."""
    source = write_gguf(
        speaking(), tmp_path / "source.gguf", lambda n: Kind.Q8_0 if n == EMBEDDING else Kind.Q4_0
    )
    opened = gemma_multi.open_checkpoint(source)
    assert opened.grid == "signed"
    again = export(opened, tmp_path / "again.gguf")
    assert again.digest() == opened.digest()
    before, after = ({t.name: t.data for t in gguf.GGUFReader(file).tensors}
                     for file in (source, tmp_path / "again.gguf"))  # fmt: skip
    assert set(before) == set(after)
    for name, data in before.items():
        np.testing.assert_array_equal(after[name], data)
    assert again.provenance.source == "Tiny"
    assert again.provenance.modifications[-2:] == (
        "stored as GGUF in Q4_0, Q8_0", "exported as GGUF in Q4_0, Q8_0"
    )  # fmt: skip


def test_norms_changed_since_are_read_as_they_are_now(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    original = export(float32_norms(), path)
    assert NORMS in entries(path)
    (gain,) = (t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.2.attn_norm.weight")
    gain.data[:] = 3.0
    gain.data.base.flush()
    opened = gemma_multi.open_checkpoint(path)
    assert (opened.weight(NORM) == 2).all()
    assert opened.weight(UP).tobytes() == original.weight(UP).tobytes()


# what is asked for


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_dense_from_quantised(precision: str, tmp_path: Path) -> None:
    original = published()
    report = gemma_multi.export(original, tmp_path / "m.gguf", precision=precision, progress=False)
    opened = gemma_multi.open_checkpoint(tmp_path / "m.gguf")
    assert report.precision == opened.precision == precision
    assert report.nbytes == (tmp_path / "m.gguf").stat().st_size
    dtype = BFLOAT16 if precision == "bfloat16" else np.dtype(precision)
    for name, info in original.tensors.infos.items():
        expected = original.weight(name)
        expected = expected.astype(dtype) if len(info.shape) == 2 else expected
        np.testing.assert_array_equal(opened.weight(name), expected, strict=True)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_quantised_from_dense(precision: str, tmp_path: Path) -> None:
    bits, seen = int(precision[-1]), []
    with pytest.warns(gemma_multi.PlainRoundingWarning) if bits == 4 else nullcontext():
        gemma_multi.export(speaking(), tmp_path / "m.gguf", precision=precision,
                           progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    expected = quantize_checkpoint(speaking(), bits, bits)[0]
    assert gemma_multi.open_checkpoint(tmp_path / "m.gguf").digest() == expected.digest()
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {seen[-1][0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"precision": "int3"}, "unknown precision 'int3', expected one of auto, int4, int8, float32"),
     ({"precision": "int8"}, "the checkpoint is int4 already; take the original instead"),
     ({"context_length": 64}, "format 'gguf' takes no option 'context_length'; expected one of")],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((OptionError, CheckpointError), match=message):
        gemma_multi.export(int4(), tmp_path / "m.gguf", **options)
    assert not list(tmp_path.iterdir())


def grouped(bits: int, group: int, **changes: np.ndarray) -> Checkpoint:
    """One matrix `[128, 96]` in other groups, and in float32 scales and biases."""
    rng, (rows, width) = np.random.default_rng(0), (128, 96)
    codes = rng.integers(0, 1 << bits, (rows, width)).astype(np.uint8)
    scales = rng.choice([0.5, -0.25, 2.0**-10], (rows, width // group)).astype(np.float32)
    tensor = QuantizedTensor(pack(codes, bits), scales, scales * -(1 << (bits - 1)), bits, group)
    return speaking().with_tensors({UP: replace(tensor, **changes)})


@pytest.mark.parametrize(("bits", "group"), [(4, 96), (8, 96), (4, 32), (8, 32)])
def test_larger_groups_repeat_their_scale(bits: int, group: int, tmp_path: Path) -> None:
    original = grouped(bits, group)
    opened = export(original, tmp_path / "m.gguf")
    stored, held = opened.tensors[UP], original.tensors[UP]
    assert isinstance(stored, QuantizedTensor)
    assert isinstance(held, QuantizedTensor)
    assert stored.group_size == 32
    np.testing.assert_array_equal(stored.codes(), held.codes())
    np.testing.assert_array_equal(opened.weight(UP), original.weight(UP))


def test_what_has_no_form_in_gguf_is_named(tmp_path: Path) -> None:
    tiny = np.full((128, 3), 1e-9, np.float32)  # below float16's least
    large = np.full((128, 3), 1e6, np.float32)
    for checkpoint, message in (
        (grouped(4, 16), "groups of 16 weights, no multiple of 32, for which Q4_0"),
        (
            grouped(4, 32, scales=tiny, biases=tiny * -8),
            "a scale that float16 does not hold, for which Q4_0",
        ),
        (
            grouped(4, 32, scales=large, biases=large * -8),
            "a scale that float16 does not hold, for which Q4_0",
        ),
        (grouped(8, 32, biases=tiny), "a zero point, for which Q8_0"),
    ):
        with pytest.raises(
            CheckpointError, match=f"tensor '{UP}' has {message} has no place; give"
        ):
            gemma_multi.export(checkpoint, tmp_path / "m.gguf", progress=False)
        assert not list(tmp_path.iterdir())  # though it was begun
        export(checkpoint, tmp_path / "m.gguf", precision="float32")
        (tmp_path / "m.gguf").unlink()
    beyond = speaking().with_tensors({UP: np.full((128, 96), 1e5, np.float32)})
    with pytest.raises(CheckpointError, match=f"'{UP}' holds numbers beyond float16's largest"):
        gemma_multi.export(beyond, tmp_path / "m.gguf", precision="float16", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"query_pre_attn_scalar": 48.0}, "query_pre_attn_scalar is 48.0, but .* computes with 32"),
     ({"embedding_scale": 1.0}, r"embedding_scale is 1.0, but llama.cpp multiplies by 9.79796"),
     ({"eos_token_ids": (1, 7, 9)}, r"answers end at the tokens \[7, 9\] besides <eos>")],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = speaking()
    checkpoint = checkpoint.replace(config=checkpoint.config.replace(**changes))
    with pytest.raises(CheckpointError, match=message):
        gemma_multi.export(checkpoint, tmp_path / "m.gguf", progress=False)
    assert not list(tmp_path.iterdir())


def test_an_output_in_use_and_a_full_disk_leave_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("mine")
    with pytest.raises(OptionError, match="exists already"):
        gemma_multi.export("storyteller", path)
    assert path.read_text() == "mine"
    path.unlink()
    written = gguf.GGUFWriter.write_tensor_data

    def full(self: gguf.GGUFWriter, tensor: Any) -> None:
        written(self, tensor)
        if len(self.tensors[0]) < 50:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(CheckpointError, match="No space left on device; nothing was written"):
        gemma_multi.export("storyteller", path)
    assert not list(tmp_path.iterdir())


def test_the_command_line_writes_one_that_tells_the_same_story(tmp_path: Path) -> None:
    path = tmp_path / "storyteller.gguf"
    cli.main(["export", "storyteller", "-o", str(path)], standalone_mode=False)
    original = gemma_multi.open_checkpoint("storyteller")
    opened = gemma_multi.open_checkpoint(path)
    assert opened.digest() == original.digest()
    assert opened.provenance.license == "apache-2.0"
    told = [
        gemma_multi.load(model, backend="keras").generate(STORY, temperature=0, max_tokens=60).text
        for model in ("storyteller", path)
    ]
    assert told[0] == told[1] != ""
