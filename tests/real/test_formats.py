"""The table of docs/formats/table.md, measured again: `make real`."""

from __future__ import annotations

from typing import Any

import pytest
from format_table import LINES, measured, readers

pytestmark = pytest.mark.real
# nats a token from the weights that were written, by what is computed with
FLOAT32, FLOAT16, INT8 = 1e-6, 1e-3, 0.05


def most(one: dict[str, Any]) -> float:
    if one["runtime"] in ("LiteRT", "llama.cpp") or one["precision"] == "q4":
        return INT8
    return FLOAT16 if one["precision"] in ("q4f16", "float16") else FLOAT32


def test_who_each_format_is_for_computes_what_was_written() -> None:
    found = list(measured())
    assert {one["format"] for one in found} == {line.format for line in LINES if any(readers(line))}
    for one in found:
        assert one["divergence"] < most(one), one
        assert one["perplexity"] == pytest.approx(one["perplexity_of_weights"], rel=0.1), one
