"""What the storyteller reads: conversations by index, as padded batches of token ids.

Design choices:
- Conversation number `i` of a seed is always the same, so a resumed run reads on where the
  interrupted one stopped, and nothing needs to be stored.
- Batches hold conversations of one kind (tasks, or stories of one length) so that little of a
  batch is padding, and only a handful of shapes is ever compiled.
- The loss looks at what the model says and at the `<end_of_turn>` after it, not at the prompts.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

import numpy as np
import sentencepiece
import stories
import tasks

from gemma_multi import chat
from gemma_multi.tokenizer import Tokenizer

VOCAB_SIZE = 4096
NUM_UNUSED = 99  # <unused0> .. <unused98>, so that <start_of_turn> is 105 as in Gemma


@dataclass(frozen=True)
class Bucket:
    """One batch shape. `share` is how often it comes up, out of the sum of all shares."""

    kind: str
    rows: int
    width: int
    share: int


BUCKETS = (
    Bucket("task", 56, 72, 3),
    Bucket("short", 21, 192, 2),
    Bucket("medium", 16, 256, 3),
    Bucket("long", 12, 328, 2),
)
_SCHEDULE = [bucket for bucket in BUCKETS for _ in range(bucket.share)]


def conversation(kind: str, rng: random.Random) -> list[dict[str, str]]:
    if kind == "task":
        return tasks.draw_task(rng).conversation()
    while True:
        turns = stories.conversation(rng)
        if turns[0]["content"].endswith(f"Length: {kind}"):
            return turns


def encode(tokenizer: Tokenizer, turns: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation, and 1 where a token is the model's own."""
    ids, mine = [tokenizer.bos_id], [0]
    for turn in turns:
        opening = chat.open_turn(tokenizer, turn["role"])
        text = tokenizer.encode(turn["content"])
        closing = chat.close_turn(tokenizer)
        ids += opening + text + closing
        said = int(turn["role"] == "model")
        mine += [0] * len(opening) + [said] * (len(text) + 1) + [0] * (len(closing) - 1)
    return ids, mine


def batch(tokenizer: Tokenizer, step: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Batch number `step`: ids and loss mask, both i32[rows, width]."""
    rng = random.Random(f"{seed} {step}")
    bucket = random.Random(f"{seed} {step // len(_SCHEDULE)}").sample(_SCHEDULE, len(_SCHEDULE))[
        step % len(_SCHEDULE)
    ]
    ids = np.zeros((bucket.rows, bucket.width), np.int32)
    mask = np.zeros_like(ids)
    for row in range(bucket.rows):
        tokens, mine = encode(tokenizer, conversation(bucket.kind, rng))
        tokens, mine = tokens[: bucket.width], mine[: bucket.width]
        ids[row, : len(tokens)], mask[row, : len(mine)] = tokens, mine
    return ids, mask


def train_tokenizer(conversations: int = 12_000, seed: int = 0) -> bytes:
    """A SentencePiece BPE model of 4,096 pieces with Gemma's special ids in Gemma's places."""
    rng = random.Random(f"tokenizer {seed}")
    kinds = [bucket.kind for bucket in _SCHEDULE]
    texts = (
        turn["content"]
        for _ in range(conversations)
        for turn in conversation(rng.choice(kinds), rng)
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
