"""`.gguf` files: what other readers find in them, and that they open as what they were made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jinja2
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_gguf
from tiny import tiny_checkpoint, tokenizer
from tools.test_tools import function_gemma

import gemma_multi
from gemma_multi import Checkpoint, CheckpointError, OptionError, chat_template
from gemma_multi.checkpoint import Provenance
from gemma_multi.cli import cli
from gemma_multi.config import EMBEDDING, FULL, SLIDING
from gemma_multi.demo import STORY
from gemma_multi.exporters import save
from gemma_multi.formats.gguf import layout
from gemma_multi.formats.gguf.layout import stored_name
from gemma_multi.quantization.tensor import BFLOAT16, QuantizedTensor, pack
from gemma_multi.transforms import quantize_checkpoint

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"
TEXTS = ("Once upon a time", "  two  spaces\n\n\nand <unused7> lines", "naïve 日本 🦜", "<b>\t</b>")


def speaking(**changes: Any) -> Checkpoint:
    """With a row for each piece of its tokenizer, and norms in bfloat16 as Gemma's are."""
    checkpoint = tiny_checkpoint(vocab_size=4096, **changes)
    return checkpoint.with_tensors(
        {n: t.astype(BFLOAT16) for n, t in checkpoint.tensors.items() if t.ndim == 1}
    )


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


def export(checkpoint: Any, path: Path, **options: Any) -> Checkpoint:
    gemma_multi.export(checkpoint, path, progress=False, **options)
    return gemma_multi.open_checkpoint(path)


def theirs(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as the gguf package reads and dequantises it."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32).reshape(
            [int(n) for n in t.shape[::-1]]
        )
        for t in gguf.GGUFReader(path).tensors
    }  # fmt: skip


def metadata(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


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
    found, in_mlx = theirs(path), mx.load(str(path))
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


# metadata


def test_the_metadata_are_those_of_llama_cpps_converter(tmp_path: Path) -> None:
    flags = [i % 3 != 1 for i in range(8)]
    checkpoint = int4(
        layer_types=tuple(SLIDING if flag else FULL for flag in flags),
        rope_local_theta=5000.0, rope_scaling_factor=8.0,
    ).replace(
        provenance=Provenance(source="google/gemma-3-270m", modifications=("merged",)),
        generation={"do_sample": False, "top_k": 5},
    )  # fmt: skip
    export(checkpoint, tmp_path / "m.gguf")
    data = metadata(tmp_path / "m.gguf")
    for key, expected in {
        "general.architecture": "gemma3",
        "general.type": "model",
        "general.name": "gemma-3-270m",
        "general.license": "gemma",
        "general.license.link": "https://ai.google.dev/gemma/terms",
        "general.source.huggingface.repository": "google/gemma-3-270m",
        "general.source.url": "https://huggingface.co/google/gemma-3-270m",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0,
        "general.quantization_version": 2,
        "general.sampling.temp": 0.0,
        "general.sampling.top_k": 5,
        "gemma3.context_length": 256,
        "gemma3.embedding_length": 96,
        "gemma3.block_count": 8,
        "gemma3.feed_forward_length": 128,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 1,
        "gemma3.attention.key_length": 32,
        "gemma3.attention.value_length": 32,
        "gemma3.attention.sliding_window": 16,
        "gemma3.attention.sliding_window_pattern": flags,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 5000.0,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 106,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }.items():
        assert data[key] == expected, key
    assert np.float32(data["gemma3.attention.layer_norm_rms_epsilon"]) == np.float32(1e-6)
    notice = data["gemma_multi.notice"]
    assert "Gemma Terms of Use found at\nhttps://ai.google.dev/gemma/terms" in notice
    assert "- merged\n- quantised" not in notice  # the list is as it was found
    assert notice.endswith("- merged\n- exported as GGUF in Q4_0\n")
    pieces = {data["tokenizer.ggml.tokens"][i]: data["tokenizer.ggml.token_type"][i]
              for i in (0, 3, 7, 105, 106, 108, 109, 369)}  # fmt: skip
    assert pieces == {"<pad>": 3, "<unk>": 2, "<unused1>": 3, "<start_of_turn>": 3,
                      "<end_of_turn>": 3, "\n\n": 4, "<0x00>": 6, "▁the": 1}  # fmt: skip
    assert data["tokenizer.ggml.scores"][369] == -4


def test_what_the_architecture_has_anyway_is_not_said(tmp_path: Path) -> None:
    export(speaking(), tmp_path / "m.gguf")
    data = metadata(tmp_path / "m.gguf")
    for key in ("attention.sliding_window_pattern", "rope.freq_base_swa", "rope.scaling.type"):
        assert f"gemma3.{key}" not in data
    assert "general.quantization_version" not in data
    assert data["general.file_type"] == gguf.LlamaFileType.ALL_F32
    assert layout.NORMS not in data  # bfloat16 norms are found again without


def test_a_model_without_sliding_layers_says_that_there_is_no_window(tmp_path: Path) -> None:
    opened = export(speaking(layer_types=(FULL,) * 8), tmp_path / "m.gguf")
    assert metadata(tmp_path / "m.gguf")["gemma3.attention.sliding_window"] == 0
    assert opened.config.layer_types == (FULL,) * 8
    all_slide = export(speaking(layer_types=(SLIDING,) * 8), tmp_path / "n.gguf")
    assert all_slide.config.layer_types == (SLIDING,) * 8


def test_norms_changed_since_are_read_as_they_are_now(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    original = export(float32_norms(), path)
    assert layout.NORMS in metadata(path)
    (gain,) = (t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.2.attn_norm.weight")
    gain.data[:] = 3.0
    gain.data.base.flush()
    opened = gemma_multi.open_checkpoint(path)
    assert (opened.weight(NORM) == 2).all()
    assert opened.weight(UP).tobytes() == original.weight(UP).tobytes()


def test_keys_of_ours_that_were_damaged(tmp_path: Path) -> None:
    """Without its account a file is read as another's; a config that is not whole is refused."""
    path = tmp_path / "m.gguf"
    export("storyteller", path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"license": ', b'"licence": '))
    provenance = gemma_multi.open_checkpoint(path).provenance
    assert (provenance.license, provenance.source) == ("apache-2.0", "storyteller")
    assert provenance.modifications == ("stored as GGUF in Q4_0",)
    for before, after, message in (
        (b'{"dtype"', b'["dtype"', "gemma_multi.config is no JSON object"),
        (b'"dtype": "bfloat16"', b'"dtype": "bfloat17"', "dtype is 'bfloat17'"),
        (b'"do_sample"', b'"do_sample', "gemma_multi.generation is no JSON object"),
        (b'[1, 106], "pad', b'[1, "6"], "pad', r"generation: eos_token_id is \[1, '6'\], expected"),
    ):
        assert before in whole
        path.write_bytes(whole.replace(before, after.ljust(len(before))))
        with pytest.raises(gemma_multi.GemmaError, match=message) as caught:
            gemma_multi.open_checkpoint(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(("rows", "pieces"), [(4200, 4096), (3000, 3000)])
def test_as_many_pieces_as_rows(rows: int, pieces: int, tmp_path: Path) -> None:
    opened = export(tiny_checkpoint(vocab_size=rows), tmp_path / "m.gguf")
    tokens = metadata(tmp_path / "m.gguf")["tokenizer.ggml.tokens"]
    assert len(tokens) == rows
    assert opened.tokenizer.vocab_size == pieces
    assert tokens[-1].startswith("[PAD") == (rows > pieces)
    assert max(opened.tokenizer.encode("Once upon a time there was a fox.")) < pieces


def test_functiongemmas_answers_end_where_a_response_begins(tmp_path: Path) -> None:
    checkpoint = function_gemma()
    response = checkpoint.tokenizer.id("<start_function_response>")
    opened = export(checkpoint, tmp_path / "m.gguf")
    assert metadata(tmp_path / "m.gguf")["tokenizer.ggml.eom_token_id"] == response
    assert opened.stop_ids == checkpoint.stop_ids == {1, 106, response}


# the chat template

CONVERSATIONS = [
    [{"role": "user", "content": "  Hello \n there \n"}],
    [
        {"role": "system", "content": " Be kind.\n"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": " Hi. "},
        {"role": "user", "content": "Bye"},
    ],
]


def rendered(template: str, messages: Any) -> str:
    made = jinja2.Environment().from_string(template)
    return made.render(messages=messages, bos_token="<bos>", add_generation_prompt=True)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_template_says_what_our_prompts_say(
    messages: list[dict[str, str]], tmp_path: Path
) -> None:
    export(speaking(), tmp_path / "m.gguf")
    template = metadata(tmp_path / "m.gguf")["tokenizer.chat_template"]
    text, spoken = rendered(template, messages), tokenizer()
    ids = chat_template.encode_prompt(spoken, messages)
    spelt = {spoken.bos_id, spoken.start_of_turn_id, spoken.end_of_turn_id}
    assert text == "".join(spoken.piece(i) if i in spelt else spoken.decode([i]) for i in ids)
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert rendered(template, parts) == text


def test_the_sources_own_template_goes_along(tmp_path: Path) -> None:
    source = save(speaking(), tmp_path / "source")
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ config }}"}))
    export(source, tmp_path / "one.gguf")
    assert metadata(tmp_path / "one.gguf")["tokenizer.chat_template"] == "{{ config }}"
    export(tmp_path / "one.gguf", tmp_path / "two.gguf")
    assert metadata(tmp_path / "two.gguf")["tokenizer.chat_template"] == "{{ config }}"
    (source / "chat_template.jinja").write_text("{{ file }}")
    export(source, tmp_path / "three.gguf")
    assert metadata(tmp_path / "three.gguf")["tokenizer.chat_template"] == "{{ file }}"


# the storyteller


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
