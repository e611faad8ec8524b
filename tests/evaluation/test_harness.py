"""The harness's requests: log-probabilities are those of the decoder in NumPy, texts those of
`generate`, and lm_eval's own evaluator runs tasks on them."""

from __future__ import annotations

import importlib
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import rows as drawn
from needs import package

import gemma_multi
from gemma_multi import DataError, Model, OptionError
from gemma_multi.decoder import Decoder, Weights, log_softmax
from gemma_multi.evaluation.run_harness import run_harness
from gemma_multi.tokenizer_json import CHAT_TEMPLATE

CHAT = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": " Who? \n"},
    {"role": "assistant", "content": "Pip."}, {"role": "user", "content": "Where?"},
]  # fmt: skip
reference = pytest.mark.skipif(
    not os.environ.get("GEMMA_MULTI_REFERENCE"), reason="needs torch; `make reference` runs it"
)


@pytest.fixture(scope="module")
def lm(model: Model) -> Any:
    package("lm_eval", "eval")
    from gemma_multi.evaluation.harness import GemmaMultiLM

    return GemmaMultiLM(model, progress=False)


@pytest.fixture(scope="module")
def side_by_side(lm: Any) -> Any:
    """The same on an engine that reads many contexts at once."""
    model = gemma_multi.load("storyteller", backend="mlx", precision="float32", context_length=512)
    assert model.engine.rows_at_a_time > 1
    return type(lm)(model, progress=False)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    checkpoint = gemma_multi.open_checkpoint("storyteller")
    return Decoder(checkpoint.config, Weights(checkpoint))


def requests(kind: str, *arguments: tuple) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def logprobs(decoder: Decoder, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """What the harness asks for, from logits of the whole."""
    ids = [*context, *continuation]
    found = log_softmax(decoder.logits(np.array(ids[:-1])))[len(context) - 1 :]
    total = float(found[np.arange(len(continuation)), continuation].sum())
    return total, bool((found.argmax(-1) == continuation).all())


def test_loglikelihoods_are_the_decoders(lm: Any, side_by_side: Any, decoder: Decoder) -> None:
    """Contexts that several continuations share, that begin alike, that end with space, that are
    empty, and a continuation that is what the model would write."""
    prompt = lm.apply_chat_template(CHAT)
    begun = "Once upon a time"
    written = lm.model.generate(begun, raw=True, temperature=0, max_tokens=3).text
    pairs = [
        *((prompt, label) for label in ("positive", "negative", "very positive indeed")),
        ("The hedgehog slept", " well."), ("The hedgehog", " slept"), ("The hedgehog ", "slept on"),
        (begun, written), ("", begun),
    ]  # fmt: skip
    expected = []
    for context, continuation in pairs:
        head = context.rstrip()  # the harness has space with what follows it
        before = lm.tok_encode(head) if head else [lm.prefix_token_id]
        whole = lm.tok_encode(context + continuation)
        expected.append(logprobs(decoder, before, whole[len(before) :]))
    assert expected[-2][1]
    for one in (lm, side_by_side):
        found = one.loglikelihood(requests("loglikelihood", *pairs))
        totals, greedy = zip(*found, strict=True)
        np.testing.assert_allclose(totals, [total for total, _ in expected], rtol=0, atol=2e-3)
        assert list(greedy) == [best for _, best in expected]


def test_what_does_not_fit_loses_its_beginning(lm: Any, decoder: Decoder) -> None:
    context = lm.tok_encode("The hedgehog slept on. " * 120)
    assert len(context) > lm.max_length
    ((found, _),) = lm._loglikelihood_tokens([(None, context, [500, 501])])
    expected, _ = logprobs(decoder, context[-(lm.max_length - 1) :], [500, 501])
    assert found == pytest.approx(expected, abs=2e-3)
    with pytest.raises(OptionError, match="a continuation of 600"):
        lm._loglikelihood_tokens([(None, [2], [500] * 600)])


def test_a_rolling_text_has_bos_once_and_goes_in_windows(lm: Any, decoder: Decoder) -> None:
    short = "Once upon a time there was a hedgehog called Pip."
    long = "The hedgehog slept on. Then it rained. " * 60
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (short,), (long,)))
    assert found[0] == pytest.approx(lm.model.score(short).total, abs=2e-3)
    ids, most, total = lm.model.tokenizer.encode(long), lm.max_length, 0.0
    assert most < len(ids) < 2 * most
    total += logprobs(decoder, [lm.prefix_token_id], ids[:most])[0]
    rest = len(ids) - most
    window = ids[-(most + 1) :]  # a full context for what is left
    total += logprobs(decoder, window[:-rest], window[-rest:])[0]
    assert found[1] == pytest.approx(total, abs=5e-3)


@pytest.mark.parametrize("which", ["lm", "side_by_side"])
def test_texts_are_those_of_generate(request: pytest.FixtureRequest, which: str) -> None:
    lm = request.getfixturevalue(which)
    question = "Tell me a bedtime story.\nHero: Pip the hedgehog"
    prompt = lm.apply_chat_template([{"role": "user", "content": question}])
    asked = [(prompt, {"until": ["."], "max_gen_toks": 24}),
             ("Once upon a time", {"until": [], "max_gen_toks": 12, "do_sample": False}),
             (prompt, {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": True,
                       "temperature": 1.0, "seed": 3})]  # fmt: skip
    found = lm.generate_until(requests("generate_until", *asked))
    assert found == [
        lm.model.generate(question, temperature=0, stop=["."], max_tokens=24).text,
        lm.model.generate("Once upon a time", raw=True, temperature=0, max_tokens=12).text,
        lm.model.generate(question, temperature=1.0, seed=3, stop=["\n\n"], max_tokens=8).text,
    ]
    assert "." not in found[0]
    for wrong, said in (({"num_beams": 4}, "no option 'num_beams'"),
                        ({"max_gen_toks": 512}, "the context holds 512")):  # fmt: skip
        with pytest.raises(OptionError, match=said):
            lm.generate_until(requests("generate_until", ("a", {"until": [], **wrong})))


def test_chats_are_googles_template_and_our_ids(lm: Any) -> None:
    template = jinja2.Template(CHAT_TEMPLATE)
    theirs = template.render(messages=CHAT, bos_token="<bos>", add_generation_prompt=True)
    assert lm.apply_chat_template(CHAT) == theirs
    assert lm.tok_encode(theirs) == lm.model.encode(CHAT)
    begun = lm.apply_chat_template(
        [*CHAT, {"role": "assistant", "content": "In a"}], add_generation_prompt=False
    )
    assert begun == f"{theirs}In a"
    with pytest.raises(OptionError, match="ends with a question"):
        lm.apply_chat_template(CHAT, add_generation_prompt=False)


def write_task(directory: Path, name: str, data: Path, **settings: Any) -> None:
    """JSON is YAML."""
    (directory / f"{name}.yaml").write_text(json.dumps({
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "doc_to_text": "{{prompt}}", "target_delimiter": "", **settings,
    }))  # fmt: skip


def test_the_harness_runs_tasks_of_each_kind(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package("lm_eval", "eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data, rows = tmp_path / "rows.jsonl", drawn.sentiment(6)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = ["positive", "negative", "neutral"]
    write_task(tmp_path, "choosing", data, output_type="multiple_choice", doc_to_choice=labels,
               doc_to_target="completion", metric_list=[{"metric": "acc"}])  # fmt: skip
    write_task(tmp_path, "writing", data, output_type="generate_until", doc_to_target="completion",
               generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
               metric_list=[{"metric": "exact_match"}])  # fmt: skip
    write_task(tmp_path, "reading", data, output_type="loglikelihood_rolling", doc_to_text="",
               doc_to_target="{{prompt}}", metric_list=[{"metric": "word_perplexity"}])  # fmt: skip
    found = {one.task: one for one in run_harness(
        model, ["choosing", "writing", "reading"], include_path=str(tmp_path), chat=True,
        progress=False)}  # fmt: skip
    classified = gemma_multi.evaluate(model, rows, "classify", labels=labels, progress=False)
    assert found["choosing"].findings.figures["acc"] == classified.findings.figures["accuracy"]
    written = [model.generate(row["prompt"], temperature=0, stop=["\n"], max_tokens=8).text
               for row in rows]  # fmt: skip
    exact = sum(text == row["completion"] for text, row in zip(written, rows, strict=True))
    assert found["writing"].findings.figures["exact_match"].value == exact / 6
    losses = [-model.score(row["prompt"]).total for row in rows]
    words = [len(row["prompt"].split()) for row in rows]
    perplexity = found["reading"].findings.figures["word_perplexity"]
    assert perplexity.value == pytest.approx(np.exp(sum(losses) / sum(words)), rel=0.05)
    assert perplexity.low < perplexity.value < perplexity.high
    assert found["reading"].data["rows"] == 6
    assert len(found["reading"].data["sha256"]) == 64
    assert found["choosing"].protocol["harness"].startswith("lm_eval 0.")
    data.unlink()
    with pytest.raises(DataError, match="the data of choosing cannot be had"):
        run_harness(model, ["choosing"], include_path=str(tmp_path), progress=False)
    with pytest.raises(OptionError, match="no such directory"):
        run_harness(model, ["choosing"], include_path=str(tmp_path / "none"), progress=False)


def test_lm_eval_knows_the_model_by_its_name_and_by_the_entry_point() -> None:
    registry = package("lm_eval.api.registry", "eval")
    from gemma_multi.evaluation.harness import NAME, GemmaMultiLM

    assert registry.get_model(NAME) is GemmaMultiLM
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lm_eval.models"][NAME].split(":")
    assert getattr(importlib.import_module(module), name) is GemmaMultiLM
    made = GemmaMultiLM.create_from_arg_string(
        "pretrained=storyteller,backend=litert,context_length=256", {"batch_size": "auto"}
    )
    assert (made.max_length, made.model.backend) == (256, "litert")
    assert made.get_model_info()["weights_sha256"] == made.model.checkpoint.digest()
    for arguments, said in (({"device": "tpu"}, "device is 'tpu'"),
                            ({"batch_size": "many"}, "batch_size is 'many'"),
                            ({"thread": 2}, "thread")):  # fmt: skip
        with pytest.raises(OptionError, match=said):
            GemmaMultiLM(**{"backend": "litert", **arguments})


def test_an_exported_file_answers_as_what_it_was_exported_from(tmp_path: Path) -> None:
    package("lm_eval", "eval")
    from gemma_multi.evaluation.harness import GemmaMultiLM

    path = gemma_multi.export("storyteller", tmp_path / "m.litertlm", context_length=256,
                              progress=False).path  # fmt: skip
    asked = [("The hedgehog", text) for text in (" slept", " ran away", " was called Pip.")]
    file, source = (
        GemmaMultiLM(one, backend="litert", context_length=256, progress=False).loglikelihood(
            requests("loglikelihood", *asked)
        )
        for one in (str(path), "storyteller")
    )
    for (one, greedy), (other, best) in zip(file, source, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
        assert greedy is best
    rows, labels = drawn.sentiment(4), ("positive", "negative", "neutral")
    model = gemma_multi.load(path)
    report = gemma_multi.evaluate(model, rows, "classify", labels=labels, progress=False)
    assert report.findings.figures["accuracy"].value >= 0.75
    assert report.protocol["weights"] == "int4"


@reference
def test_figures_are_those_of_transformers_in_the_same_harness(lm: Any, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    path = gemma_multi.export("storyteller", tmp_path / "m", format="huggingface",
                              precision="float32", progress=False).path  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    # as bfloat16 rounds it, which transformers does for weights in bfloat16 alone
    model.model.embed_tokens.embed_scale = torch.tensor(lm.model.config.embedding_scale)
    theirs = HFLM(pretrained=model, tokenizer=str(path), backend="causal", device="cpu")
    assert theirs.apply_chat_template(CHAT) == lm.apply_chat_template(CHAT)
    prompts = [lm.apply_chat_template([{"role": "user", "content": row["prompt"]}])
               for row in drawn.sentiment(4)]  # fmt: skip
    pairs = [(prompt, label) for prompt in prompts for label in ("positive", "negative", "neutral")]
    pairs += [("The hedgehog ", "slept on"), ("", "Once upon")]
    for ours, other in zip(*(side.loglikelihood(requests("loglikelihood", *pairs))
                             for side in (lm, theirs)), strict=True):  # fmt: skip
        assert ours == pytest.approx(other, abs=1e-3)
    asked = [(prompt, {"until": ["\n"], "max_gen_toks": 12}) for prompt in prompts]
    ours, other = (side.generate_until(requests("generate_until", *asked)) for side in (lm, theirs))
    assert ours == other
