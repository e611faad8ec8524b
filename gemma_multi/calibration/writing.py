"""Text that a model writes itself, to be calibrated on: many at once, unfiltered, seeded.

What a model finds likely is what its rounding must keep, so its own writing serves where there is
no other text, and needs no download. A base model writes plain text. One that ends its turn when
it is asked something has learnt conversations, and writes them in every other text, both sides.

Threads of BLAS wait for each other at every product, and beside other work, for that as well: a
small model then takes many times as long. So each core (up to four, for each reads all weights)
goes through the layers with a few of the texts, and all cores give a part of the vocabulary its
logits for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from gemma_multi.chat_template import close_turn, encode_prompt, open_turn
from gemma_multi.config import EMBEDDING
from gemma_multi.decoder import ATTENDED, ATTENTION, GATED, INPUTS, Decoder, rotate, softmax
from gemma_multi.machine import available_cores
from gemma_multi.progress import Report, silent
from gemma_multi.sampling.options import GenerationOptions
from gemma_multi.sampling.sampler import choose
from gemma_multi.tokenizer import Tokenizer

_UNFILTERED = GenerationOptions(temperature=1.0, top_k=0, top_p=1.0, seed=0)
_GREEDY = GenerationOptions(temperature=0.0, seed=0)
_STRIDE = 1 << 20  # positions between two texts, so that no two have the same noise
_QUESTIONS = ("Hello!", "What is the capital of France?", "Yes or no: is water wet?", "Thank you.")
_PATIENCE = 32  # tokens in which one of them should be answered
_AT_ONCE = 128  # texts: their keys and values are 1.2 GB of Gemma 3 270M
_MOST_BATCHES = 4
_NOTHING_SEEN = np.zeros(0, np.int64)


def write_texts(
    decoder: Decoder, tokenizer: Tokenizer, count: int, length: int, pool: Executor,
    progress: Report = silent,
) -> list[np.ndarray]:  # fmt: skip
    """`count` texts of `length` tokens each: `i32[length]`."""
    with threadpool_limits(1):
        talks = _has_learnt_turns(decoder, tokenizer, length, pool)
        writers = [_Writer(tokenizer, row, talks and row % 2 == 1) for row in range(count)]
        starts = range(0, count, _AT_ONCE)
        for done, start in enumerate(starts):

            def report(at: int, end: int, done: int = done) -> None:
                progress(done * end + at, len(starts) * end)

            some = writers[start : start + _AT_ONCE]
            _write(decoder, some, length, _UNFILTERED, pool, report)
    return [np.array(writer.ids[:length], np.int32) for writer in writers]


def _has_learnt_turns(decoder: Decoder, tokenizer: Tokenizer, longest: int, pool: Executor) -> bool:
    asked = [[{"role": "user", "content": question}] for question in _QUESTIONS]
    prompts = [encode_prompt(tokenizer, messages) for messages in asked]
    if max(map(max, prompts)) >= decoder.config.vocab_size:
        return False  # its tokenizer has pieces that it was not made for
    writers = [_Writer(tokenizer, row, ids=prompt) for row, prompt in enumerate(prompts)]
    length = min(longest, max(map(len, prompts)) + _PATIENCE)
    _write(decoder, writers, length, _GREEDY, pool, until=tokenizer.end_of_turn_id)
    return any(writer.ids[-1] == tokenizer.end_of_turn_id for writer in writers)


def _write(
    decoder: Decoder, writers: Sequence[_Writer], length: int, options: GenerationOptions,
    pool: Executor, progress: Report = silent, until: int | None = None,
) -> None:  # fmt: skip
    """Every text to `length` tokens, or all of them as far as the first that writes `until`."""
    cores, count = available_cores(), len(writers)
    rows = np.array_split(np.arange(count), min(cores, _MOST_BATCHES, count))
    batches = [_Batch(decoder, len(own), length) for own in rows]
    head = decoder.weights[EMBEDDING]
    size = -(-len(head) // cores)
    words = [slice(start, start + size) for start in range(0, len(head), size)]
    logits = np.empty((count, len(head)), np.float32)

    def read_out(states: np.ndarray, part: slice) -> None:
        np.matmul(states, head[part].T, out=logits[:, part])

    def choose_next(at: int, row: int) -> None:
        if len(writers[row].ids) == at + 1:  # nothing of the template is waiting
            writers[row].choose(logits[row], options)

    for at in range(length - 1):
        ids = np.array([writer.ids[at] for writer in writers])
        states = np.concatenate(list(pool.map(_Batch.read, batches, [ids[own] for own in rows])))
        list(pool.map(partial(read_out, states), words))
        list(pool.map(partial(choose_next, at), range(count)))
        progress(at + 1, length - 1)
        if until is not None and any(writer.ids[-1] == until for writer in writers):
            break


class _Writer:
    """One text so far. Markers between two turns are the template's, not the model's."""

    def __init__(
        self, tokenizer: Tokenizer, row: int, conversation: bool = False, ids: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.row, self.conversation = tokenizer, row, conversation
        self.role = "user"
        self.ids = list(ids) or [tokenizer.bos_id]
        self.never = [tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id]
        if conversation:
            self.ids += open_turn(tokenizer, self.role)

    def choose(self, logits: np.ndarray, options: GenerationOptions) -> None:
        logits[self.never] = -np.inf
        position = self.row * _STRIDE + len(self.ids) - 1
        token = choose(logits, _NOTHING_SEEN, options, position)
        self.ids.append(token)
        if self.conversation and token == self.tokenizer.end_of_turn_id:
            self.role = "model" if self.role == "user" else "user"
            self.ids += close_turn(self.tokenizer)[1:] + open_turn(self.tokenizer, self.role)


class _Batch:
    """Texts of one length, read a token at a time, with their keys and values."""

    def __init__(self, decoder: Decoder, count: int, length: int) -> None:
        c = decoder.config
        self.decoder = decoder
        shape = (c.num_hidden_layers, count, c.num_key_value_heads, length, c.head_dim)
        self.keys, self.values = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self.at = 0

    def read(self, ids: np.ndarray) -> np.ndarray:
        """The next token of each text, `i64[B]` -> what the head is given, `f32[B, D]`."""
        d = self.decoder
        x = d.embed(ids)
        for layer in range(d.config.num_hidden_layers):
            a = self._attended(layer, d.attention_input(layer, x))
            x = d.add(layer, ATTENDED, x, d.output(layer, ATTENDED, a))
            h = d.gated(layer, d.feedforward_input(layer, x))
            x = d.add(layer, GATED, x, d.output(layer, GATED, h))
        self.at += 1
        return d.last_norm(x)

    def _attended(self, layer: int, n: np.ndarray) -> np.ndarray:
        d, c = self.decoder, self.decoder.config
        q, k, v = (
            d.linear(layer, module, n).reshape(1, -1, c.head_dim) for module in INPUTS[ATTENTION]
        )  # all texts are at one position, so their heads turn alike
        sliding = c.is_sliding(layer)
        q = rotate(d.norm(layer, "self_attn.q_norm", q), c, sliding, self.at)
        k = rotate(d.norm(layer, "self_attn.k_norm", k), c, sliding, self.at)
        kv = (len(n), c.num_key_value_heads, c.head_dim)
        self.keys[layer, :, :, self.at] = k.reshape(kv)
        self.values[layer, :, :, self.at] = v.reshape(kv)
        first = max(0, self.at + 1 - c.sliding_window) if sliding else 0
        seen = slice(first, self.at + 1)
        grouped = q.reshape(*kv[:2], -1, c.head_dim) * np.float32(c.query_scale)
        scores = grouped @ self.keys[layer, :, :, seen].swapaxes(-1, -2)
        return (softmax(scores) @ self.values[layer, :, :, seen]).reshape(len(n), -1)
