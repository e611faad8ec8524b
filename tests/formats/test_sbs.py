"""`.sbs` files as gemma.cpp's converter makes them, older ones, and ones that are none."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import fuzz
from sbs_files import blobs_of, container, write_sbs
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi import CheckpointError, GemmaError, TokenizerError
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.config import EMBEDDING
from gemma_multi.engines.base import ALL
from gemma_multi.quantization.tensor import Sfp8Tensor
from gemma_multi.transforms import to_precision


def made(**changes: Any) -> Checkpoint:
    return to_precision(tiny_checkpoint(vocab_size=4096, dtype="bfloat16", **changes), "bfloat16")


@pytest.mark.parametrize("kind", ["SFP", "BF16", "F32"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_converters_layout_becomes_the_models(
    kind: str, version: int, heads: int, tmp_path: Path
) -> None:
    original = made(num_key_value_heads=heads)
    path = write_sbs(original, tmp_path / "x.sbs", kind, version=version)
    opened = gemma_multi.open_checkpoint(path)
    assert opened.config == original.config
    assert opened.tokenizer == original.tokenizer
    assert opened.precision == {"SFP": "sfp8", "BF16": "bfloat16", "F32": "float32"}[kind]
    assert opened.tensors.infos[EMBEDDING].dtype == "bfloat16"
    assert opened.provenance.source == "x"
    assert opened.provenance.license == "gemma"
    held = {"SFP": "bfloat16, sfp8", "BF16": "bfloat16", "F32": "bfloat16, float32"}[kind]
    assert opened.provenance.modifications == (f"stored for gemma.cpp in {held}",)
    expected = to_precision(original, "sfp8") if kind == "SFP" else original
    for name, info in opened.tensors.infos.items():
        assert info.nbytes == opened.tensors[name].nbytes
        source = original if name == EMBEDDING else expected
        np.testing.assert_array_equal(opened.weight(name), source.weight(name), strict=False)


def test_scales_multiply(tmp_path: Path) -> None:
    original = made()
    scales = {"linear_w_0": 0.3, "c_embedding": 3.0, "qkv_ein_1": 0.25}
    opened = gemma_multi.open_checkpoint(write_sbs(original, tmp_path / "x.sbs", scales=scales))
    down = opened.tensors["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(down, Sfp8Tensor)
    assert down.scale == np.float32(0.3)
    for name, scale in ((EMBEDDING, 3.0), ("model.layers.1.self_attn.v_proj.weight", 0.25)):
        before = original if name == EMBEDDING else to_precision(original, "sfp8")
        expected = before.weight(name).astype(np.float32) * np.float32(scale)
        np.testing.assert_array_equal(opened.weight(name), expected)
    assert opened.tensors.infos[EMBEDDING].dtype == "float32"


@pytest.mark.parametrize("backend", ["mlx", "keras", "litert"])
def test_engines_run_it(backend: str, tmp_path: Path) -> None:
    original = made()
    path = write_sbs(original, tmp_path / "x.sbs", kinds={"c_embedding": "SFP"})
    ids = np.arange(3, 40)
    found, expected = (
        np.asarray(
            gemma_multi.load(model, backend=backend, precision=precision, progress=False)
            .new_session().read(ids, ALL)
        )
        for model, precision in (
            (path, "auto"), (to_precision(to_precision(original, "sfp8"), "float32"), "float32")
        )
    )  # fmt: skip
    if backend == "keras":
        np.testing.assert_allclose(found, expected, atol=2e-2)
    else:
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_it_is_recognised_by_content(tmp_path: Path) -> None:
    path = write_sbs(made(), tmp_path / "model.bin")
    assert gemma_multi.open_checkpoint(path).format == "sbs"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 7}, "is a 'gemma2-2b', expected 'gemma3-270m' or 'gemma3-1b'"),
        ({"model": 14}, "is a 'gemma3-4b'"),
        ({"model": 99}, "is a 'model 99'"),
        ({"without": ("config",)}, "'config' is missing: a file from before 2025"),
        ({"without": ("toc",)}, "blob 'toc' is missing"),
        ({"without": ("linear_w_3",)}, "tensor 'linear_w_3' is missing"),
        ({"without": ("c_embedding",)}, "tensor 'c_embedding' is missing"),
        ({"without": ("qkv_ein_7",)}, "tensor 'qkv1_w_7' or 'qkv_ein_7' is missing"),
        ({"num_layers": 9}, "the number of layers described is 8, but .* 9"),
        ({"vocab_size": 4097}, r"'c_embedding' has shape \[4096, 96\], .* \[4097, 96\]"),
        ({"model_dim": 97}, "model_dim of the layers is 97, but .* 96"),
        ({"ff": 64}, r"'gating_ein_0' has shape \[256, 96\], .* \[128, 96\]"),
        ({"att_cap": 50.0}, "att_cap is 50.0, but a Gemma 3 text model has 0"),
        ({"final_cap": float("inf")}, "has a number that is inf"),
        ({"absolute_pe": 1}, "absolute_pe is True"),
        ({"absolute_pe": 2}, "flag of 2"),
        ({"query_scale": 2}, "query scale of kind 2"),
        ({"post_norm": 0}, "post_norm is 0"),
        ({"use_qk_norm": 0}, "use_qk_norm is False"),
        ({"ff_biases": 1}, "ff_biases is True"),
        ({"post_qk": 1}, "post_qk is 1"),
        ({"vit": [8, 0, 0, 0, 14, 224, 1, 0, 1]}, "the number of vision layers is 1"),
        ({"windows": [8, 1, 2, 3, 4, 5, 6, 7, 8]}, "attention windows of"),
        ({"layers": [1 << 20]}, "a list of 1048576"),
        ({"name": [200]}, "a text of 200"),
        ({"vit": [1 << 30]}, "vit_config claims 1073741824 words"),
        ({"secondary_eos_id": 4096}, "eos_token_id has 4096"),
        ({"kinds": {"linear_w_0": "NUQ"}}, "'linear_w_0' is stored as NUQ, expected F32"),
        ({"kinds": {"key_norm_0": "SFP"}}, "'key_norm_0' is a norm in SFP"),
        ({"scales": {"pre_ff_ns_2": 2.0}}, "'pre_ff_ns_2' is a norm in BF16 with a scale of 2.0"),
        ({"scales": {"linear_w_0": -1.0}}, "'linear_w_0' has a scale of -1.0"),
        ({"extra": {"att_w_0": np.zeros((96, 128), np.float32)}}, "there in two layouts"),
        ({"extra": {"attn_ob_0": np.zeros(96, np.float32)}}, "'attn_ob_0' does not belong"),
        ({"data": {"linear_w_0": b"x"}}, r"has 1 bytes, but SFP \[96, 128\] needs 12288"),
        ({"data": {"config": b"12345"}}, "'config' has 5 bytes, no whole words"),
        ({"data": {"gemma_multi": b"[]"}}, "'gemma_multi' has no JSON object 'config'"),
        ({"data": {"gemma_multi": b"[" * 100_000}}, "'gemma_multi' has no JSON object"),
    ],
)  # fmt: skip
def test_what_is_no_gemma_3_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_sbs(made(), tmp_path / "x.sbs", **changes)
    with pytest.raises(GemmaError, match=message) as caught:
        gemma_multi.open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_weights_that_are_none_are_named_when_they_are_read(tmp_path: Path) -> None:
    original = made()
    reserved = bytes(96 * 127) + b"\x80" + bytes(95)
    path = write_sbs(original, tmp_path / "x.sbs", data={"linear_w_0": reserved})
    opened = gemma_multi.open_checkpoint(path)
    with pytest.raises(CheckpointError, match="'linear_w_0' holds the code 0x80"):
        opened.weight("model.layers.0.mlp.down_proj.weight")
    infinite = np.full(96 * 128, np.inf, np.float32).tobytes()
    path = write_sbs(original, tmp_path / "y.sbs", "F32", data={"linear_w_0": infinite})
    with pytest.raises(CheckpointError, match="'linear_w_0' holds NaN or infinity"):
        gemma_multi.load(path, backend="keras", progress=False)


def test_a_file_without_a_tokenizer_says_so_when_it_is_asked_for(tmp_path: Path) -> None:
    path = write_sbs(made(), tmp_path / "x.sbs", without=("tokenizer",))
    with pytest.raises(TokenizerError, match="blob 'tokenizer' is missing"):
        gemma_multi.open_checkpoint(path).tokenizer  # noqa: B018
    path = write_sbs(made(), tmp_path / "y.sbs", data={"tokenizer": b"unavailable"})
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        gemma_multi.open_checkpoint(path).tokenizer  # noqa: B018


def test_a_damaged_or_foreign_file_keeps_its_name(tmp_path: Path) -> None:
    whole = write_sbs(made(), tmp_path / "whole.sbs").read_bytes()
    blobs = blobs_of(tmp_path / "whole.sbs")
    older = container(blobs, 1)
    directory = len(whole) - 16 - 32 * len(blobs)
    spans = directory + 16 * len(blobs)

    def changed(data: bytes, at: int, new: bytes) -> bytes:
        return data[:at] + new + data[at + len(new) :]

    for content, message in (
        (b"", "too short"), (b"SBS\n", "too short"), (b"x" * 100, "has b'xxxx' at byte 0"),
        (whole[:-1], "has b'.*' at byte"), (whole + whole[-16:], r"claims \d+ bytes, but has"),
        (older[:-1], r"claims \d+ bytes, but has"),
        (changed(whole, len(whole) - 12, b"\0\0\0\0"), "claims 0 blobs"),
        (changed(whole, len(whole) - 12, b"\xff\xff\xff\xff"), "claims 4294967295 blobs"),
        (b"SBS\n" + bytes(12) + struct.pack("<4sIQ", b"SBS\n", 9, 32), "more than its 32 bytes"),
        (changed(whole, directory, whole[directory + 16 : directory + 32]), "is there twice"),
        (changed(whole, directory, bytes(16)), "has no name"),
        (changed(whole, spans, b"\1"), "is not where the one before it ends, at 256"),
        (changed(whole, spans + 8, bytes(8)), "is empty"),
        (changed(whole, len(whole) - 24, b"\xff" * 8), "where there is no room"),
    ):  # fmt: skip
        path = tmp_path / "x.sbs"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            gemma_multi.open_checkpoint(path)
        assert str(path) in str(caught.value)


@pytest.mark.slow
def test_mutated_files_are_refused_by_name_and_never_crash(tmp_path: Path) -> None:
    """500 mutations in four processes (see fuzz_sbs.py)."""
    outcomes: Counter[str] = Counter()
    for i, (kind, version) in enumerate((("SFP", 2), ("BF16", 2), ("F32", 1), ("SFP", 1))):
        source = write_sbs(made(), tmp_path / f"{i}.sbs", kind, version=version)
        outcomes += fuzz("fuzz_sbs.py", source, tmp_path / str(i), i, 125)
    assert sum(outcomes.values()) == 500
    assert outcomes["refused"] > 250, outcomes
    assert outcomes["read"] > 40, outcomes  # weights may be anything finite
