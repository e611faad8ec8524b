"""IFEval's instructions: the harness's own copy of the checkers says the same of every answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from needs import package

from gemma_multi import BackendError, DataError, Model, evaluate
from gemma_multi.evaluation.tasks import ifeval
from gemma_multi.rows import open_data

KEPT = "detectable_format:title"


@pytest.fixture(autouse=True)
def checkers() -> Any:
    return package("if_verifiable", "eval")


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm_eval's, which else asks the network for words of nltk's as it is imported."""
    monkeypatch.setattr(package("nltk", "eval"), "download", lambda *a, **k: True)
    return package("lm_eval.tasks.ifeval.utils", "eval")


def test_every_answer_is_judged_as_in_the_harness(model: Model, theirs: Any) -> None:
    report = evaluate(model, None, "ifeval", max_tokens=24, progress=False)
    asked = [row for _, row in open_data(ifeval.OUR_PROMPTS)[1]]
    judged = [theirs.process_results(one, [row.given.strip()])
              for one, row in zip(asked, report.findings.rows, strict=True)]  # fmt: skip
    figures = report.findings.figures
    for ours, key in (("strict", "strict"), ("loose", "loose")):
        prompts = [one[f"prompt_level_{key}_acc"] for one in judged]
        single = theirs.agg_inst_level_acc([one[f"inst_level_{key}_acc"] for one in judged])
        assert figures[f"prompts, {ours}"].value == pytest.approx(sum(prompts) / 12)
        assert figures[f"instructions, {ours}"].value == pytest.approx(single)
    assert [row.right for row in report.findings.rows] == [
        one["prompt_level_strict_acc"] for one in judged
    ]
    assert sum(one.count for one in report.findings.shares.values()) == 16
    assert report.protocol["checkers"].startswith("if-verifiable 0.1.")


@pytest.mark.parametrize(
    ("instruction", "told", "answer", "kept"),
    [
        (KEPT, {}, "<<Rain>>\nIt fell.", True),
        (KEPT, {}, "Rain", False),
        (KEPT, {}, "", False),  # which the package counts as no instruction at all
        ("language:response_language", {"language": "de"}, "Das ist ein ganz normaler Satz.", True),
    ],
)
def test_an_answer_keeps_it_or_not(
    instruction: str, told: dict[str, Any], answer: str, kept: bool
) -> None:
    row = {"prompt": "Go.", "instruction_id_list": [instruction], "kwargs": [told]}
    (one,) = ifeval._kept(ifeval._check("row:1", row, ifeval._checkers()), answer)
    assert (one.instruction_id, one.strict_pass, one.loose_pass) == (instruction, kept, kept)


def row(**changes: Any) -> dict[str, Any]:
    return {"prompt": "Go.", "instruction_id_list": [KEPT], "kwargs": [{}], **changes}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"text": "Go."}, "row:2: expected the keys instruction_id_list, kwargs, prompt"),
        (row(instruction_id_list=["be:nice"]), "row:2: 'be:nice' is no instruction of IFEval's"),
        (row(kwargs=[]), "row:2: expected as many 'kwargs' as instructions"),
        (row(kwargs=[{"size": 3}]), "row:2: 'kwargs' of .* is .*; it takes none"),
        (row(instruction_id_list=["keywords:existence"]), "expected keywords"),  # else drawn
        (row(prompt=""), "row:2: 'prompt' is ''"),
    ],
)  # fmt: skip
def test_a_row_that_is_none_is_named(model: Model, wrong: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        evaluate(model, [row(), wrong], "ifeval", progress=False)


def test_words_of_nltks_that_are_missing_are_named_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    nltk = package("nltk", "eval")
    monkeypatch.setattr(nltk.data, "path", [])
    asked = row(instruction_id_list=["change_case:capital_word_frequency"],
                kwargs=[{"capital_frequency": 1, "capital_relation": "at least"}])  # fmt: skip
    with pytest.raises(BackendError, match=r"row:1: .*nltk.downloader punkt_tab"):
        evaluate(model, [asked], "ifeval", progress=False)


def test_our_prompts_are_our_own_and_take_every_family() -> None:
    rows = [json.loads(line) for line in ifeval.OUR_PROMPTS.read_text().splitlines()]
    assert len({one["prompt"] for one in rows}) == 12
    named = {name.split(":")[0] for one in rows for name in one["instruction_id_list"]}
    assert named == {name.split(":")[0] for name in ifeval._checkers()}
