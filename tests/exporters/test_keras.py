"""Keras presets: the same bits again, what keras-hub makes of them, and damaged ones refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from in_keras_hub import read_by_keras_hub
from tiny import edit_json, noisy_storyteller, tiny_checkpoint, tokenizer

import gemma_multi
from gemma_multi import CheckpointError, ConfigError, OptionError, TokenizerError, open_checkpoint
from gemma_multi.config import FULL
from gemma_multi.engines import ALL, create_engine
from gemma_multi.transforms import to_precision

TEXT = "The quick brown fox, in a kettle.\n"


def exported(checkpoint, path: Path, **options) -> Path:
    return gemma_multi.export(checkpoint, path, format="keras", progress=False, **options).path


@pytest.mark.slow
def test_keras_hub_gives_the_same_logits(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(
        vocab_size=4096, num_hidden_layers=7, rope_scaling_factor=8.0, residual_scale=0.25
    )
    path = exported(checkpoint, tmp_path / "x")
    read, logits = read_by_keras_hub(path, TEXT, tmp_path / "found", more=True)
    ids = [tokenizer().bos_id, *tokenizer().encode(TEXT)]
    assert read == ids
    ours = create_engine(open_checkpoint(path), "keras", "float32").session().read(ids, ALL)
    np.testing.assert_allclose(logits, ours, rtol=0, atol=1e-3)
    again = open_checkpoint(tmp_path / "found.preset")  # as keras-hub itself writes it
    assert again.tensors == checkpoint.tensors
    kept = again.config.replace(max_position_embeddings=256, residual_scale=0.25)
    assert kept == checkpoint.config


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_opens_as_the_same_bits(precision: str, tmp_path: Path) -> None:
    checkpoint = to_precision(tiny_checkpoint(vocab_size=4096, dtype="bfloat16"), precision)
    opened = open_checkpoint(exported(checkpoint, tmp_path / "x"))
    assert opened == checkpoint
    assert (opened.format, opened.precision) == ("keras", precision)
    assert opened.provenance.modifications[-1] == f"exported as a Keras preset in {precision}"
    back = gemma_multi.export(opened, tmp_path / "y", format="huggingface", progress=False)
    assert open_checkpoint(back.path) == checkpoint
    vocabulary = json.loads((back.path / "tokenizer.json").read_text())
    assert vocabulary["model"]["vocab"]["<bos>"] == 2  # not the preset's file of that name


def test_types_that_differ_stay_as_they_are(tmp_path: Path) -> None:
    checkpoint = to_precision(tiny_checkpoint(vocab_size=4096), "bfloat16")
    norm = "model.norm.weight"
    mixed = checkpoint.with_tensors({norm: checkpoint.weight(norm).astype(np.float32)})
    assert open_checkpoint(exported(mixed, tmp_path / "x")) == mixed


def test_int4_is_exact_in_float32(tmp_path: Path) -> None:
    int4 = open_checkpoint("storyteller")
    report = gemma_multi.export(int4, tmp_path / "x", format="keras", progress=False)
    assert report.precision == "float32"
    opened = open_checkpoint(report.path)
    assert opened.config == int4.config
    for name in int4.tensors:
        np.testing.assert_array_equal(opened.weight(name), int4.weight(name).astype(np.float32))
    assert "storyteller" in (report.path / "NOTICE").read_text()


def test_a_preset_runs_as_it_is(tmp_path: Path) -> None:
    path = exported(noisy_storyteller(), tmp_path / "x", precision="bfloat16")
    expected = gemma_multi.load(to_precision(noisy_storyteller(), "bfloat16"), backend="mlx")
    model = gemma_multi.load(path, backend="mlx")
    assert model.generate("Hello", max_tokens=8, seed=1).tokens == (
        expected.generate("Hello", max_tokens=8, seed=1).tokens
    )


def test_progress_is_told_to_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    checkpoint = tiny_checkpoint()
    gemma_multi.export(
        checkpoint,
        tmp_path / "x",
        format="keras",
        progress=lambda done, all: told.append((done, all)),
    )
    assert told[-1] == (checkpoint.config.num_parameters,) * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"layer_types": (FULL,) * 8}, "layer_types is"),
     ({"rope_theta": 5e5}, "rope_theta is 500000.0, but keras-hub computes with 1000000.0"),
     ({"rope_local_theta": 5e3}, "rope_local_base_freq is 5000.0"),
     ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
     ({"query_pre_attn_scalar": 48.0}, "query_pre_attn_scalar is 48.0.*with 32 for"),
     ({"embedding_scale": 1.0}, r"embedding_scale is 1\.0")],
)  # fmt: skip
def test_what_keras_hub_would_compute_otherwise_is_refused(
    changes: dict, words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        exported(tiny_checkpoint(**changes), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="precision is 'int4', expected one of auto, bfloat16"):
        exported(tiny_checkpoint(), tmp_path / "x", precision="int4")


# what may be wrong with a preset


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    return exported(tiny_checkpoint(), tmp_path / "preset")


KEY = "layers/gemma3_decoder_block_2/attention/key_dense/vars"


def edit_backbone(path: Path, **changes) -> None:
    data = json.loads((path / "config.json").read_text())
    data["config"].update(changes)
    (path / "config.json").write_text(json.dumps(data))


def replaced(value: np.ndarray, **how) -> Callable[[Path], None]:
    """Another dataset in the place of one."""

    def damage(path: Path) -> None:
        with h5py.File(path / "model.weights.h5", "a") as file:
            del file[f"{KEY}/0"]
            file[KEY].create_dataset("0", data=value, **how)

    return damage


def linked(link) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with h5py.File(path / "model.weights.h5", "a") as file:
            del file[f"{KEY}/0"]
            file[f"{KEY}/0"] = link

    return damage


def cut(path: Path) -> None:
    data = (path / "model.weights.h5").read_bytes()
    (path / "model.weights.h5").write_bytes(data[: len(data) * 2 // 3])


def removed(path: Path) -> None:
    with h5py.File(path / "model.weights.h5", "a") as file:
        del file[f"{KEY}/0"]


def added(path: Path) -> None:
    with h5py.File(path / "model.weights.h5", "a") as file:
        file["layers/dense/vars/0"] = np.zeros(3)


def emptied(path: Path) -> None:
    with h5py.File(path / "model.weights.h5", "a") as file:
        del file[f"{KEY}/0"]
        file[KEY].create_group("0")


def sharded(path: Path) -> None:
    (path / "model.weights.h5").rename(path / "model_00000.weights.h5")
    (path / "model.weights.json").write_text("{}")


FINE = np.zeros((1, 96, 32), np.float32)
DAMAGES = {
    "truncated": (cut, "model.weights.h5: cannot be read as HDF5"),
    "no HDF5": (lambda path: (path / "model.weights.h5").write_bytes(b"x" * 999), "as HDF5"),
    "no weights": (lambda path: (path / "model.weights.h5").unlink(), "weights are missing"),
    "shards": (sharded, "weights are in shards"),
    "a dataset too few": (removed, f"'{KEY}/0' is missing"),
    "a dataset too many": (added, "'layers/dense/vars/0' does not belong"),
    "a group for a dataset": (emptied, f"'{KEY}/0' is no dataset"),
    "another shape": (replaced(FINE[:, :95]), r"shape \[1, 95, 32\], but config.json implies"),
    "another type": (replaced(FINE.astype(np.int8)), "has dtype int8.*before it is quantised"),
    "other byte order": (replaced(FINE.astype(">f4")), "has dtype >f4"),
    "NaN": (replaced(FINE * np.nan), "holds NaN"),
    "compressed": (replaced(FINE, compression="gzip"), "not stored in one piece"),
    "elsewhere": (replaced(FINE, external=[("/dev/zero", 0, FINE.nbytes)]), "in one piece"),
    "a link out": (linked(h5py.ExternalLink("/etc/passwd", "/")), "is a link to elsewhere"),
    "a soft link": (linked(h5py.SoftLink("/layers")), "is a link to elsewhere"),
    "another class": (
        lambda path: edit_json(path / "config.json", class_name="GemmaBackbone"),
        "class 'GemmaBackbone', expected keras-hub's 'Gemma3Backbone'",
    ),
    "keras-hub's defaults": (
        lambda path: edit_backbone(path, use_post_ffw_norm=False), "use_post_ffw_norm is False",
    ),
    "another query scale": (
        lambda path: edit_backbone(path, query_head_dim_normalize=False), "normalize is False",
    ),
    "pictures": (lambda path: edit_backbone(path, vision_encoder={}), "vision_encoder is {}"),
    "a size of text": (lambda path: edit_backbone(path, hidden_dim="96"), "hidden_size is '96'"),
    "a size of lists": (lambda path: edit_backbone(path, num_query_heads=[4]), "heads is"),
    "huge": (lambda path: edit_backbone(path, vocabulary_size=1 << 31), "config.json implies"),
    "endless layers": (lambda path: edit_backbone(path, num_layers=10**9), "num_hidden_layers is"),
    "scaling of text": (
        lambda path: edit_backbone(path, global_rope_scaling_factor="x"), "factor",
    ),
    "our entry": (
        lambda path: edit_json(path / "metadata.json", gemma_multi=3), "gemma_multi is 3",
    ),
    "our scale": (
        lambda path: edit_json(path / "metadata.json", gemma_multi={"residual_scale": 3}),
        "residual_scale is 3",
    ),
    "stop ids": (
        lambda path: edit_json(path / "generation_config.json", eos_token_id="x"), "eos_token_id",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_presets_are_refused_with_a_sentence(name: str, preset: Path) -> None:
    damage, words = DAMAGES[name]
    damage(preset)
    with pytest.raises((CheckpointError, ConfigError), match=words):
        open_checkpoint(preset)


def test_a_vocabulary_that_is_none_is_refused(preset: Path) -> None:
    vocabulary = preset / "assets" / "tokenizer" / "vocabulary.spm"
    vocabulary.write_bytes(b"x")
    checkpoint = open_checkpoint(preset)
    with pytest.raises(TokenizerError, match=r"vocabulary\.spm: not a SentencePiece model"):
        _ = checkpoint.tokenizer
    vocabulary.unlink()
    checkpoint = open_checkpoint(preset)
    with pytest.raises(TokenizerError, match=r"vocabulary\.spm: cannot be read"):
        _ = checkpoint.tokenizer


def test_a_preset_without_our_entry_is_read_as_keras_computes_it(preset: Path) -> None:
    edit_json(preset / "metadata.json", gemma_multi=None)
    config = open_checkpoint(preset).config
    assert (config.dtype, config.max_position_embeddings) == ("float32", 32768)
    policy = {"class_name": "DTypePolicy", "config": {"name": "mixed_bfloat16"}}
    edit_backbone(preset, dtype=policy)
    assert open_checkpoint(preset).config.dtype == "bfloat16"
