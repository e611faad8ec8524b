"""Scores in a model's card, on a page, and on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import rows as drawn

import gemma_multi
from gemma_multi import CheckpointError, Model, OptionError, evaluate
from gemma_multi.cli import main
from gemma_multi.evaluation.record import FILE, recorded
from gemma_multi.exporters import save
from gemma_multi.formats.directory import CARD_FILE

ROWS = [{"text": "It is <b>good</b>.", "label": "good"}, {"text": "Never again.", "label": "bad"}]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(gemma_multi.open_checkpoint("storyteller"), tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_the_card_keeps_every_score_with_its_protocol(
    model: Model, directory: Path, data: Path
) -> None:
    before = (directory / CARD_FILE).read_text()
    first = evaluate(model, data, "classify", progress=False)
    second = evaluate(model, drawn.entities(3), "perplexity", progress=False)
    for report in (first, second):
        assert report.record(directory) == directory / CARD_FILE
    kept = recorded(directory)
    assert [one["task"] for one in kept] == ["classify", "perplexity"]
    assert kept[0]["data"]["sha256"] == first.data["sha256"]
    assert kept[0]["protocol"]["answer"] == "the likeliest label"
    assert "rows" not in kept[0]
    card = huggingface_hub.ModelCard.load(directory / CARD_FILE)
    results = {one.metric_type: one for one in card.data.eval_results}
    assert set(results) == {"accuracy", "perplexity"}
    accuracy = results["accuracy"]
    assert accuracy.dataset_revision == first.data["sha256"]
    assert accuracy.metric_value == first.findings.figures["accuracy"].value
    assert accuracy.metric_args["weights_sha256"] == model.checkpoint.digest()
    assert accuracy.metric_args["backend"] == "litert"
    text = (directory / CARD_FILE).read_text()
    assert text.count("## Scores") == 1
    assert text.count("| classify |") == 1
    body = before.split("---\n", 2)[2].rstrip("\n")
    assert body in text  # what stood there stands
    assert card.data.license == "apache-2.0"
    assert gemma_multi.open_checkpoint(directory) == gemma_multi.open_checkpoint("storyteller")


def test_scores_are_of_these_weights_alone(
    model: Model, directory: Path, data: Path, tmp_path: Path
) -> None:
    report = evaluate(model, data, "classify", progress=False)
    other = replace(report, model={**report.model, "weights_sha256": "0" * 64})
    with pytest.raises(OptionError, match="its weights are not those that were measured"):
        other.record(directory)
    with pytest.raises(OptionError, match="recorded in the card of a model's own directory"):
        report.record(tmp_path)
    report.record(directory)
    again = save(gemma_multi.open_checkpoint(directory), tmp_path / "again")
    assert not (again / FILE).exists()
    before = (directory / FILE).read_text()
    (directory / CARD_FILE).write_text("---\n: [\n---\n")
    with pytest.raises(CheckpointError, match=r"README\.md: its header is no YAML"):
        report.record(directory)
    assert (directory / FILE).read_text() == before
    (directory / CARD_FILE).unlink()
    assert "license: apache-2.0" in report.record(directory).read_text()
    (directory / FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"evaluations\.jsonl: cannot be read"):
        report.record(directory)


def test_the_command_writes_card_and_page(
    directory: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(directory), "--task", "classify", "--data", str(data), "-b", "litert",
              "--labels", "good", "--labels", "bad", "--json", "--html", str(page), "--record",
              "--no-progress"])  # fmt: skip
    assert ended.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["protocol"]["labels"] == ["good", "bad"]
    assert facts["figures"]["accuracy"]["count"] == 2
    assert [one["figures"] for one in recorded(directory)] == [facts["figures"]]
    html = page.read_text()
    assert "It is &lt;b&gt;good&lt;/b&gt;." in html
    assert facts["data"]["sha256"] in html


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --task (calls, classify"),
        (["--task", "classify"], "needs data"),
        (["--task", "classify", "--data", "rows.jsonl", "--record"], "card of a model's own"),
        (["--harness", "a", "--data", "rows.jsonl"], "bring their own data"),
        (["--task", "classify", "--data", "rows.jsonl", "--chat"], "takes no option 'chat'"),
        (["--task", "classify", "--data", "rows.jsonl", "--html", "a.txt"], "ends in .html"),
    ],
)  # fmt: skip
def test_the_command_refuses_in_a_line(
    arguments: list[str], said: str, data: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(data.parent)
    with pytest.raises(SystemExit) as ended:
        main(["eval", "storyteller", "-b", "litert", *arguments])
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
