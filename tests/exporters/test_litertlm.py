"""`.litertlm` bundles in the engine they are for: Google's LiteRT-LM, greedily, against ours."""

from __future__ import annotations

from pathlib import Path

import litert_lm
import numpy as np
import pytest
from litert_lm_builder import litertlm_peek
from reading import assert_same_but_for_ties
from tiny import random_tensors, tiny_config

import gemma_multi
from gemma_multi import Checkpoint, CheckpointError
from gemma_multi.comparison.tolerances import tolerance_of
from gemma_multi.demo import STORY
from gemma_multi.engines import create_engine
from gemma_multi.litert_lm import in_litert_lm
from gemma_multi.sources import open_checkpoint
from gemma_multi.tokenizer import Tokenizer

litert_lm.set_min_log_severity(litert_lm.LogSeverity.FATAL)
GREEDY = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
TURNS = (
    STORY,
    "What is the sentiment? Answer positive, negative or neutral.\nText: "
    + " ".join(["I love this lamp, it works perfectly and the light is warm."] * 25),
    "What is the sentiment? Answer positive, negative or neutral.\nText: I love this lamp.",
    "Extract person, company, place and day as JSON.\nText: Emma joined Globex in Oslo on Friday.",
    "Tell me a bedtime story.\nHero: Luna the owl\nSetting: a library with a thousand doors\n"
    "Twist: the voice was an echo\nTheme: friendship\nLength: short",
)


def said(message: dict) -> str:
    return "".join(part.get("text", "") for part in message["content"])


@pytest.mark.parametrize(
    ("precision", "prefill"),
    [("auto", None), ("auto", (8, 32, 256)), ("float32", (2,)), ("int8", (100,))],
)
def test_a_long_conversation_is_the_same_in_litert_lm(
    precision: str, prefill: tuple[int, ...] | None, tmp_path: Path
) -> None:
    """Five turns, over a dozen windows, and prompts that need every prefill size."""
    source: str | Checkpoint = "storyteller"
    if precision == "int8":  # from the weights as they are: the grid of int4, held in int8
        stored = open_checkpoint("storyteller")
        dense = {name: np.asarray(stored.weight(name), np.float32) for name in stored.tensors}
        source = stored.with_tensors(dense)
    path = tmp_path / "storyteller.litertlm"
    gemma_multi.export(source, path, precision=precision, prefill=prefill)
    model = gemma_multi.load(path)
    ours, messages, parted = model.chat(), [], False
    with litert_lm.Engine(str(path), litert_lm.Backend.CPU(thread_count=2)) as engine:
        theirs = engine.create_conversation(sampler_config=GREEDY)
        for turn in TURNS:
            expected = said(theirs.send_message(turn)).strip()
            messages.append({"role": "user", "content": turn})
            prompt = model.encode(messages)
            parted = assert_same_but_for_ties(model, prompt, expected) or parted
            messages.append({"role": "model", "content": expected})
            if not parted:  # and a conversation of ours that never leaves its cache
                answer = ours.send(turn, temperature=0, max_tokens=600).text.strip()
                if answer != expected:  # written step by step, which may round in another order
                    assert_same_but_for_ties(model, prompt, answer)
                    parted = True
    assert not (parted and precision == "float32")
    assert len(model.encode([*messages, {"role": "user", "content": "."}])) > 12 * 64


def test_system_text_and_spaces_around_a_turn_are_the_same_in_litert_lm(tmp_path: Path) -> None:
    """Turns are trimmed and system text is not, as Google's template has it."""
    path = tmp_path / "storyteller.litertlm"
    gemma_multi.export("storyteller", path, precision="float32")
    system = " Answer in one word.\n"
    ours = gemma_multi.load(path).chat(system=system)
    with litert_lm.Engine(str(path)) as engine:
        theirs = engine.create_conversation(sampler_config=GREEDY, system_message=system)
        for turn in (f"  {TURNS[2]}\n ", TURNS[3]):
            answer = said(theirs.send_message(turn))
            assert ours.send(turn, temperature=0, max_tokens=600).text == answer


def test_earlier_turns_can_be_given_to_litert_lm_at_once(tmp_path: Path) -> None:
    """In float32, so that there is one answer: ours to the same messages, and another without
    what came before."""
    path = tmp_path / "storyteller.litertlm"
    gemma_multi.export("storyteller", path, precision="float32", context_length=512)
    model = gemma_multi.load(path)
    messages = [
        {"role": "system", "content": "Answer in one word."}, {"role": "user", "content": TURNS[2]},
        {"role": "model", "content": "negative"}, {"role": "user", "content": "Tell me more."},
    ]  # fmt: skip
    with in_litert_lm(path, max_tokens=12) as ask:
        for asked in (messages, messages[-1:]):
            assert ask(asked) == model.generate(asked, temperature=0, max_tokens=12).text
        assert ask(messages) != ask(messages[-1:])


def test_the_real_vocabulary_and_grouped_heads(
    gemma_tokenizer_directory: Path, tmp_path: Path
) -> None:
    """A random model over Gemma's 262,144 words, whose tokenizer comes from tokenizer.json."""
    config = tiny_config(vocab_size=262144, num_key_value_heads=2, hidden_size=64,
                         max_position_embeddings=512)  # fmt: skip
    checkpoint = Checkpoint(
        config,
        random_tensors(config),
        path=gemma_tokenizer_directory,
        make_tokenizer=lambda: Tokenizer.from_directory(gemma_tokenizer_directory),
    )
    path = tmp_path / "random.litertlm"
    gemma_multi.export(checkpoint, path, precision="int4")
    prompt = "Grüße aus 東京! 3.14159, émigré — def f(x): return x**2  🙂 " * 3
    model = gemma_multi.load(path)
    ours = model.generate(prompt, temperature=0, max_tokens=40)
    with litert_lm.Engine(str(path)) as engine:
        conversation = engine.create_conversation(sampler_config=GREEDY, max_output_tokens=40)
        theirs = said(conversation.send_message(prompt))
    assert len(theirs) > 10
    if theirs != ours.text:  # they may part where our two best tokens are nearly equal
        said_so_far = (model.tokenizer.decode(ours.tokens[: i + 1]) for i in range(40))
        at = next(i for i, text in enumerate(said_so_far) if not theirs.startswith(text))
        logits = model.engine.session().read([*model.encode(prompt), *ours.tokens[:at]])
        second, best = np.sort(logits)[-2:]
        assert best - second <= tolerance_of("int8", "int8").tie


def test_what_the_bundle_says_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "storyteller.litertlm"
    report = gemma_multi.export("storyteller", path, context_length=512)
    assert (report.format, report.precision, report.context_length) == ("litertlm", "int4", 512)
    assert report.nbytes == path.stat().st_size
    litertlm_peek.peek_litertlm_file(
        str(path), str(tmp_path / "parts"), (tmp_path / "said").open("w")
    )
    text = (tmp_path / "said").read_text()
    assert "max_num_tokens: 512" in text
    assert "gemma3" in text
    assert "apache-2.0" in text
    parts = [p.read_bytes() for p in (tmp_path / "parts").iterdir()]
    (notice,) = [part for part in parts if part.startswith(b"Licensed under the Apache License")]
    assert b"exported for LiteRT as int4, context length 512" in notice


def test_a_bundle_runs_on_every_backend_with_the_same_weights(tmp_path: Path) -> None:
    gemma_multi.export("storyteller", tmp_path / "storyteller.litertlm")
    opened = open_checkpoint(tmp_path / "storyteller.litertlm")
    assert opened.provenance.license == "apache-2.0"
    assert dict(opened.generation) == dict(gemma_multi.load().checkpoint.generation)
    ids = opened.tokenizer.encode(STORY)
    expected = create_engine(gemma_multi.load().checkpoint, "keras", "float32").session()
    actual = create_engine(opened, "keras", "float32").session()
    np.testing.assert_array_equal(actual.read(ids), expected.read(ids))


def test_a_bundle_without_a_tokenizer_or_with_another_is_refused(tmp_path: Path) -> None:
    from litert_lm_builder import litertlm_builder as builder

    good, model = tmp_path / "good.litertlm", tmp_path / "model.tflite"
    gemma_multi.export("storyteller", good)
    file = open_checkpoint(good).tensors.origin.file
    model.write_bytes(file.model_bytes)
    other = tmp_path / "other.model"
    other.write_bytes(file.tokenizer_model()[:-1] + b"x")
    for tokenizer, message in ((None, "has no tokenizer section"), (other, "is not the one")):
        bundle = builder.LitertLmFileBuilder()
        text = builder.DType.STRING
        bundle.add_system_metadata(builder.Metadata("Authors", "a test", text))
        if tokenizer is not None:
            bundle.add_sentencepiece_tokenizer(str(tokenizer))
        bundle.add_tflite_model(str(model), builder.TfLiteModelType.PREFILL_DECODE)
        path = tmp_path / f"{tokenizer is None}.litertlm"
        with path.open("wb") as target:
            bundle.build(target, validate_metadata=False)
        with pytest.raises(CheckpointError, match=message):
            gemma_multi.load(path)
