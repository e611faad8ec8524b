"""Labels by llama.cpp: generated under a grammar, with what prompts begin with read once.

The peer of `task_costs.py`, through `pip install llama-cpp-python` (which compiles for ten
minutes, so nothing here asks for it). It is given the very token ids and, by our exporter, the very
int4 codes and scales that this package runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gemma_multi
from gemma_multi.checkpoint import Checkpoint

_MOST_TOKENS = 8  # of a label


def installed() -> bool:
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        return False
    return True


class GrammarLabels:
    """One label for each prompt, greedy; llama-cpp-python keeps the tokens that two prompts in a
    row begin with."""

    def __init__(self, llama: Any, labels: Sequence[str], before: str = "") -> None:
        from llama_cpp import LlamaGrammar

        self._llama = llama
        choices = " | ".join(f'"{before}{label}"' for label in labels)
        self._grammar = LlamaGrammar.from_string(f"root ::= {choices}", verbose=False)

    def __call__(self, ids: Sequence[int]) -> str:
        said = self._llama.create_completion(
            list(ids), max_tokens=_MOST_TOKENS, temperature=0.0, grammar=self._grammar
        )
        return str(said["choices"][0]["text"]).strip()


@contextmanager
def llama_cpp_model(base: Checkpoint, context: int, threads: int) -> Iterator[Any]:
    """llama.cpp with a checkpoint's weights."""
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as work:
        path = Path(work, "model.gguf")
        gemma_multi.export(base, path, progress=False)
        llama = Llama(
            str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        yield llama
        llama.close()
