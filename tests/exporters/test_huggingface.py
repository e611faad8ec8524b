"""Hugging Face and mlx-lm directories: their companions, and what the real consumers make of them.

The tokenizer is read by `tokenizers` alone; what needs torch runs in `make reference`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jinja2
import numpy as np
import pytest
import tokenizers
from huggingface_hub import metadata_load
from sentencepiece import sentencepiece_model_pb2 as schema
from test_tokenizer_json import CHAT, RUNS
from tiny import random_checkpoint, tiny_checkpoint, tiny_config, tokenizer
from varied_text import samples

import gemma_multi
from gemma_multi import open_checkpoint
from gemma_multi.chat_template import encode_prompt
from gemma_multi.checkpoint import Provenance
from gemma_multi.engines import ALL, create_engine
from gemma_multi.sentencepiece_model import FUNCTION_PIECES
from gemma_multi.tokenizer import Tokenizer

HUB = Provenance(source="google/gemma-3-270m-it", revision="abc123")
reference = pytest.mark.skipif(
    not os.environ.get("GEMMA_MULTI_REFERENCE"), reason="needs torch; `make reference` runs it"
)


def exported(checkpoint, path: Path, format: str = "huggingface", **options) -> Path:
    return gemma_multi.export(checkpoint, path, format=format, progress=False, **options).path


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("format", ["huggingface", "mlx"])
def test_what_lies_beside_the_weights(format: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(vocab_size=4096).replace(provenance=HUB)
    path = exported(checkpoint, tmp_path / "x", format, precision="bfloat16")
    assert {file.name for file in path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.model",
        "tokenizer.json", "tokenizer_config.json", "README.md", "NOTICE", "provenance.json",
    }  # fmt: skip
    assert read(path / "generation_config.json") == {"eos_token_id": [1, 106]}
    theirs = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in [*RUNS, *samples(300)]:
        ids = tokenizer().encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.encode(text).ids == [tokenizer().bos_id, *ids]
    template = jinja2.Template(read(path / "tokenizer_config.json")["chat_template"])
    prompt = template.render(messages=CHAT, bos_token="<bos>", add_generation_prompt=True)
    ids = theirs.encode(prompt, add_special_tokens=False).ids
    assert ids == encode_prompt(tokenizer(), CHAT)


def test_the_card_says_whose_the_weights_are_and_what_was_done(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(vocab_size=4096).replace(provenance=HUB.modified("fine-tuned"))
    card = exported(checkpoint, tmp_path / "x", precision="bfloat16") / "README.md"
    assert metadata_load(card) == {
        "license": "gemma", "base_model": HUB.source, "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["gemma3", "gemma-multi", "bfloat16"],
    }  # fmt: skip
    text = card.read_text()
    for part in ("revision `abc123`", "- fine-tuned\n- converted to bfloat16", "`NOTICE`",
                 "https://ai.google.dev/gemma/terms", "from transformers", "load("):  # fmt: skip
        assert part in text


def test_the_card_of_int4_and_of_what_comes_from_no_hub(tmp_path: Path) -> None:
    int4 = open_checkpoint("storyteller")
    data = metadata_load(exported(int4, tmp_path / "x", "mlx") / "README.md")
    assert (data["license"], data["library_name"]) == ("apache-2.0", "mlx")
    assert "int4" in data["tags"]
    assert "base_model" not in data
    data = metadata_load(
        exported(int4.replace(provenance=HUB), tmp_path / "y", "mlx") / "README.md"
    )
    assert data["base_model_relation"] == "quantized"


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_what_is_stored_is_what_the_config_says(precision: str, tmp_path: Path) -> None:
    """transformers loads weights in that type; the embedding scale is the trained type's."""
    checkpoint = tiny_checkpoint(hidden_size=224, dtype="bfloat16")
    path = exported(checkpoint, tmp_path / "x", precision=precision)
    config = read(path / "config.json")
    assert (config["dtype"], config["torch_dtype"]) == (precision, precision)
    opened = open_checkpoint(path)
    assert opened.config == checkpoint.config
    assert opened.precision == precision
    assert ("In float32 transformers" in (path / "README.md").read_text()) == (
        precision == "float32"
    )


def test_an_answer_of_functiongemma_ends_where_a_response_begins(tmp_path: Path) -> None:
    proto = schema.ModelProto.FromString(tokenizer().model)
    for piece in FUNCTION_PIECES:
        proto.pieces.add(piece=piece, type=4)
    knows = Tokenizer(proto.SerializeToString())
    checkpoint = tiny_checkpoint(vocab_size=knows.vocab_size)
    checkpoint = checkpoint.replace(make_tokenizer=lambda: knows)
    path = exported(checkpoint, tmp_path / "x")
    response = knows.id("<start_function_response>")
    assert read(path / "generation_config.json")["eos_token_id"] == [1, 106, response]
    assert open_checkpoint(path) == checkpoint


def test_a_template_and_settings_of_the_source_go_along(tmp_path: Path) -> None:
    source = exported(tiny_checkpoint(vocab_size=4096), tmp_path / "x")
    (source / "chat_template.jinja").write_text("{{ theirs }}")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    path = exported(source, tmp_path / "y")
    assert (path / "chat_template.jinja").read_text() == "{{ theirs }}"
    settings = read(path / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "GemmaTokenizer"
    assert settings["chat_template"] == "{{ theirs }}"
    assert settings["bos_token"] == "<bos>"
    assert (path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_tokenizer_of_another_kind_goes_without_a_tokenizer_json(tmp_path: Path) -> None:
    proto = schema.ModelProto.FromString(tokenizer().model)
    proto.normalizer_spec.add_dummy_prefix = True
    prefixed = Tokenizer(proto.SerializeToString())
    checkpoint = tiny_checkpoint(vocab_size=4096).replace(make_tokenizer=lambda: prefixed)
    path = exported(checkpoint, tmp_path / "x")
    assert not (path / "tokenizer.json").exists()
    assert open_checkpoint(path) == checkpoint


def test_more_rows_than_pieces_keep_the_tokenizer_they_had(tmp_path: Path) -> None:
    """Its tokenizer.json was made from it, and knows no more."""
    checkpoint = tiny_checkpoint(vocab_size=4160)
    assert open_checkpoint(exported(checkpoint, tmp_path / "x")) == checkpoint


def test_mlx_lm_generates_from_what_is_written(tmp_path: Path) -> None:
    """It reads the tokenizer through transformers, and stops where generation_config.json says."""
    mlx_lm = pytest.importorskip("mlx_lm")
    path = exported("storyteller", tmp_path / "x", "mlx")
    model, theirs = mlx_lm.load(str(path))
    assert theirs.eos_token_ids == {1, 106}
    prompt = theirs.apply_chat_template(CHAT[1:2], add_generation_prompt=True, return_dict=False)
    assert prompt == encode_prompt(tokenizer(), CHAT[1:2])
    text = mlx_lm.generate(model, theirs, prompt, max_tokens=12)
    ours = gemma_multi.load(path, backend="mlx").generate("Hello", max_tokens=12, temperature=0)
    assert text.strip() == ours.text.strip()
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(path), "--max-tokens",
               "12", "--prompt", "Hello", "--temp", "0"]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert ours.text.strip() in said


@reference
def test_transformers_loads_it_and_agrees(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = random_checkpoint(tiny_config(vocab_size=4096))
    path = exported(checkpoint, tmp_path / "x")
    theirs = AutoTokenizer.from_pretrained(path)
    for text in [*RUNS, *samples(300)]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer().encode(text)
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids == encode_prompt(tokenizer(), CHAT)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == [1, 106]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    ours = create_engine(open_checkpoint(path), "keras", "float32").session().read(ids, ALL)
    np.testing.assert_allclose(logits, ours, rtol=0, atol=2e-4)


@reference
def test_transformers_runs_bfloat16_with_the_embedding_scale_it_was_trained_with(
    tmp_path: Path,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = exported("storyteller", tmp_path / "x", precision="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    scale = model.get_input_embeddings().embed_scale.to(torch.bfloat16)
    assert float(scale) == open_checkpoint(path).config.embedding_scale


@reference
def test_trl_trains_it_and_what_it_saves_opens(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    checkpoint = random_checkpoint(tiny_config(vocab_size=4096))
    path = exported(checkpoint, tmp_path / "x", precision="float32")
    rows = [{"messages": [{"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "Hello!"}]}] * 2  # fmt: skip
    settings = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to=[],
                         per_device_train_batch_size=2, learning_rate=1e-3, bf16=False)  # fmt: skip
    trainer = SFTTrainer(str(path), args=settings, train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    trained = open_checkpoint(tmp_path / "trained")
    assert trained.config == checkpoint.config
    names = checkpoint.config.tensor_shapes()
    moved = [n for n in names if (trained.weight(n) != checkpoint.weight(n)).any()]
    assert len(moved) > len(names) // 2
