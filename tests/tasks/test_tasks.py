"""classify, route and extract: right probabilities, the same everywhere, prefixes read once."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import gemma_multi
from gemma_multi import CheckpointError, ConstraintError, ContextError, Model, OptionError
from gemma_multi.engines import HIDDEN
from gemma_multi.prefixes import PrefixCache

TEXT = "Emma lives in Paris and works at Globex."
# of one token and of several, of the same beginnings, and one that begins others
LABELS = ["ok", "violation", "violation of the rules", "the moon", "the moon and the stars"]


@pytest.fixture(scope="module", params=["mlx", "keras", "litert"])
def model(request: pytest.FixtureRequest) -> Model:
    return gemma_multi.load("storyteller", backend=request.param, precision="float32",
                            context_length=256)  # fmt: skip


@pytest.fixture(scope="module")
def one_model() -> Model:
    return gemma_multi.load("storyteller", backend="litert", context_length=512)


def by_whole_logits(model: Model, prompt: list[int], labels: list[str]) -> np.ndarray:
    """Each label's probability from the log-probabilities of its tokens, read as a whole text."""
    ids = {label: model.tokenizer.encode(label) for label in labels}
    sums = {
        label: float(np.sum(model.logprobs([*prompt, *own])[-len(own) :]))
        for label, own in ids.items()
    }
    shares = {label: np.exp(total) for label, total in sums.items()}
    own = dict(shares)
    for label in labels:  # what goes on to a longer one is the longer one's
        longer = [o for o in labels if o != label and ids[o][: len(ids[label])] == ids[label]]
        own[label] = shares[label] - sum(shares[o] for o in longer)
    values = np.array([own[label] for label in labels])
    return values / values.sum()


def test_probabilities_are_those_of_the_labels_tokens(model: Model) -> None:
    instruction = "Is this allowed?"
    found = model.classify(TEXT, LABELS, instruction)
    prompt = model.encode(
        [{"role": "system", "content": instruction}, {"role": "user", "content": TEXT}]
    )
    expected = by_whole_logits(model, prompt, LABELS)
    np.testing.assert_allclose(list(found.probabilities.values()), expected, rtol=2e-3, atol=1e-7)
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert list(found.probabilities) == LABELS
    assert found.label == LABELS[int(expected.argmax())]
    assert found.probability == max(found.probabilities.values())
    assert found.prompt_tokens == len(prompt)


def test_engines_agree() -> None:
    shares = []
    for backend in ("mlx", "keras", "litert"):
        model = gemma_multi.load("storyteller", backend=backend, precision="float32")
        shares.append(list(model.classify(TEXT, LABELS).probabilities.values()))
    np.testing.assert_allclose(shares[1:], [shares[0]] * 2, rtol=1e-3, atol=1e-7)


def test_calibration_takes_away_what_a_label_gets_without_a_text(one_model: Model) -> None:
    labels = ["ok", "violation"]
    plain, empty = one_model.classify([TEXT, "N/A"], labels)
    calibrated = one_model.classify(TEXT, labels, calibrate=True)
    odds = [
        c.probabilities["ok"] / c.probabilities["violation"] for c in (plain, empty, calibrated)
    ]
    assert odds[2] == pytest.approx(odds[0] / odds[1], rel=0.02)
    assert one_model.classify("N/A", labels, calibrate=True).probability == pytest.approx(0.5)


def test_a_list_is_each_by_itself_and_reads_the_instruction_once(one_model: Model) -> None:
    texts = [TEXT, "The moon was out.", "Liam flew to Rome for Initech."]
    examples = [("Mia works for Hooli.", "ok"), ("They stole it.", "violation")]
    one_model.prefixes.clear()
    together = one_model.classify(texts, ["ok", "violation"], "Is it allowed?", examples)
    assert [c.reused_tokens > 0 for c in together] == [False, True, True]
    for text, one in zip(texts, together, strict=True):
        one_model.prefixes.clear()
        alone = one_model.classify(text, ["ok", "violation"], "Is it allowed?", examples)
        assert alone.reused_tokens == 0
        assert alone.probabilities == pytest.approx(one.probabilities, rel=1e-3)
    assert one_model.classify([], ["ok", "no"]) == []


def test_plain_text_prompts_have_labels_after_a_space(one_model: Model) -> None:
    found = one_model.classify(TEXT, ["ok", "violation"], "Judge.", raw=True)
    prompt = one_model.encode(f"Judge.\n\nText: {TEXT}\nLabel:", raw=True)
    ids = [one_model.tokenizer.encode(f" {label}") for label in ("ok", "violation")]
    sums = [one_model.logprobs([*prompt, *own])[-len(own) :].sum() for own in ids]
    expected = 1 / (1 + np.exp(sums[1] - sums[0]))
    assert found.probabilities["ok"] == pytest.approx(expected, abs=0.05)  # int8 activations


def test_routes(one_model: Model) -> None:
    routes = {"billing": "money and invoices", "parcels": "where a delivery is", "other": ""}
    found = one_model.route(["Where is it?", "I was charged twice."], routes)
    assert [list(one.probabilities) for one in found] == [list(routes)] * 2
    assert found[1].reused_tokens > 20
    with pytest.raises(OptionError, match="expected a dict of names and descriptions"):
        one_model.route("x", ["billing"])  # type: ignore[arg-type]


@dataclass
class Visit:
    place: Literal["Paris", "Rome"]
    by_train: bool


def test_extract_gives_objects(model: Model) -> None:
    found = model.extract([TEXT, "Liam is in Rome."], Visit, examples=[("Mia is in Rome by bus.",
                          Visit("Rome", False))])  # fmt: skip
    assert all(isinstance(one, Visit) for one in found)
    assert found == [
        model.extract(text, Visit, examples=[("Mia is in Rome by bus.", Visit("Rome", False))])
        for text in (TEXT, "Liam is in Rome.")
    ]
    with pytest.raises(ConstraintError):
        model.extract(TEXT, Visit, max_tokens=2)


def test_embeddings(model: Model) -> None:
    texts = [TEXT, "Liam flew to Rome.", "Emma lives in Rome and works at Globex."]
    last = model.embed(texts)
    assert last.shape == (3, model.config.hidden_size)
    np.testing.assert_allclose(np.linalg.norm(last, axis=1), 1, atol=1e-5)
    hidden = model.new_session().read(model.encode(TEXT, raw=True), HIDDEN)
    np.testing.assert_allclose(last[0], hidden / np.linalg.norm(hidden), atol=1e-5)
    # a row of a batch is summed up in another order
    allowed = 1e-6 if model.engine.rows_at_a_time > 1 else 0
    np.testing.assert_allclose(model.embed(TEXT), last[0], rtol=0, atol=allowed)
    mean = model.embed(texts, "mean")
    states = [
        model.new_session().read(model.encode(TEXT, raw=True)[: i + 1], HIDDEN)
        for i in range(len(model.encode(TEXT, raw=True)))
    ]
    expected = np.mean(states, axis=0)
    np.testing.assert_allclose(mean[0], expected / np.linalg.norm(expected), atol=1e-4)
    assert mean[0] @ mean[2] > mean[0] @ mean[1]  # of texts that are nearly the same
    with pytest.raises(OptionError, match="pooling is 'max', expected one of last, mean"):
        model.embed(TEXT, "max")
    with pytest.raises(OptionError, match="the prompt is empty"):
        model.embed(["fine", ""])


# prefixes


def test_turns_before_the_last_are_read_once(model: Model) -> None:
    turns = [
        {"role": "system", "content": "You are a quiet teller of long stories about the sea."},
        {"role": "user", "content": "Good evening to you."},
        {"role": "model", "content": "Good evening."},
    ]
    model.prefixes.clear()
    texts, reused = [], []
    for _ in range(2):
        for question in ("And now?", "Who was it?"):
            result = model.generate(
                [*turns, {"role": "user", "content": question}], temperature=0, max_tokens=12
            )
            texts.append(result.text)
            reused.append(result.reused_tokens)
    assert reused[0] == 0
    assert min(reused[1:]) > 15
    assert texts[:2] == texts[2:]
    cold = gemma_multi.load(
        model, backend=model.backend, precision="float32", context_length=256, prefix_cache=0
    )
    last = [*turns, {"role": "user", "content": "Who was it?"}]
    again = [cold.generate(last, temperature=0, max_tokens=12) for _ in range(2)]
    assert [one.text for one in again] == [texts[1]] * 2
    assert [one.reused_tokens for one in again] == [0, 0]


def test_the_least_recently_used_go_when_memory_ends(one_model: Model) -> None:
    size = one_model.new_session().nbytes
    cache = PrefixCache(2 * size + 1)

    def start(first: int) -> int:
        ids = [2, *[first] * 20, 9]
        return cache.start(one_model.engine, ids, 20, one_model.context_length)[1]

    assert [start(10), start(11), start(10)] == [0, 0, 20]
    assert start(12) == 0  # 11 goes
    assert cache.nbytes <= cache.limit
    assert [start(10), start(12), start(11)] == [20, 20, 0]
    cache.clear()
    assert start(10) == 0
    too_small = PrefixCache(size - 1)  # nothing is forked to be thrown away
    for _ in range(2):
        assert too_small.start(one_model.engine, [2] * 30, 20, one_model.context_length)[1] == 0
    assert len(too_small) == 0


def test_a_system_text_is_read_once(one_model: Model) -> None:
    one_model.prefixes.clear()
    reused = [
        one_model.generate(
            [{"role": "system", "content": "You tell stories in a quiet voice, never of wolves."},
             {"role": "user", "content": text}], max_tokens=2,
        ).reused_tokens
        for text in ("One of a fox, please.", "And of the sea?", "7 of them.")
    ]  # fmt: skip
    assert reused[0] == 0
    assert min(reused[1:]) > 10


@pytest.mark.parametrize(("limit", "expected"), [("256 MB", 256_000_000), ("1.5gb", 1_500_000_000),
                                                 (7, 7), ("0", 0)])  # fmt: skip
def test_sizes(limit: Any, expected: int) -> None:
    assert PrefixCache(limit).limit == expected


@pytest.mark.parametrize("limit", ["much", -1, True, None, "1 TB", 1.5])
def test_what_is_no_size(limit: Any) -> None:
    with pytest.raises(OptionError, match=r"prefix_cache is .*, expected a size such as '256 MB'"):
        PrefixCache(limit)


@pytest.mark.parametrize("backend", ["mlx", "keras", "litert"])
def test_they_are_saved_for_another_process(backend: str, tmp_path: Path) -> None:
    """Whose answer is the same, with as many tokens reused."""
    ask = (
        "import sys, gemma_multi\n"
        f"model = gemma_multi.load('storyteller', backend={backend!r}, context_length=256)\n"
        "if sys.argv[2] == 'load': assert model.load_prefixes(sys.argv[1]) == 1\n"
        "found = model.classify('Emma met a fox.', ['story', 'news'], 'Is it a story, or what?')\n"
        "print(found.reused_tokens, found.prompt_tokens, f\"{found.probabilities['story']:.4f}\")\n"
        "if sys.argv[2] == 'save': model.save_prefixes(sys.argv[1])\n"
    )
    file = tmp_path / "deep" / "prefixes"
    first, second = (
        subprocess.run(
            [sys.executable, "-c", ask, str(file), what], capture_output=True, text=True, check=True
        ).stdout.split()
        for what in ("save", "load")
    )
    assert (first[0], first[1:]) == ("0", second[1:])
    assert int(second[0]) > 10


def test_prefixes_of_other_weights_or_a_damaged_file_are_refused(
    one_model: Model, tmp_path: Path
) -> None:
    one_model.prefixes.clear()
    one_model.classify(TEXT, ["ok", "no"])
    file = one_model.save_prefixes(tmp_path / "prefixes")
    assert one_model.load_prefixes(file) == 1
    other = gemma_multi.load("storyteller", backend="keras", context_length=512)
    with pytest.raises(OptionError, match="was read with other weights, another backend"):
        other.load_prefixes(file)
    whole = file.read_bytes()
    for damaged in (whole[:-9], whole[:30], b"", whole.replace(b"0.ids", b"7.ids")):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="prefixes"):
            one_model.load_prefixes(file)
    with pytest.raises(CheckpointError):
        one_model.load_prefixes(tmp_path / "nothing")
    with pytest.raises(OptionError, match="cannot be written"):
        one_model.save_prefixes(file / "below" / "a file")
    assert one_model.classify(TEXT, ["ok", "no"]).reused_tokens > 0


def test_another_adapter_forgets_them() -> None:
    from tiny import tiny_checkpoint
    from training.test_adapters import random_adapter

    model = gemma_multi.load(tiny_checkpoint(vocab_size=4096), backend="mlx")
    model.add_adapter("a", random_adapter(0))
    before = model.classify(TEXT, ["ok", "no"])
    model.switch_adapter("a")
    assert model.classify(TEXT, ["ok", "no"]).reused_tokens == 0
    model.switch_adapter(None)
    assert model.classify(TEXT, ["ok", "no"]) == before


# bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": []}, "labels is empty"),
        ({"labels": "abc"}, "labels is 'abc', expected a list"),
        ({"labels": ["a", "a"]}, "labels holds 'a' twice"),
        ({"labels": ["a", 5]}, "labels holds 5"),
        ({"labels": [str(i) for i in range(10_000)]}, "10000 texts, expected at most 1000"),
        ({"text": " "}, "the text is ' ', expected some words"),
        ({"text": 7}, "text is 7, expected a text or a list of texts"),
        ({"text": ["fine", ""]}, "the text is ''"),
        ({"text": ["fine", 5]}, "text holds 5, expected texts"),
        ({"examples": 5}, "examples are 5, expected pairs"),
        ({"instruction": ""}, "instruction is '', expected some words"),
        ({"examples": ["a"]}, "expected pairs of a text and its answer"),
        ({"examples": [("x", "c")]}, "an example has the label 'c', expected one of"),
    ],
)
def test_bad_input(one_model: Model, given: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        one_model.classify(**{"text": TEXT, "labels": ["a", "b"], **given})


def test_a_text_longer_than_the_context(one_model: Model) -> None:
    with pytest.raises(ContextError, match="the context holds 512"):
        one_model.classify("word " * 900, ["a", "b"])


# on the command line


def run(*arguments: str, text: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gemma_multi", *arguments], input=text, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_commands(tmp_path: Any) -> None:
    rows = run("classify", "-l", "ok", "-l", "violation", "--lines", "--json",
               text=f"{TEXT}\n\nLiam flew.\n").splitlines()  # fmt: skip
    assert len(rows) == 2
    first = json.loads(rows[0])
    expected = gemma_multi.load("storyteller").classify(TEXT, ["ok", "violation"])
    assert first["label"] == expected.label
    assert first["probability"] == pytest.approx(expected.probability, abs=1e-3)
    assert json.loads(rows[1])["reused_tokens"] > 0
    label, share = run("route", TEXT, "-r", "a=money", "-r", "b=parcels").split("\t")
    assert label in "ab"
    assert 0.5 <= float(share) <= 1
    schema = tmp_path / "visit.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"ok": {"type": "boolean"}},
                                  "required": ["ok"]}))  # fmt: skip
    assert set(json.loads(run("extract", TEXT, "--schema", str(schema)))) == {"ok"}
    said = json.loads(run("generate", TEXT, "--schema", str(schema), "--json"))
    assert said["parsed"] == json.loads(said["text"])
    assert run("generate", TEXT, "--choices", "yes", "--choices", "no").strip() in ("yes", "no")
