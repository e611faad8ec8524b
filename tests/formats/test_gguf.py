"""GGUF files: written by the gguf package, read by us and by its own reader."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import litert_lm
import numpy as np
import pytest
import tokenizers
from fuzzing import fuzz
from gguf import GGMLQuantizationType as Kind
from gguf_files import dequantized, speaking, write_gguf
from tiny import tiny_checkpoint
from varied_text import samples

import gemma_multi
from gemma_multi import CheckpointError, GemmaError, TokenizerError
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.config import EMBEDDING
from gemma_multi.engines import ALL
from gemma_multi.formats.gguf.file import GgufFile
from gemma_multi.formats.gguf.layout import stored_name
from gemma_multi.quantization.tensor import QuantizedTensor
from gemma_multi.tokenizer import Tokenizer

BACKENDS = ("mlx", "keras", "litert")
GATE = "model.layers.0.mlp.gate_proj.weight"


def theirs(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as the gguf package dequantises it; norms less the one inside."""
    return {name: dense - (dense.ndim == 1) for name, dense in dequantized(path).items()}


@pytest.mark.parametrize(
    ("kind", "precision", "grid"),
    [
        (Kind.F32, "float32", "none"),
        (Kind.F16, "float16", "none"),
        (Kind.BF16, "bfloat16", "none"),
        (Kind.Q8_0, "int8", "portable"),
        (Kind.Q4_0, "int4", "signed"),  # llama.cpp's scales have the sign of the largest weight
        (Kind.Q4_1, "float32", "none"),
        (Kind.Q5_0, "float32", "none"),
        (Kind.Q5_1, "float32", "none"),
    ],
)
def test_tensors_are_what_gguf_says_they_are(
    tmp_path: Path, kind: Kind, precision: str, grid: str
) -> None:
    path = write_gguf(tiny_checkpoint(), tmp_path / "x.gguf", kind)
    checkpoint = gemma_multi.open_checkpoint(path)
    assert (checkpoint.format, checkpoint.precision, checkpoint.grid) == ("gguf", precision, grid)
    expected = theirs(path)
    for name, info in checkpoint.tensors.infos.items():
        weight = checkpoint.weight(name)
        assert (weight.shape, info.nbytes) == (info.shape, checkpoint.tensors[name].nbytes)
        np.testing.assert_array_equal(weight, expected[stored_name(name)], strict=False)


@np.errstate(all="ignore")
def random_blocks(checkpoint: Checkpoint, kind: Kind) -> dict[str, np.ndarray]:
    """Codes that no Python writes, as noise with sane scales; checked by dequantising."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in checkpoint.config.tensor_shapes().items():
        if len(shape) == 2:
            raw = rng.integers(0, 256, (shape[0], shape[1] // block, nbytes), np.uint8)
            while True:  # half-precision scales somewhere inside must be finite
                dense = gguf.quants.dequantize(raw.reshape(shape[0], -1), kind)
                bad = ~np.isfinite(dense.reshape(*raw.shape[:2], -1)).all(-1)
                if not bad.any():
                    break
                raw[bad] = rng.integers(0, 256, (int(bad.sum()), nbytes), np.uint8)
            found[stored_name(name)] = raw.reshape(shape[0], -1)
    return found


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K,
                                  Kind.IQ4_NL, Kind.IQ4_XS])  # fmt: skip
def test_every_other_type_is_dequantised(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint(
        hidden_size=256, num_attention_heads=8, intermediate_size=256, num_hidden_layers=6
    )
    blocks = random_blocks(checkpoint, kind)
    quantize = gguf.quants.quantize
    waiting = [blocks[stored_name(n)] for n in checkpoint.config.tensor_shapes()
               if stored_name(n) in blocks]  # fmt: skip
    monkeypatch.setattr(gguf.quants, "quantize", lambda weight, of: waiting.pop(0))
    path = write_gguf(checkpoint, tmp_path / "x.gguf", kind)
    monkeypatch.setattr(gguf.quants, "quantize", quantize)
    opened, expected = gemma_multi.open_checkpoint(path), theirs(path)
    assert not opened.is_quantized
    for name in opened.tensors:
        np.testing.assert_array_equal(opened.weight(name), expected[stored_name(name)])


def published_mixture(name: str) -> Kind:
    """As in Google's 240 MB file: Q4_0 layers, the embedding in Q8_0."""
    return Kind.Q8_0 if name == EMBEDDING else Kind.Q4_0


def test_q4_0_and_q8_0_keep_their_codes_and_scales(tmp_path: Path) -> None:
    path = write_gguf(tiny_checkpoint(), tmp_path / "x.gguf", published_mixture)
    opened = gemma_multi.open_checkpoint(path)
    raw = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    for name, bits in ((GATE, 4), (EMBEDDING, 8)):
        tensor = opened.tensors[name]
        assert isinstance(tensor, QuantizedTensor)
        assert (tensor.bits, tensor.group_size) == (bits, 32)
        blocks = raw[stored_name(name)].reshape(tensor.shape[0], tensor.shape[1] // 32, -1)
        np.testing.assert_array_equal(
            tensor.scales.view(np.uint16), blocks[..., :2].copy().view("<u2")[..., 0]
        )
        stored = blocks[..., 2:]
        codes = np.concatenate([stored & 15, stored >> 4], -1) if bits == 4 else stored ^ 0x80
        np.testing.assert_array_equal(tensor.codes(), codes.reshape(tensor.shape))


def test_a_block_without_a_scale_is_zero_on_the_grid(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    gate = np.abs(checkpoint.weight(GATE)) * -1  # the largest is negative: positive scales
    gate[3, 32:64] = 0
    checkpoint = checkpoint.with_tensors({GATE: gate})
    path = write_gguf(
        checkpoint, tmp_path / "x.gguf", lambda n: Kind.Q4_0 if n == GATE else Kind.F32
    )
    tensor = gemma_multi.open_checkpoint(path).tensors[GATE]
    assert isinstance(tensor, QuantizedTensor)
    assert tensor.grid == "portable"
    assert not tensor.dequantize()[3, 32:64].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_runs_on_every_engine(tmp_path: Path, backend: str) -> None:
    """The same logits as the dense weights that gguf makes of it."""
    path = write_gguf(speaking(), tmp_path / "x.gguf", published_mixture)
    source, held = speaking(dtype="bfloat16"), theirs(path)
    dense = source.with_tensors({name: held[stored_name(name)] for name in source.tensors})
    ids = np.arange(5, 45)
    got, expected = (
        gemma_multi.load(model, backend=backend, precision="float32")
        .engine.session()
        .read(ids, ALL)
        for model in (path, dense)
    )
    np.testing.assert_allclose(got, expected, atol=1e-4)
    stored = gemma_multi.load(path, backend=backend)  # packed where the engine can
    assert stored.generate("Once", max_tokens=3).tokens


def test_the_verbs_take_it(tmp_path: Path) -> None:
    mixed = write_gguf(
        speaking(), tmp_path / "q8.gguf", lambda n: Kind.Q8_0 if n == EMBEDDING else Kind.Q5_0
    )
    report = gemma_multi.quantize(mixed, tmp_path / "int4", progress=False)
    assert gemma_multi.open_checkpoint(report.path).precision == "int4"  # type: ignore[arg-type]
    gemma_multi.export(mixed, tmp_path / "x.tflite", context_length=32, progress=False)
    rows = [{"prompt": "a", "completion": "b"}] * 4
    result = gemma_multi.finetune(
        mixed, rows, tmp_path / "run", epochs=1, validation=0, progress=False
    )
    assert result.checkpoint().precision == "int4"
    signed = write_gguf(speaking(), tmp_path / "q4.gguf", Kind.Q4_0)
    exported = gemma_multi.export(signed, tmp_path / "y.tflite", context_length=32, progress=False)
    assert len(exported.refitted) > 0  # LiteRT has no negative scales; the report says what changed
    with pytest.raises(CheckpointError, match="int4 already"):
        gemma_multi.quantize(signed, tmp_path / "again")


def test_litert_lm_opens_what_is_exported_from_one(tmp_path: Path) -> None:
    """Its SentencePiece wants a piece of the kind "unknown", which such files do not name."""
    path = tmp_path / "x.litertlm"
    gemma_multi.export(write_gguf(speaking(), tmp_path / "x.gguf"), path, context_length=64,
                       progress=False)  # fmt: skip
    with (
        litert_lm.Engine(str(path), litert_lm.Backend.CPU(thread_count=1)) as engine,
        engine.create_conversation() as conversation,
    ):
        assert conversation.send_message("Hello", max_output_tokens=3)["content"]


def test_the_config_and_where_it_comes_from(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(dtype="bfloat16")
    path = write_gguf(checkpoint, tmp_path / "x.gguf")
    opened = gemma_multi.open_checkpoint(path)
    expected = checkpoint.config.replace(query_pre_attn_scalar=float(checkpoint.config.head_dim))
    assert opened.config == expected
    assert (opened.provenance.license, opened.provenance.source) == ("apache-2.0", "Tiny")
    assert {1, 106} <= opened.stop_ids
    flags = [i % 4 != 3 for i in range(8)]
    other = write_gguf(checkpoint, tmp_path / "y.gguf", metadata={
        "attention.sliding_window_pattern": flags, "rope.freq_base_swa": 5000.0,
        "rope.scaling.type": "linear", "rope.scaling.factor": 8.0})  # fmt: skip
    config = gemma_multi.open_checkpoint(other).config
    assert [config.is_sliding(i) for i in range(8)] == flags
    assert (config.rope_local_theta, config.rope_scaling_factor) == (5000, 8)
    untyped = write_gguf(checkpoint, tmp_path / "z.gguf", metadata={"rope.scaling.factor": 4.0})
    assert gemma_multi.open_checkpoint(untyped).config.rope_scaling_factor == 4


def test_bfloat16_norms_come_back_as_they_were(tmp_path: Path) -> None:
    import ml_dtypes

    checkpoint = tiny_checkpoint()
    shapes = checkpoint.config.tensor_shapes()
    norms = {
        name: checkpoint.weight(name).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
        if len(shape) == 1
    }
    path = write_gguf(checkpoint.with_tensors(norms), tmp_path / "x.gguf")
    opened = gemma_multi.open_checkpoint(path)
    for name, norm in norms.items():
        assert opened.tensors[name].dtype == norm.dtype
        np.testing.assert_array_equal(opened.weight(name), norm)


@pytest.fixture(scope="module")
def with_gemmas_vocabulary(
    gemma_tokenizer_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    tokenizer = Tokenizer.from_directory(gemma_tokenizer_directory)
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    return write_gguf(tiny_checkpoint(), path, tokenizer=tokenizer)


def test_ids_equal_hugging_face(
    with_gemmas_vocabulary: Path, gemma_tokenizer_directory: Path
) -> None:
    reference = Tokenizer.from_directory(gemma_tokenizer_directory)  # compared in test_tokenizer
    ours = gemma_multi.open_checkpoint(with_gemmas_vocabulary).tokenizer
    for text in samples(2400):
        assert ours.encode(text) == reference.encode(text), repr(text)
    plain = tokenizers.Tokenizer.from_file(str(gemma_tokenizer_directory / "tokenizer.json"))
    for text in ("Hello, world", "  two  spaces", "\n\n\n<b>bold</b>\t", "naïve 日本語 🦜"):
        assert ours.encode(text) == plain.encode(text, add_special_tokens=False).ids
    with_steering = ours.encode("<start_of_turn>user")
    assert ours.start_of_turn_id not in with_steering


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma2"}, "is a 'gemma2' model, expected 'gemma3'"),
        ({"without": ("blk.3.ffn_up.weight",)}, "tensor 'blk.3.ffn_up.weight' is missing"),
        ({"without": ("token_embd.weight",)}, "tensor 'token_embd.weight' is missing"),
        ({"extra": {"blk.0.bias": np.zeros(3, np.float32)}}, "'blk.0.bias' does not belong"),
        (
            {"extra": {"output.weight": np.zeros((320, 96), np.float32)}},
            "differs from the embedding",
        ),
        ({"metadata": {"block_count": 9}}, "tensor 'blk.8.attn_norm.weight' is missing"),
        ({"metadata": {"block_count": 1 << 31}}, "num_hidden_layers"),
        ({"metadata": {"embedding_length": 128}}, r"has shape \[320, 96\], but .* \[320, 128\]"),
        ({"metadata": {"attention.sliding_window": None}}, "sliding_window"),
        ({"metadata": {"attention.value_length": 64}}, "value_length is 64"),
        ({"metadata": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping is 30"),
        ({"metadata": {"split.count": 3}}, "one of 3 parts"),
        ({"metadata": {"split.count": [1, 2]}}, "one of .* parts"),
        ({"metadata": {"block_count": [8, 8]}}, "block_count is a list, expected one value"),
        ({"metadata": {"final_logit_softcapping": [1, 2]}}, "softcapping is a list"),
        (
            {"metadata": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}},
            "rope.scaling.type is 'yarn'",
        ),
    ],
)
def test_what_is_no_gemma_3_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_gguf(tiny_checkpoint(), tmp_path / "x.gguf", **changes)
    with pytest.raises(GemmaError, match=message) as caught:
        gemma_multi.open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_another_tokenizer_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    path = write_gguf(tiny_checkpoint(), tmp_path / "x.gguf")
    data = path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen2")
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match="'qwen2', expected 'llama'"):
        gemma_multi.open_checkpoint(path).tokenizer  # noqa: B018


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    broken = tiny_checkpoint().weight(GATE).copy()
    broken[1, 2] = np.inf
    checkpoint = tiny_checkpoint().with_tensors({GATE: broken})
    path = write_gguf(checkpoint, tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"'blk.0.ffn_gate.weight' holds NaN or infinity"):
        gemma_multi.load(path, backend="keras")


def test_a_damaged_or_foreign_file_keeps_its_name(tmp_path: Path) -> None:
    for content, message in (
        (b"", "too short"), (b"GGUF" + b"\0" * 8, "too short"), (b"x" * 100, "begins with"),
        (b"GGUF\0\0\0\3" + b"\0" * 40, "version 3, big-endian"),
        (b"GGUF\1\0\0\0" + b"\0" * 40, "version 1"),
    ):  # fmt: skip
        path = tmp_path / "x.gguf"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            gemma_multi.open_checkpoint(path)


def test_tensors_may_not_share_bytes(tmp_path: Path) -> None:
    path = write_gguf(tiny_checkpoint(), tmp_path / "x.gguf")
    names = list(GgufFile(path).tensors)
    data = path.read_bytes()
    at = data.index(names[2].encode()) + len(names[2])
    dimensions = int.from_bytes(data[at : at + 4], "little")
    offset = at + 4 + 8 * dimensions + 4
    path.write_bytes(data[:offset] + bytes(8) + data[offset + 8 :])
    with pytest.raises(CheckpointError, match="overlaps"):
        gemma_multi.open_checkpoint(path)


@pytest.mark.slow
def test_mutated_files_are_refused_by_name_and_never_crash(tmp_path: Path) -> None:
    """600 mutations in four processes (see fuzz_gguf.py)."""
    outcomes: Counter[str] = Counter()
    for i, kind in enumerate((published_mixture, Kind.Q5_0, Kind.BF16, Kind.F32)):
        source = write_gguf(tiny_checkpoint(), tmp_path / f"{i}.gguf", kind)
        outcomes += fuzz("fuzz_gguf.py", source, tmp_path / str(i), i, 150)
    assert sum(outcomes.values()) == 600
    assert outcomes["refused"] > 300, outcomes
    assert outcomes["read"] > 50, outcomes  # weights may be anything finite
