"""What the storyteller reads: conversations by number, and the tokenizer made for them.

Conversation number `i` of a seed is always the same, so nothing needs to be stored, and a resumed
run reads on where it stopped. Nine of sixteen rows are tasks, which are brief.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

import sentencepiece
import stories
import tasks

VOCAB_SIZE = 4096
NUM_UNUSED = 99  # <unused0> .. <unused98>, so that <start_of_turn> is 105 as in Gemma
KINDS = ("task",) * 9 + ("short",) * 2 + ("medium",) * 3 + ("long",) * 2
TOKENIZER_KINDS = ("task",) * 3 + ("short",) * 2 + ("medium",) * 3 + ("long",) * 2


def conversation(kind: str, rng: random.Random) -> list[dict[str, str]]:
    if kind == "task":
        return tasks.draw_task(rng).conversation()
    while True:
        turns = stories.conversation(rng)
        if turns[0]["content"].endswith(f"Length: {kind}"):
            return turns


def rows(count: int, seed: int = 0) -> Iterator[dict[str, list[dict[str, str]]]]:
    """`count` rows as `finetune` takes them."""
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        yield {"messages": conversation(rng.choice(KINDS), rng)}


def held_out(count: int) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Rows to validate on: stories about combinations that `rows` never tells."""
    for i, controls in enumerate(stories.held_out_controls(count, seed=1)):
        story = stories.tell(controls, random.Random(f"held out {i}"))
        yield {
            "messages": [
                {"role": "user", "content": controls.prompt()},
                {"role": "model", "content": story},
            ]
        }


def train_tokenizer(conversations: int = 12_000, seed: int = 0) -> bytes:
    """A SentencePiece BPE model of 4,096 pieces with Gemma's special ids in Gemma's places."""
    rng = random.Random(f"tokenizer {seed}")
    texts = (
        turn["content"]
        for _ in range(conversations)
        for turn in conversation(rng.choice(TOKENIZER_KINDS), rng)
    )
    reserved = ["<mask>", "[multimodal]", *(f"<unused{i}>" for i in range(NUM_UNUSED))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=[*reserved, "<start_of_turn>", "<end_of_turn>", "\n", "\n\n"],
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        # every printable ASCII character is one piece, whatever the stories happen to use
        required_chars="".join(map(chr, range(33, 127))),
        minloglevel=2,
    )
    return model.getvalue()
