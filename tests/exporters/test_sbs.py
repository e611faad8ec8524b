"""`.sbs` files: what gemma.cpp finds in them by its own source, and that they open as what they
were made of. (Built from that source, it gave logits within 0.13 of ours from such files.)"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import export, speaking
from sbs_files import blobs_of, config_words, converted, table_of
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi import Checkpoint, CheckpointError, OptionError
from gemma_multi.checkpoint import Provenance
from gemma_multi.cli import cli
from gemma_multi.config import EMBEDDING
from gemma_multi.demo import STORY
from gemma_multi.quantization.tensor import Sfp8Tensor, sfp8_tensor
from gemma_multi.transforms import to_precision

V_PROJ = "model.layers.0.self_attn.v_proj.weight"
K_PROJ = "model.layers.0.self_attn.k_proj.weight"


def told(**changes: Any) -> Checkpoint:
    """With something to say in every field that gemma.cpp has none for."""
    made = speaking(**changes)
    return made.replace(
        generation={"temperature": 0.5, "eos_token_id": [1, 106]},
        provenance=Provenance("gemma", "google/some-model", "abc", ("trained",), "Thanks.", "x1"),
        config=made.config.replace(residual_scale=2.0**-4),
    )


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("precision", ["sfp8", "bfloat16"])
def test_a_file_opens_as_what_it_was_made_of(precision: str, heads: int, tmp_path: Path) -> None:
    original = told(num_key_value_heads=heads)
    expected = to_precision(original, precision)
    opened = export(original, tmp_path / "a.sbs", precision=precision)
    assert (opened.format, opened.precision) == ("sbs", precision)
    assert opened.config == original.config
    assert opened.digest() == expected.digest()
    assert opened.generation == original.generation
    assert opened.stop_ids == original.stop_ids
    assert opened.tokenizer == original.tokenizer
    kind = {"sfp8": "SFP", "bfloat16": "BF16"}[precision]
    assert opened.provenance == original.provenance.modified(f"exported for gemma.cpp in {kind}")
    export(opened, tmp_path / "b.sbs")  # auto: as stored
    a, b = blobs_of(tmp_path / "a.sbs"), blobs_of(tmp_path / "b.sbs")
    assert {key for key in a if a[key] != b[key]} == {"gemma_multi", "NOTICE"}


@pytest.mark.parametrize("precision", ["sfp8", "bfloat16"])
def test_gemma_cpp_finds_its_config_and_tensors(precision: str, tmp_path: Path) -> None:
    original = told(num_key_value_heads=2)
    path = tmp_path / "a.sbs"
    report = gemma_multi.export(original, path, precision=precision, progress=False)
    assert (report.format, report.precision, report.nbytes) == (
        "sbs", precision, path.stat().st_size
    )  # fmt: skip
    blobs = blobs_of(path)
    expected = config_words(original, name="some-model", model=15, scale_names=[0],
                            weight=3 if precision == "sfp8" else 2)  # fmt: skip
    assert list(struct.unpack(f"<{len(blobs['config']) // 4}I", blobs["config"])) == expected
    assert blobs["tokenizer"] == original.tokenizer.model
    assert b"Gemma Terms of Use" in blobs["NOTICE"]
    assert b"- exported for gemma.cpp in" in blobs["NOTICE"]
    tensors = table_of(blobs)
    joined = converted(to_precision(original, precision))
    heads, wide = 4 * 32, 96
    for name, whole in joined.items():  # as gemma.cpp takes them apart when it loads
        base, _, layer = name.rpartition("_")
        parts = {name: whole}
        if base == "qkv_ein":
            parts = {f"qkv1_w_{layer}": whole[:heads], f"qkv2_w_{layer}": whole[heads:]}
        elif base == "gating_ein":
            parts = {f"gating1_w_{layer}": whole[:128], f"gating2_w_{layer}": whole[128:]}
        elif base == "att_ein":
            turned = whole.reshape(4, wide, 32).transpose(1, 0, 2).reshape(wide, heads)
            parts = {f"att_w_{layer}": turned}
        for part, weight in parts.items():
            kind, values = tensors.pop(part)
            is_norm = weight.ndim == 1
            assert kind == ("BF16" if is_norm or precision == "bfloat16" else "SFP"), part
            np.testing.assert_array_equal(values.reshape(weight.shape), weight.astype(float))
    assert not tensors


def test_other_precisions_become_bfloat16_and_float32_norms_stay(tmp_path: Path) -> None:
    original = tiny_checkpoint(vocab_size=4096)
    opened = export(original, tmp_path / "a.sbs")
    for name, info in opened.tensors.infos.items():
        dtype = "float32" if len(info.shape) == 1 else "bfloat16"
        assert info.dtype == dtype
        np.testing.assert_array_equal(opened.weight(name), original.weight(name).astype(dtype))


def test_a_mixture_stays_one(tmp_path: Path) -> None:
    made = to_precision(speaking(), "bfloat16")
    mixed = made.with_tensors(
        {name: sfp8_tensor(made.weight(name)) for name in (EMBEDDING, K_PROJ)}
    )
    opened = export(mixed, tmp_path / "a.sbs")
    assert opened.tensors.infos[EMBEDDING].dtype == "sfp8"
    assert opened.tensors.infos[K_PROJ].dtype == "bfloat16"  # beside values in bfloat16
    np.testing.assert_array_equal(opened.weight(K_PROJ), mixed.weight(K_PROJ), strict=False)


def test_scales_are_kept_and_keys_and_values_share_one(tmp_path: Path) -> None:
    made = to_precision(speaking(), "sfp8")
    codes = made.tensors[V_PROJ]
    assert isinstance(codes, Sfp8Tensor)
    large = made.with_tensors({V_PROJ: Sfp8Tensor(codes.codes, 4.0),
                               EMBEDDING: sfp8_tensor(made.weight(EMBEDDING) * 9)})  # fmt: skip
    opened = export(large, tmp_path / "a.sbs")
    for name in (V_PROJ, EMBEDDING):
        assert opened.tensors[name] == large.tensors[name]
    assert opened.tensors[K_PROJ] == sfp8_tensor(made.weight(K_PROJ), 4.0)
    assert export(opened, tmp_path / "b.sbs").digest() == opened.digest()
    odd = large.with_tensors({EMBEDDING: Sfp8Tensor(made.tensors[EMBEDDING].codes, 0.3)})  # type: ignore[union-attr]
    again = export(odd, tmp_path / "c.sbs").tensors[EMBEDDING]
    assert again == odd.tensors[EMBEDDING]


def test_the_storyteller_answers_from_a_file_as_from_memory(tmp_path: Path) -> None:
    path = tmp_path / "storyteller.sbs"
    gemma_multi.export("storyteller", path, precision="sfp8", progress=False)
    options = {"backend": "keras", "progress": False}
    from_file = gemma_multi.load(path, **options)
    in_memory = gemma_multi.load("storyteller", precision="sfp8", **options)
    assert from_file.engine.precision == "sfp8"
    answers = [
        model.generate(STORY, temperature=0, max_tokens=40).text for model in (from_file, in_memory)
    ]
    assert answers[0] == answers[1] != ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_pre_attn_scalar": 100.0}, "query_pre_attn_scalar is 100.0, but .* 32 or 24"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, but gemma.cpp computes with 1e-06"),
        ({"rope_theta": 5e5}, r"rope_theta is 500000.0, .* 1e\+06 or 10000"),
        ({"rope_local_theta": 2e4}, "rope_local_base_freq is 20000.0, .* 10000"),
        ({"rope_scaling_factor": 8.0}, "rope_scaling factor is 8.0, .* with 1,"),
        ({"bos_token_id": 3}, "bos_token_id is 3, .* 2,"),
        ({"embedding_scale": 1.0}, "embedding_scale is 1.0, but gemma.cpp multiplies by 9.79"),
        ({"sliding_window": 256}, "sliding_window is 256, all positions"),
        ({"eos_token_ids": (1, 106, 50)}, r"answers end at the tokens \[1, 50, 106\]"),
    ],
)
def test_what_gemma_cpp_would_compute_otherwise_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = speaking()
    checkpoint = checkpoint.replace(config=checkpoint.config.replace(**changes))
    with pytest.raises(CheckpointError, match=message):
        gemma_multi.export(checkpoint, tmp_path / "a.sbs", progress=False)
    assert not list(tmp_path.iterdir())


def test_the_models_id_is_the_one_that_rotates_as_the_checkpoint(tmp_path: Path) -> None:
    made = speaking()
    for theta, model in ((1e6, 15), (1e4, 18)):
        path = tmp_path / f"{model}.sbs"
        opened = export(made.replace(config=made.config.replace(rope_theta=theta)), path)
        assert opened.config.rope_theta == theta
        found = struct.unpack_from("<8I", blobs_of(path)["config"])
        assert found[3 + found[2]] == model


def test_options_are_checked_and_wrapping_is_written(tmp_path: Path) -> None:
    for options, message in (
        ({"precision": "int4"}, "precision is 'int4', expected one of auto, sfp8, bfloat16"),
        ({"wrapping": "chat"}, "wrapping is 'chat', expected one of it, pt"),
        ({"context_length": 8}, "format 'sbs' takes no option 'context_length'"),
    ):
        with pytest.raises(OptionError, match=message):
            gemma_multi.export(speaking(), tmp_path / "a.sbs", progress=False, **options)
    path = tmp_path / "base.sbs"
    reported: list[tuple[int, int]] = []
    gemma_multi.export(
        speaking(), path, wrapping="pt", progress=lambda done, total: reported.append((done, total))
    )
    found = struct.unpack_from("<12I", blobs_of(path)["config"])
    assert found[4 + found[2]] == 1
    total = speaking().config.num_parameters
    assert reported[-1] == (total, total)
    assert reported == sorted(reported)
    with pytest.raises(OptionError, match="exists already"):
        gemma_multi.export(speaking(), path, progress=False)


def test_a_name_that_is_not_ascii_is_spelled_without(tmp_path: Path) -> None:
    named = speaking().replace(provenance=Provenance(source="日本/モデル"))
    gemma_multi.export(named, tmp_path / "a.sbs", progress=False)
    assert b"Gemma 3" in blobs_of(tmp_path / "a.sbs")["config"]


def test_the_command_line_writes_and_describes_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "a.sbs")
    asked = ["export", "storyteller", "-o", path, "--precision", "sfp8", "--json"]
    cli.main(asked, standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["precision"] == "sfp8"
    cli.main(["info", path, "--json"], standalone_mode=False)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["stored_as"], facts["grid"]) == ("sfp8", "none")
