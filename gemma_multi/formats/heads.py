"""Attention's matrices with their heads apart, as JAX's libraries multiply them.

Hugging Face keeps linear layers as `[out, in]`, keras-hub and google-deepmind/gemma a matrix a
head: queries, keys and values `[heads, hidden, dim]`, the output `[heads, dim, hidden]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Arrange = Callable[[Any], Any]  # works on NumPy's and JAX's arrays


def split_in(heads: int, hidden: int, dim: int) -> tuple[Arrange, Arrange]:
    """There, and back to Hugging Face's `[heads * dim, hidden]`."""
    return (
        lambda w: w.reshape(heads, dim, hidden).transpose(0, 2, 1),
        lambda v: v.transpose(0, 2, 1).reshape(heads * dim, hidden),
    )


def split_out(heads: int, hidden: int, dim: int) -> tuple[Arrange, Arrange]:
    """There, and back to Hugging Face's `[hidden, heads * dim]`."""
    return (
        lambda w: w.T.reshape(heads, dim, hidden),
        lambda v: v.reshape(heads * dim, hidden).T,
    )
