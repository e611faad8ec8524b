"""evaluate: figures that scikit-learn's are the reference for, and refusals that name the row."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rows as drawn
from needs import package

import gemma_multi
from gemma_multi import DataError, Model, OptionError, evaluate
from gemma_multi.chat_template import encode_answered
from gemma_multi.decoder import Decoder, Weights, log_softmax
from gemma_multi.evaluation.tasks.calls import NO_CALL, score_calls
from gemma_multi.scoring import NO_LABEL, share
from gemma_multi.tools import Call

SENTIMENTS = ("positive", "negative", "neutral")


@pytest.fixture(scope="module")
def judged() -> list[dict[str, str]]:
    """Reviews, every fourth with another label than its own, so that not all is right."""
    rows = drawn.sentiment(32)
    for i, row in enumerate(rows):
        if i % 4 == 0:
            row["completion"] = SENTIMENTS[(SENTIMENTS.index(row["completion"]) + 1) % 3]
    return rows


def test_classes_are_counted_as_scikit_learn_does(model: Model, judged: list[Any]) -> None:
    metrics = package("sklearn.metrics", "eval")
    report = evaluate(model, judged, "classify", labels=SENTIMENTS, progress=False)
    found = report.findings
    expected, given = [row.expected for row in found.rows], [row.given for row in found.rows]
    assert expected == [row["completion"] for row in judged]
    assert 0.5 < found.figures["accuracy"].value < 0.9
    assert found.figures["accuracy"] == share(round(
        metrics.accuracy_score(expected, given) * 32), 32)  # fmt: skip
    theirs = metrics.precision_recall_fscore_support(expected, given, labels=SENTIMENTS)
    ours = [found.parts["label"][label] for label in SENTIMENTS]
    for figures, reference in zip(
        ([one.precision.value for one in ours], [one.recall.value for one in ours],
         [one.f1 for one in ours], [one.recall.count for one in ours]), theirs, strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(figures, reference)
    assert found.numbers["macro F1"] == pytest.approx(
        metrics.f1_score(expected, given, average="macro")
    )
    matrix = metrics.confusion_matrix(expected, given, labels=SENTIMENTS)
    assert [[found.confusion[a][b] for b in SENTIMENTS] for a in SENTIMENTS] == matrix.tolist()
    assert [row.where for row in report.wrong] == [
        f"row:{i}" for i, (a, b) in enumerate(zip(expected, given, strict=True), 1) if a != b
    ]


def test_a_label_is_as_likely_as_its_tokens_are(model: Model) -> None:
    rows = drawn.sentiment(2)
    report = evaluate(model, rows, "classify", labels=SENTIMENTS, progress=False)
    for row, found in zip(rows, report.findings.rows, strict=True):
        prompt = model.encode(row["prompt"])
        totals = []
        for label in SENTIMENTS:
            ids = model.tokenizer.encode(label)
            totals.append(model.logprobs([*prompt, *ids])[-len(ids) :].sum())
        shares = np.exp(totals) / np.exp(totals).sum()
        assert found.given == SENTIMENTS[int(shares.argmax())]
        assert found.probability == pytest.approx(shares.max(), abs=1e-3)


def test_what_is_written_and_is_no_label_counts_as_none(model: Model) -> None:
    rows = [*drawn.sentiment(6), {"prompt": "Tell me a bedtime story.", "completion": "neutral"}]
    found = evaluate(model, rows, "classify", labels=SENTIMENTS, free=True, max_tokens=8,
                     progress=False).findings  # fmt: skip
    assert found.confusion["neutral"][NO_LABEL] == 1
    assert not found.rows[-1].right
    assert [row.right for row in found.rows[:-1]] == [True] * 6


def test_texts_get_the_prompt_of_classify(model: Model) -> None:
    rows = [{"text": "I love it. It works.", "label": "good"}, {"text": "Never again.",
                                                                "label": "bad"}]  # fmt: skip
    for raw in (False, True):
        report = evaluate(model, rows, "classify", instruction="Is it good?", raw=raw,
                          progress=False)  # fmt: skip
        answers = model.classify([row["text"] for row in rows], ["good", "bad"], "Is it good?",
                                 raw=raw, progress=False)  # fmt: skip
        assert [row.given for row in report.findings.rows] == [one.label for one in answers]
        assert ("plain text" in report.protocol["prompt"]) is raw


def test_fields_of_objects(model: Model) -> None:
    rows = drawn.entities(8)
    rows[0]["completion"] = json.dumps({**json.loads(rows[0]["completion"]), "person": "Nobody"})
    found = evaluate(model, rows, "extract", progress=False).findings
    given = [json.loads(row.given) for row in found.rows]
    expected = [json.loads(row["completion"]) for row in rows]
    right = sum(a == b for a, b in zip(expected, given, strict=True))
    assert 4 <= right <= 7
    assert found.figures["right objects"] == share(right, 8)
    person = sum(a["person"] == b["person"] for a, b in zip(expected, given, strict=True))
    assert found.parts["field"]["person"].recall == share(person, 8)


def test_a_schema_holds_what_is_extracted_from_texts(model: Model) -> None:
    schema = {"type": "object", "properties": {"place": {"enum": ["Paris", "Rome"]}},
              "required": ["place"]}  # fmt: skip
    rows = [{"text": f"Emma lives in {place}.", "object": {"place": place}}
            for place in ("Paris", "Rome")]  # fmt: skip
    found = evaluate(model, rows, "extract", schema=schema, progress=False).findings
    assert {json.loads(row.given)["place"] for row in found.rows} <= {"Paris", "Rome"}
    assert found.numbers["no object"] == 0
    cut = evaluate(model, rows, "extract", schema=schema, max_tokens=2, progress=False).findings
    assert cut.numbers["no object"] == 2
    assert cut.figures["right objects"].value == 0


def test_calls_are_right_with_their_arguments_in_any_order() -> None:
    paris, rome = Call("weather", {"city": "Paris", "days": 2}), Call("weather", {"city": "Rome"})
    stop = Call("stop", {})
    expected = [(paris,), (paris, rome), (stop,), (), (paris,)]
    given = [(paris,), (rome, paris), (), (), (Call("weather", {"city": "Paris", "days": 3}),)]
    found = score_calls(expected, given)
    assert found.right == (True, True, False, True, False)
    assert found.confusion["stop"][NO_CALL] == 1
    assert found.labels["weather"].recall == share(2, 2)  # the function was right, an argument not
    assert found.fields["weather.city"].recall == share(4, 4)
    assert found.fields["weather.days"].precision == share(2, 3)


def test_calls_are_asked_with_their_tools(model: Model) -> None:
    tools = [{"name": "weather", "description": "Tells the weather.", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"]}}]  # fmt: skip
    question = {"role": "user", "content": "How is the weather in Paris?"}
    calls = [{"name": "weather", "arguments": {"city": "Paris"}}]
    answers = ({"role": "model", "calls": calls}, {"role": "model", "content": "Fine."})
    rows = [{"tools": tools, "messages": [question, answer]} for answer in answers]
    found = evaluate(model, rows, "calls", tool_choice="required", progress=False).findings
    answer = model.generate([question], tools=tools, tool_choice="required", temperature=0)
    right = answer.calls == (Call("weather", {"city": "Paris"}),)
    assert [row.right for row in found.rows] == [right, False]
    named = " + ".join(call.name for call in answer.calls)
    assert found.confusion[NO_CALL][named] == 1
    with pytest.raises(DataError, match="row:1: has no 'tools'"):
        evaluate(model, drawn.sentiment(1), "calls", progress=False)


def test_perplexity_is_that_of_the_decoder_in_numpy(model: Model) -> None:
    rows = drawn.entities(2)
    report = evaluate(model, rows, "perplexity", progress=False)
    checkpoint, total, count = gemma_multi.open_checkpoint("storyteller"), 0.0, 0
    decoder = Decoder(checkpoint.config, Weights(checkpoint))
    for row in rows:
        turns = [("user", row["prompt"]), ("model", row["completion"])]
        ids, said = encode_answered(checkpoint.tokenizer, turns)
        logprobs = log_softmax(decoder.logits(np.array(ids[:-1])))
        picked = logprobs[np.arange(len(ids) - 1), ids[1:]]
        total, count = total - picked[np.array(said[1:])].sum(), count + sum(said)
    assert report.findings.numbers["tokens"] == count
    assert report.findings.figures["perplexity"].value == pytest.approx(
        np.exp(total / count), rel=1e-3
    )


GOOD = {"text": "Fine.", "label": "good"}
BAD = {"text": "Awful.", "label": "bad"}


@pytest.mark.parametrize(
    ("task", "rows", "options", "said"),
    [
        ("sort", [GOOD], {}, "task is 'sort', expected one of calls, classify"),
        ("classify", None, {}, "needs data: rows with a 'prompt'"),
        ("classify", [GOOD, BAD], {"schema": "{}"}, "'classify' takes no option 'schema'"),
        ("classify", [GOOD, BAD], {"limit": 0}, "limit is 0"),
        ("classify", [GOOD, BAD], {"max_tokens": 3}, "give it with free"),
        ("classify", [GOOD, BAD], {"free": True}, "free asks rows as they stand"),
        ("classify", [], {}, "row: has no rows"),
        ("classify", [GOOD, GOOD], {}, "all rows have the label 'good'"),
        ("classify", [GOOD, BAD], {"labels": ("good", "fine")}, "row:2: its label 'bad' is none"),
        ("classify", [GOOD, {"text": "a", "label": 3}], {}, "row:2: its label is 3"),
        ("classify", [GOOD, {"text": " ", "label": "x"}], {}, "row:2: 'text' is ' '"),
        ("classify", [GOOD, {"prompt": "a", "completion": "bad"}], {}, "row:2: is of another kind"),
        ("classify", [GOOD, {"text": "a"}], {}, "row:2: has no text for an answer"),
        ("classify", [GOOD, {"words": "a"}], {}, "row:2: .* or 'text' and 'label'"),
        ("classify", [GOOD, BAD | {"text": "word " * 900}], {}, "row:2: the prompt is .* long"),
        ("extract", [{"text": "a", "object": {}}], {}, "need a schema"),
        ("extract", [{"prompt": "a", "completion": "b"}], {}, "row:1: its answer is 'b', expected"),
        ("perplexity", [{"text": "a b"}], {"loss_on": "some"}, "loss_on is 'some'"),
        ("perplexity", 7, {}, "data is int"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_a_sentence(
    model: Model, task: str, rows: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises((DataError, OptionError), match=said):
        evaluate(model, rows, task, progress=False, **options)


def test_a_file_is_known_by_its_hash(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(BAD) + "\n")
    report = evaluate(model, path, "classify", progress=False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.data == {"name": "rows.jsonl", "sha256": digest, "rows": 2}
    assert report.model["weights_sha256"] == model.checkpoint.digest()
    assert report.protocol["backend"] == "litert"
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["figures"]["accuracy"]
    one = evaluate(model, [GOOD, BAD], "classify", progress=False).data["sha256"]
    other = evaluate(model, [BAD, GOOD], "classify", progress=False).data["sha256"]
    assert one != other
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file"):
        evaluate(model, tmp_path / "none.jsonl", "classify", progress=False)
