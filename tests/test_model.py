"""The façade on the bundled model: generate, stream, chat, score, save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import edit_json

import gemma_multi
from gemma_multi import chat_template
from gemma_multi.engines import ALL
from gemma_multi.errors import BackendError, CheckpointError, ContextError, OptionError
from gemma_multi.exporters import save

STORY = (
    "Tell me a bedtime story.\nHero: Nora the otter\nSetting: a windmill on a green hill\n"
    "Twist: the soup was made of music\nTheme: sharing\nLength: short"
)


@pytest.fixture(scope="module", params=["mlx", "keras"])
def model(request: pytest.FixtureRequest) -> gemma_multi.Model:
    return gemma_multi.load("storyteller", backend=request.param)


@pytest.fixture(scope="module")
def mlx() -> gemma_multi.Model:
    return gemma_multi.load("storyteller", backend="mlx")


class TestGenerate:
    def test_a_story_ends_by_itself_and_counts_are_right(self, model: gemma_multi.Model) -> None:
        result = model.generate(STORY, seed=1)
        assert result.finish_reason == "stop"
        assert "Nora" in result.text
        assert str(result) == result.text == model.tokenizer.decode(result.tokens)
        assert result.generated_tokens == len(result.tokens)
        prompt = chat_template.encode_prompt(model.tokenizer, [{"role": "user", "content": STORY}])
        assert result.prompt_tokens == len(prompt)
        assert result.prefill_seconds > 0
        assert result.decode_seconds > 0
        assert result.tokens_per_second > 0
        assert not {1, 2, 105, 106} & set(result.tokens)

    def test_mlx_and_keras_tell_the_same_story(self, mlx: gemma_multi.Model) -> None:
        keras = gemma_multi.load("storyteller", backend="keras")
        for seed in range(4):
            assert mlx.generate(STORY, seed=seed).tokens == keras.generate(STORY, seed=seed).tokens
        assert mlx.generate(STORY, temperature=0).text == keras.generate(STORY, temperature=0).text

    def test_a_prompt_is_one_user_turn(self, mlx: gemma_multi.Model) -> None:
        as_messages = mlx.generate([{"role": "user", "content": STORY}], seed=2)
        assert mlx.generate(STORY, seed=2).tokens == as_messages.tokens

    def test_raw_continues_the_text(self, mlx: gemma_multi.Model) -> None:
        text = "Tell me a bedtime story.\nHero: Nora the otter\nSetting: a windmill on a"
        ids = [2, *mlx.tokenizer.encode(text)]
        result = mlx.generate(text, raw=True, max_tokens=3, temperature=0)
        assert result.prompt_tokens == len(ids)
        best = int(mlx.engine.session().read(ids).argmax())
        assert best not in mlx.stop_ids
        assert result.tokens[0] == best

    def test_the_drawn_seed_gives_the_text_again(self, mlx: gemma_multi.Model) -> None:
        first = mlx.generate(STORY, temperature=1.5)
        assert mlx.generate(STORY, temperature=1.5, seed=first.seed).text == first.text

    def test_stop_texts_end_it_and_are_left_out(self, mlx: gemma_multi.Model) -> None:
        whole = mlx.generate(STORY, seed=1).text
        for stop in (whole[40:47], whole[100:101], whole[60:90]):
            result = mlx.generate(STORY, seed=1, stop=["never said", stop])
            assert result.text == whole[: whole.index(stop)]
            assert result.finish_reason == "stop"
            pieces = list(mlx.stream(STORY, seed=1, stop=stop))
            assert "".join(pieces) == result.text

    def test_a_stream_is_the_text_in_pieces(self, mlx: gemma_multi.Model) -> None:
        stream = mlx.stream(STORY, seed=1)
        pieces = list(stream)
        assert len(pieces) > 20
        assert "".join(pieces) == stream.result.text == mlx.generate(STORY, seed=1).text

    def test_a_closed_stream_stops(self, mlx: gemma_multi.Model) -> None:
        stream = mlx.stream(STORY, seed=1)
        said = next(stream) + next(stream)
        stream.close()
        assert list(stream) == []
        assert stream.result.text == said
        assert stream.result.finish_reason == "closed"


class TestBadInput:
    @pytest.mark.parametrize("prompt", ["", "  \n"])
    def test_an_empty_prompt(self, mlx: gemma_multi.Model, prompt: str) -> None:
        with pytest.raises(OptionError, match="prompt is empty"):
            mlx.generate(prompt)

    def test_a_prompt_longer_than_the_context(self) -> None:
        small = gemma_multi.load("storyteller", backend="mlx", context_length=40)
        with pytest.raises(ContextError, match=r"tokens long, but the context holds 40"):
            small.generate(STORY)
        assert small.generate("Good night.").text

    def test_options_are_checked_before_anything_runs(self, mlx: gemma_multi.Model) -> None:
        for given in ({"max_tokens": 0}, {"temperature": float("nan")}, {"colour": "blue"}):
            with pytest.raises(OptionError):
                mlx.stream(STORY, **given)

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ({"backend": "torch"}, BackendError, "unknown backend 'torch', expected auto, mlx"),
            ({"precision": "float16", "backend": "litert"}, OptionError, "not in float16"),
            ({"precision": "int3"}, OptionError, "unknown precision 'int3'"),
            ({"context_length": 0}, OptionError, "context_length is 0, expected 1 to 2048"),
            ({"context_length": 4096}, OptionError, "expected 1 to 2048"),
            ({"model": ""}, CheckpointError, "expected a directory"),
            ({"model": "x" * 300}, CheckpointError, "cannot be read|no such directory"),
            ({"context_length": "12"}, OptionError, "context_length is '12'"),
            ({"revision": "v1"}, OptionError, "storyteller is not on the hub"),
            ({"model": "no/such/place"}, CheckpointError, "no such directory"),
        ],
    )
    def test_load_refuses(self, given: dict, error: type, message: str) -> None:
        with pytest.raises(error, match=message):
            gemma_multi.load(**given)

    @pytest.mark.parametrize(
        ("backend", "module"),
        [("mlx", "mlx"), ("mlx", "mlx_lm"), ("keras", "keras"), ("keras", "keras_hub")],
    )
    def test_a_backend_that_is_not_installed(self, backend: str, module: str) -> None:
        """In a process where that package cannot be found."""
        script = (
            "import sys, importlib.abc\n"
            "class Absent(importlib.abc.MetaPathFinder):\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name.split('.')[0] == {module!r}:\n"
            "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
            "sys.meta_path.insert(0, Absent())\n"
            "import gemma_multi.cli\n"
            f"gemma_multi.cli.main(['generate', 'hi', '--backend', {backend!r}])\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert "pip install 'gemma-multi[" in last
        assert "Traceback" not in done.stderr


class TestChat:
    def test_a_chat_equals_the_whole_conversation_read_at_once(
        self, model: gemma_multi.Model
    ) -> None:
        chat = model.chat("You tell stories.")
        first = chat.send(STORY, temperature=0)
        second = chat.send("Who was the hero?", temperature=0)
        messages = [
            {"role": "system", "content": "You tell stories."},
            {"role": "user", "content": STORY},
            {"role": "model", "content": first.text},
            {"role": "user", "content": "Who was the hero?"},
        ]
        at_once = model.generate(messages, temperature=0)
        assert second.text == at_once.text
        assert second.prompt_tokens == at_once.prompt_tokens
        assert [m["role"] for m in chat.messages] == ["user", "model"] * 2

    def test_a_later_turn_reads_only_what_is_new(self, mlx: gemma_multi.Model) -> None:
        chat = mlx.chat()
        chat.send(STORY, temperature=0)
        read = []
        forward = chat._session._forward
        chat._session._forward = lambda ids, want: read.append(len(ids)) or forward(ids, want)  # type: ignore[method-assign]
        chat.send("Thank you!", temperature=0, max_tokens=4)
        assert read[0] < 20  # the turn and the end of the one before, not the story

    def test_what_was_said_before_a_stop_is_remembered(self, mlx: gemma_multi.Model) -> None:
        chat = mlx.chat()
        stream = chat.stream(STORY, seed=3)
        said = "".join(next(stream) for _ in range(5))
        stream.close()
        assert chat.messages[-1] == {"role": "model", "content": said}
        after = chat.send("Good night.", temperature=0)
        messages = [*chat.messages[:2], {"role": "user", "content": "Good night."}]
        assert after.text == mlx.generate(messages, temperature=0).text

    def test_a_new_turn_ends_an_answer_still_under_way(self, mlx: gemma_multi.Model) -> None:
        chat = mlx.chat()
        stream = chat.stream(STORY, seed=3)
        said = next(stream) + next(stream)
        chat.stream("never listened to")
        answer = chat.send("Good night.", temperature=0)
        assert list(stream) == []
        assert [m["content"] for m in chat.messages] == [STORY, said, "Good night.", answer.text]

    def test_an_interrupted_answer_leaves_a_chat_that_works(self, model: gemma_multi.Model) -> None:
        """Ctrl-C in the middle of reading a token, after half of the cache was written."""
        chat = model.chat()
        stream = chat.stream(STORY, seed=3)
        said = next(stream) + next(stream)
        forward = chat._session._forward

        def interrupted(ids: np.ndarray, every: bool) -> np.ndarray:
            forward(ids, every)
            raise KeyboardInterrupt

        chat._session._forward = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        chat._session._forward = forward  # type: ignore[method-assign]
        stream.close()
        assert chat.messages[-1]["content"].startswith(said)
        after = chat.send("Good night.", temperature=0)
        messages = [*chat.messages[:2], {"role": "user", "content": "Good night."}]
        assert after.text == model.generate(messages, temperature=0).text

    def test_a_turn_that_is_cancelled_before_a_word_never_happened(
        self, mlx: gemma_multi.Model
    ) -> None:
        chat = mlx.chat()
        stream = chat.stream(STORY)
        stream.cancelled.set()
        assert list(stream) == []
        assert (stream.result.finish_reason, chat.messages) == ("cancelled", [])
        assert chat.send(STORY, temperature=0).text == mlx.generate(STORY, temperature=0).text
        later = chat.stream("Good night.", temperature=0)
        first = next(later)
        later.cancelled.set()
        assert "".join([first, *later]) == later.result.text == chat.messages[-1]["content"]

    def test_a_full_conversation_refuses_and_keeps_what_it_has(self) -> None:
        chat = gemma_multi.load("storyteller", backend="mlx", context_length=300).chat()
        chat.send(STORY, temperature=0)
        before = list(chat.messages)
        with pytest.raises(ContextError, match="conversation would be"):
            chat.send("and then " * 200)
        assert chat.messages == before
        assert chat.send("Thank you!", temperature=0, max_tokens=5).text
        chat.reset()
        assert chat.messages == []
        assert chat.send("Thank you!", temperature=0, max_tokens=5).prompt_tokens < 20

    def test_a_stop_text_is_not_remembered(self, mlx: gemma_multi.Model) -> None:
        chat = mlx.chat()
        whole = mlx.generate(STORY, temperature=0).text
        first = chat.send(STORY, temperature=0, stop=whole[50:53])
        assert first.text == whole[:50]
        second = chat.send("Good night.", temperature=0)
        assert second.text == mlx.generate(
            [*chat.messages[:2], {"role": "user", "content": "Good night."}], temperature=0
        ).text  # fmt: skip

    def test_a_turn_that_never_began_never_happened(self, mlx: gemma_multi.Model) -> None:
        chat = mlx.chat()
        stream = chat.stream("hello")
        stream.close()
        assert list(stream) == []
        assert chat.messages == []

    def test_an_empty_turn_is_refused(self, mlx: gemma_multi.Model) -> None:
        with pytest.raises(OptionError, match="prompt is empty"):
            mlx.chat().send(" ")
        with pytest.raises(OptionError, match="system is 5"):
            mlx.chat(5)  # type: ignore[arg-type]


class TestScore:
    def test_log_probabilities_are_the_engines(self, model: gemma_multi.Model) -> None:
        text = "Once upon a time, in a quiet forest, there lived a small owl named Finn. " * 9
        score = model.score(text)
        ids = [2, *model.tokenizer.encode(text)]
        assert len(ids) > 128  # more than one chunk
        assert score.tokens == tuple(ids[1:])
        logits = model.engine.session().read(ids, ALL)[:-1].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = logprobs[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
        assert score.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-4)
        assert score.total == pytest.approx(expected.sum(), rel=1e-4)

    def test_a_story_is_likelier_than_its_words_shuffled(self, mlx: gemma_multi.Model) -> None:
        story = mlx.generate(STORY, seed=1).text
        shuffled = " ".join(sorted(story.split()))
        assert mlx.score(story).perplexity * 3 < mlx.score(shuffled).perplexity


class TestSaveAndLoad:
    def test_a_saved_model_answers_the_same(self, mlx: gemma_multi.Model, tmp_path: Path) -> None:
        again = gemma_multi.load(mlx.save(tmp_path / "copy"), backend="mlx")
        assert again.generate(STORY, seed=5).tokens == mlx.generate(STORY, seed=5).tokens
        assert again.checkpoint.digest() == mlx.checkpoint.digest()

    def test_a_finetune_with_only_tokenizer_json_loads(
        self, gemma_tokenizer_directory: Path, tmp_path: Path
    ) -> None:
        from tiny import random_tensors, tiny_checkpoint, tiny_config

        config = tiny_config(vocab_size=262144, hidden_size=32, intermediate_size=32)
        source = tiny_checkpoint().replace(config=config, tensors=random_tensors(config))
        path = save(source, tmp_path / "model")
        for made in ("tokenizer.model", "tokenizer.json"):
            (path / made).unlink()
        os.symlink(gemma_tokenizer_directory / "tokenizer.json", path / "tokenizer.json")
        model = gemma_multi.load(path, backend="mlx")
        assert model.tokenizer.encode("Hello") == [9259]
        assert model.generate("Hello", max_tokens=2).generated_tokens <= 2
        saved = model.save(tmp_path / "saved")
        assert {"tokenizer.json", "tokenizer.model"} <= {p.name for p in saved.iterdir()}

    def test_a_tokenizer_of_another_model_is_refused(self, tmp_path: Path) -> None:
        from tiny import random_tensors, tiny_checkpoint, tiny_config

        config = tiny_config(vocab_size=9000)
        source = tiny_checkpoint().replace(config=config, tensors=random_tensors(config))
        with pytest.raises(OptionError, match="4096 pieces, but the model 9000"):
            gemma_multi.load(source, backend="mlx")

    def test_a_stale_tokenizer_model_gives_way_to_the_json_that_has_all_words(
        self, gemma_tokenizer_directory: Path, tmp_path: Path
    ) -> None:
        from tiny import random_tensors, tiny_checkpoint, tiny_config

        config = tiny_config(vocab_size=262145, hidden_size=32, intermediate_size=32)
        source = tiny_checkpoint().replace(config=config, tensors=random_tensors(config))
        path = save(source, tmp_path / "model")  # with the tokenizer of the tiny model
        (path / "tokenizer.json").unlink()
        os.symlink(gemma_tokenizer_directory / "tokenizer.json", path / "tokenizer.json")
        assert gemma_multi.load(path, backend="mlx").tokenizer.vocab_size == 262145

    def test_words_the_tokenizer_does_not_know_are_never_said(self) -> None:
        from tiny import random_tensors, tiny_checkpoint, tiny_config

        config = tiny_config(vocab_size=4160)  # 64 more than there are pieces
        tensors = random_tensors(config)
        tensors["model.embed_tokens.weight"][4096:] *= 50  # and very likely
        source = tiny_checkpoint().replace(config=config, tensors=tensors)
        result = gemma_multi.load(source, backend="mlx").generate("hi", max_tokens=50, seed=0)
        assert max(result.tokens) < 4096

    @pytest.mark.parametrize("backend", ["mlx", "keras"])
    def test_describe_says_what_runs(self, backend: str, tmp_path: Path) -> None:
        described = gemma_multi.load(backend=backend, precision="bfloat16").describe()
        assert described["backend"] == backend
        assert (described["weights"], described["stored_as"]) == ("bfloat16", "int4")
        assert described["grid"] == "portable"
        json.dumps(described)

    def test_asking_for_int4_puts_a_dense_model_on_the_grid(self, tiny_directory: Path) -> None:
        from gemma_multi.transforms import quantize_checkpoint

        model = gemma_multi.load(tiny_directory, backend="mlx", precision="int4")
        grid, _ = quantize_checkpoint(model.checkpoint)
        other = gemma_multi.load(grid, backend="keras", precision="float32")
        ids = np.arange(5, 25)
        np.testing.assert_allclose(
            model.engine.session().read(ids, ALL), other.engine.session().read(ids, ALL), atol=1e-4
        )

    @pytest.mark.parametrize("backend", ["mlx", "keras"])
    def test_mixed_and_8_bit_directories_run_and_are_called_what_they_are(
        self, backend: str, tiny_directory: Path, tmp_path: Path
    ) -> None:
        from gemma_multi.transforms import quantize_checkpoint

        dense = gemma_multi.open_checkpoint(tiny_directory)
        int4, _ = quantize_checkpoint(dense)
        int8, _ = quantize_checkpoint(dense, bits=8, embedding_bits=8)
        gate = "model.layers.0.mlp.gate_proj.weight"
        mixed = int4.replace(tensors={**int4.tensors, gate: dense.tensors[gate]})
        only_embedding = dense.replace(
            tensors={**dense.tensors, "model.embed_tokens.weight":
                     int4.tensors["model.embed_tokens.weight"]})  # fmt: skip
        ids = np.arange(5, 25)
        for name, checkpoint in {"int8": int8, "mixed": mixed, "float32": only_embedding}.items():
            opened = gemma_multi.open_checkpoint(save(checkpoint, tmp_path / name))
            assert (opened.precision, opened.is_quantized) == (name, True)
            model = gemma_multi.load(opened, backend=backend)
            assert model.engine.precision == name
            wide = gemma_multi.load(opened, backend=backend, precision="float32")
            np.testing.assert_allclose(
                model.engine.session().read(ids, ALL),
                wide.engine.session().read(ids, ALL),
                atol=1e-4,
            )
            if name == "int8":  # stands for the weights it was made of
                again = quantize_checkpoint(opened)[0]
                made_dense = dense.with_tensors({n: int8.weight(n) for n in int8.tensors})
                assert again.tensors == quantize_checkpoint(made_dense)[0].tensors
                continue
            with pytest.raises(CheckpointError, match="already"):
                quantize_checkpoint(opened)
            with pytest.raises(CheckpointError, match="already"):
                gemma_multi.load(opened, backend=backend, precision="int4")

    def test_older_checkpoints_stop_at_the_end_of_a_turn(self, tiny_copy: Path) -> None:
        edit_json(tiny_copy / "config.json", eos_token_id=1)
        edit_json(tiny_copy / "generation_config.json", eos_token_id=[1, 7])
        assert {1, 7, 106} <= gemma_multi.load(tiny_copy, backend="mlx").stop_ids
