"""`.gguf` files in llama.cpp itself: `make llama-cpp`, which compiles it once.

What it computes is compared with `decoder`, the model in NumPy, on the weights that were written.
llama.cpp rounds what it multiplies to eight bits in front of Q4_0 and Q8_0, so a greedy text may
part there where two tokens are nearly as likely; where they are not, it must not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import pytest
from format_table import perplexity
from other_peoples_files import brown_documents, gemma_270m
from test_tokenizer_json import CHAT
from varied_text import samples

import gemma_multi
from gemma_multi.chat_template import encode_prompt
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.consumers import CONSUMERS
from gemma_multi.demo import STORY
from gemma_multi.formats.gguf.layout import RESERVED
from gemma_multi.training.calibrated import calibrated
from gemma_multi.transforms import original, quantize_checkpoint, to_precision
from gemma_multi.verifying import expected

llama_cpp = pytest.importorskip("llama_cpp", reason="`make llama-cpp` installs it")
from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # noqa: E402

pytestmark = pytest.mark.llama_cpp

(LLAMA,) = (one for one in CONSUMERS if one.name == "llama.cpp")
TOKENS = 60  # of an answer
NEAR = {"Q": 0.5, "F": 0.02, "B": 0.02}  # logits between which a greedy text may part


@cache
def storyteller() -> Checkpoint:
    return to_precision(gemma_multi.open_checkpoint("storyteller"), "float32", progress=False)


# what is written, its precision, and what llama.cpp calls that
KINDS: list[tuple[str, Callable[[], Checkpoint], str]] = [
    ("Q4_0", lambda: gemma_multi.open_checkpoint("storyteller"), "int4"),
    ("Q4_0, embedding Q8_0",
     lambda: quantize_checkpoint(storyteller(), 4, embedding_bits=8)[0], "int4"),
    ("Q8_0", lambda: quantize_checkpoint(storyteller(), 8, embedding_bits=8)[0], "int8"),
    ("BF16", storyteller, "bfloat16"),
    ("F16", storyteller, "float16"),
    ("F32", storyteller, "float32"),
]  # fmt: skip


def written(checkpoint: Checkpoint, precision: str, directory: Path) -> tuple[Checkpoint, Path]:
    path = directory / "model.gguf"
    gemma_multi.export(checkpoint, path, precision=precision, progress=False, verify=False)
    return gemma_multi.open_checkpoint(path), path


def loaded(path: Path, context: int, logits: bool = True) -> llama_cpp.Llama:
    return llama_cpp.Llama(str(path), n_ctx=context, logits_all=logits, verbose=False)


def greedy(llama: llama_cpp.Llama, ids: list[int], count: int) -> list[int]:
    said = llama.generate(ids, temp=0.0, repeat_penalty=1.0)
    return list(islice(takewhile(lambda token: token != llama.token_eos(), said), count))


def check_perplexity(checkpoint: Checkpoint, path: Path, ids: list[int], within: float) -> None:
    """That it reads a text longer than the window as likely as the weights have it."""
    llama = loaded(path, len(ids))
    llama.eval(ids)
    theirs = perplexity(llama.scores[: len(ids)], ids)
    ours = perplexity(expected(LLAMA, checkpoint, ids), ids)
    assert theirs == pytest.approx(ours, rel=within)


@pytest.mark.parametrize(("name", "make", "precision"), KINDS, ids=[kind[0] for kind in KINDS])
def test_the_storytellers_tokens_and_perplexity(
    name: str, make: Callable[[], Checkpoint], precision: str, tmp_path: Path
) -> None:
    checkpoint, path = written(make(), precision, tmp_path)
    model = gemma_multi.load("storyteller", backend="keras")
    ids = model.encode(STORY)
    text = greedy(loaded(path, 512), ids, TOKENS)
    assert len(text) > 40
    logits = expected(LLAMA, checkpoint, [*ids, *text])[len(ids) - 1 : -1]
    best = logits.max(-1)
    near = NEAR[name[0]]
    np.testing.assert_array_less(best - logits[np.arange(len(text)), text], near)

    story = [*ids, *model.encode(model.generate(STORY, seed=3).text, raw=True)[1:]]
    assert len(story) > 2 * checkpoint.config.sliding_window
    check_perplexity(checkpoint, path, story, 0.02 if name[0] == "Q" else 0.002)


def test_it_reads_the_same_tokens(tmp_path: Path) -> None:
    """Pieces that are for nothing are control pieces there, which no text becomes."""
    checkpoint, path = written(KINDS[0][1](), "int4", tmp_path)
    llama = loaded(path, 64, logits=False)
    for text in (text for text in samples(1000) if RESERVED not in text):
        theirs = llama.tokenize(text.encode(), add_bos=False, special=False)
        assert theirs == checkpoint.tokenizer.encode(text), repr(text)


def test_its_template_gives_the_same_turns_and_answers_end(tmp_path: Path) -> None:
    checkpoint, path = written(KINDS[0][1](), "int4", tmp_path)
    llama = loaded(path, 256, logits=False)
    template = Jinja2ChatFormatter(
        llama.metadata["tokenizer.chat_template"], eos_token="<eos>", bos_token="<bos>"
    )
    prompt = template(messages=CHAT).prompt.encode()
    theirs = llama.tokenize(prompt, add_bos=False, special=True)
    assert theirs == encode_prompt(checkpoint.tokenizer, CHAT)
    found = llama.create_chat_completion(
        [{"role": "user", "content": STORY}], temperature=0.0, repeat_penalty=1.0, max_tokens=200
    )["choices"][0]
    assert found["finish_reason"] == "stop"
    assert len(found["message"]["content"]) > 100
    assert "<" not in found["message"]["content"]  # no piece of a turn


@pytest.mark.parametrize("precision", ["int4", "bfloat16"])
def test_the_real_one(precision: str, tmp_path: Path) -> None:
    """Gemma 3 270M: 700 tokens of real text, and forty greedy ones."""
    real = gemma_multi.open_checkpoint(gemma_270m())
    source = calibrated(original(real), progress=False) if precision == "int4" else original(real)
    checkpoint, path = written(source, precision, tmp_path)
    ids = [2, *checkpoint.tokenizer.encode(brown_documents()[0])[:699]]
    check_perplexity(checkpoint, path, ids, 0.02 if precision == "int4" else 0.005)
    text = greedy(loaded(path, 512), ids[:100], 40)
    logits = expected(LLAMA, checkpoint, [*ids[:100], *text])[99:-1]
    np.testing.assert_array_less(
        logits.max(-1) - logits[np.arange(len(text)), text], 0.5 if precision == "int4" else 0.05
    )
