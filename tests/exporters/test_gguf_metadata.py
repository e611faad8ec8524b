"""The metadata of exported `.gguf` files: what llama.cpp is told, and what only we read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
from gguf_files import entries, export, speaking
from tiny import tiny_checkpoint, tokenizer
from tools.test_tools import function_gemma

import gemma_multi
from gemma_multi import chat_template
from gemma_multi.checkpoint import Provenance
from gemma_multi.config import FULL, SLIDING
from gemma_multi.exporters import save
from gemma_multi.formats.gguf import layout
from gemma_multi.transforms import quantize_checkpoint


def test_the_metadata_are_those_of_llama_cpps_converter(tmp_path: Path) -> None:
    flags = [i % 3 != 1 for i in range(8)]
    dense = speaking(
        layer_types=tuple(SLIDING if flag else FULL for flag in flags),
        rope_local_theta=5000.0, rope_scaling_factor=8.0,
    )  # fmt: skip
    checkpoint = quantize_checkpoint(dense)[0].replace(
        provenance=Provenance(source="google/gemma-3-270m", modifications=("merged",)),
        generation={"do_sample": False, "top_k": 5},
    )  # fmt: skip
    export(checkpoint, tmp_path / "m.gguf")
    data = entries(tmp_path / "m.gguf")
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
    data = entries(tmp_path / "m.gguf")
    for key in ("attention.sliding_window_pattern", "rope.freq_base_swa", "rope.scaling.type"):
        assert f"gemma3.{key}" not in data
    assert "general.quantization_version" not in data
    assert data["general.file_type"] == gguf.LlamaFileType.ALL_F32
    assert layout.NORMS not in data  # bfloat16 norms are found again without


def test_a_model_without_sliding_layers_says_that_there_is_no_window(tmp_path: Path) -> None:
    opened = export(speaking(layer_types=(FULL,) * 8), tmp_path / "m.gguf")
    assert entries(tmp_path / "m.gguf")["gemma3.attention.sliding_window"] == 0
    assert opened.config.layer_types == (FULL,) * 8
    all_slide = export(speaking(layer_types=(SLIDING,) * 8), tmp_path / "n.gguf")
    assert all_slide.config.layer_types == (SLIDING,) * 8


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
    tokens = entries(tmp_path / "m.gguf")["tokenizer.ggml.tokens"]
    assert len(tokens) == rows
    assert opened.tokenizer.vocab_size == pieces
    assert tokens[-1].startswith("[PAD") == (rows > pieces)
    assert max(opened.tokenizer.encode("Once upon a time there was a fox.")) < pieces


def test_functiongemmas_answers_end_where_a_response_begins(tmp_path: Path) -> None:
    checkpoint = function_gemma()
    response = checkpoint.tokenizer.id("<start_function_response>")
    opened = export(checkpoint, tmp_path / "m.gguf")
    assert entries(tmp_path / "m.gguf")["tokenizer.ggml.eom_token_id"] == response
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
    template = entries(tmp_path / "m.gguf")["tokenizer.chat_template"]
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
    assert entries(tmp_path / "one.gguf")["tokenizer.chat_template"] == "{{ config }}"
    export(tmp_path / "one.gguf", tmp_path / "two.gguf")
    assert entries(tmp_path / "two.gguf")["tokenizer.chat_template"] == "{{ config }}"
    (source / "chat_template.jinja").write_text("{{ file }}")
    export(source, tmp_path / "three.gguf")
    assert entries(tmp_path / "three.gguf")["tokenizer.chat_template"] == "{{ file }}"
