"""`tokenizer.json` made from a SentencePiece model, read by Hugging Face's `tokenizers`."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as schema
from tiny import tokenizer
from varied_text import samples

from gemma_multi.chat_template import encode_prompt
from gemma_multi.errors import TokenizerError
from gemma_multi.sentencepiece_model import sentencepiece_from_json
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.tokenizer_json import CHAT_TEMPLATE, tokenizer_config, tokenizer_json

RUNS = ["\u2581\u2581 x", " " * 70, "a" + " " * 33 + "b", "\n" * 40, "\t\t\n \n", "<table> <0x41>"]
CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "  Hello \n"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Who are you?"},
]


def read_by_theirs(ours: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer_json(ours.model).decode())


def check_same_ids(ours: Tokenizer, count: int) -> None:
    theirs = read_by_theirs(ours)
    for text in [*RUNS, *samples(count)]:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text


def test_the_storytellers_gives_the_same_ids() -> None:
    check_same_ids(tokenizer(), 2000)


def test_gemmas_gives_the_same_ids(gemma_tokenizer_directory: Path) -> None:
    check_same_ids(Tokenizer.from_directory(gemma_tokenizer_directory), 500)


def test_it_becomes_the_same_model_again() -> None:
    again = Tokenizer(sentencepiece_from_json(tokenizer_json(tokenizer().model)))
    for text in [*RUNS, *samples(500)]:
        assert again.encode(text) == tokenizer().encode(text)


def test_a_text_begins_with_bos_once_and_may_spell_a_turn() -> None:
    ours, theirs = tokenizer(), read_by_theirs(tokenizer())
    assert theirs.encode("Hello").ids == [ours.bos_id, *ours.encode("Hello")]
    prompt = jinja2.Template(CHAT_TEMPLATE).render(
        messages=CHAT, bos_token="<bos>", add_generation_prompt=True
    )
    ids = theirs.encode(prompt, add_special_tokens=False).ids
    assert ids == encode_prompt(ours, CHAT)


def test_content_may_come_in_parts() -> None:
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    template = jinja2.Template(CHAT_TEMPLATE)
    texts = {template.render(messages=m, bos_token="<bos>") for m in (CHAT, parts)}
    assert len(texts) == 1


def test_turns_in_another_order_are_refused() -> None:
    def refuse(message: str) -> None:
        raise ValueError(message)

    template = jinja2.Template(CHAT_TEMPLATE)
    with pytest.raises(ValueError, match="one after the other"):
        template.render(messages=CHAT[2:], bos_token="", raise_exception=refuse)


def test_transformers_reads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(tokenizer().model))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(512)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert found == encode_prompt(tokenizer(), CHAT)


def test_pieces_that_a_model_has_no_row_for_are_left_out() -> None:
    """As in Gemma's, which knows of pictures that the text model does not."""
    proto = schema.ModelProto()
    proto.ParseFromString(tokenizer().model)
    proto.pieces.add(piece="<image_soft_token>", score=0.0, type=4)
    rows = tokenizer().vocab_size
    whole, cut = (tokenizer_json(proto.SerializeToString(), n) for n in (None, rows))
    assert b"<image_soft_token>" in whole
    assert cut == tokenizer_json(tokenizer().model)


def changed(**changes: object) -> bytes:
    proto = schema.ModelProto()
    proto.ParseFromString(tokenizer().model)
    for name, value in changes.items():
        part = proto.trainer_spec if name == "model_type" else proto.normalizer_spec
        setattr(part, name, value)
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"model_type": 1}, "model_type 1"), ({"add_dummy_prefix": True}, "add_dummy_prefix")],
)
def test_what_tokenizers_would_not_follow_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        tokenizer_json(changed(**changes))


def test_a_piece_of_a_letter_that_is_none_is_refused() -> None:
    proto = schema.ModelProto()
    proto.ParseFromString(tokenizer().model)
    proto.pieces.add(piece="\u0416\u0416", score=-5000.0, type=1)
    with pytest.raises(TokenizerError, match="\u0416\u0416"):
        tokenizer_json(proto.SerializeToString())
