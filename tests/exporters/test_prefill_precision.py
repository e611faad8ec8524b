"""Files whose prompts are read with int8 rows beside the int4 layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nats import divergence
from reading import assert_same_but_for_ties
from tiny import tiny_checkpoint, tokenizer

import gemma_multi
from gemma_multi import Model, OptionError
from gemma_multi.config import EMBEDDING
from gemma_multi.engines import ALL
from gemma_multi.engines.wants import NOTHING
from gemma_multi.litert_lm import in_litert_lm
from gemma_multi.quantization.tensor import QuantizedTensor
from gemma_multi.sources import open_checkpoint

PROMPT = "Tell me a bedtime story.\nHero: Pip the hedgehog\nSetting: an old lighthouse by the sea"
_TIE = 0.5  # logits


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return exported(tmp_path_factory.mktemp("plain") / "x.tflite", "same")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return exported(tmp_path_factory.mktemp("quick") / "x.tflite", "int8")


def exported(path: Path, prefill_precision: str) -> Model:
    given = {"context_length": 512, "prefill_precision": prefill_precision, "progress": False}
    return gemma_multi.load(gemma_multi.export("storyteller", path, **given).path, threads=1)


def test_the_file_grows_by_the_layers_alone_and_opens_as_the_same_weights(
    plain: Model, quick: Model
) -> None:
    sizes = [Path(model.checkpoint.path).stat().st_size for model in (plain, quick)]
    shapes = plain.checkpoint.config.tensor_shapes()
    layers = sum(int(np.prod(s)) for n, s in shapes.items() if len(s) == 2 and n != EMBEDDING)
    assert layers < sizes[1] - sizes[0] < 1.1 * layers
    stored = open_checkpoint("storyteller")
    for name, tensor in quick.checkpoint.tensors.items():
        if isinstance(tensor, QuantizedTensor):
            np.testing.assert_array_equal(tensor.dequantize(), stored.tensors[name].dequantize())
    assert "int8 rows" in quick.checkpoint.provenance.notice()
    assert "int8 rows" not in plain.checkpoint.provenance.notice()


def test_a_prompt_is_read_nearly_so_and_a_text_scored_exactly_so(
    plain: Model, quick: Model
) -> None:
    """Over more than the window, by each size of prefill; scoring takes the int4 layers."""
    ids = plain.tokenizer.encode(PROMPT * 12)[:230]
    for count in (16, 70, 200):
        told = []
        for model in (plain, quick):
            session = model.engine.session()
            session.read(ids[:count], NOTHING)
            told.append(session.read(ids[count:], ALL))
        assert 0 < divergence(*told) < 5e-3, count
    scored = [model.engine.session().read(ids[:40], ALL) for model in (plain, quick)]
    np.testing.assert_array_equal(*scored)


def test_its_stories_are_the_same_but_for_near_ties(quick: Model, tmp_path: Path) -> None:
    """Here, from a directory, and in LiteRT-LM."""
    reference = gemma_multi.load("storyteller", backend="keras", precision="float32")
    turns = [{"role": "user", "content": PROMPT}]
    directory = gemma_multi.load("storyteller", backend="litert", prefill_precision="int8")
    assert directory.engine.file.info.prefill_precision == "int8"
    bundle = tmp_path / "x.litertlm"
    gemma_multi.export("storyteller", bundle, context_length=512, prefill_precision="int8")
    told = [model.chat().send(PROMPT, temperature=0, max_tokens=60).text
            for model in (quick, directory)]  # fmt: skip
    with in_litert_lm(bundle, max_tokens=60) as ask:
        told.append(ask(PROMPT))
    for text in told:
        assert len(text) > 100
        assert_same_but_for_ties(reference, reference.encode(turns), text, _TIE, stopped=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"prefill_precision": "int4"}, "prefill_precision is 'int4', expected same or int8"),
     ({"prefill_precision": "int8", "precision": "float32"}, "for int4 layers.*float32"),
     ({"prefill_precision": "int8", "target": "gpu"}, "for int4 layers.*int8; leave it out")],
)  # fmt: skip
def test_what_cannot_be_is_refused(options: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=words):
        gemma_multi.export("storyteller", tmp_path / "x.tflite", **options)
    assert not list(tmp_path.iterdir())


def test_a_file_without_them_is_not_run_as_if_it_had_them(plain: Model) -> None:
    with pytest.raises(OptionError, match="was exported without; export it again"):
        gemma_multi.load(plain.checkpoint.path, prefill_precision="int8")
    with pytest.raises(OptionError, match="prefill_precision is 'half', expected same or int8"):
        gemma_multi.load(plain.checkpoint.path, prefill_precision="half")


def test_a_float32_checkpoint_is_refused_by_the_engine() -> None:
    with pytest.raises(OptionError, match="for int4 layers"):
        gemma_multi.load(
            tiny_checkpoint(vocab_size=tokenizer().vocab_size), backend="litert",
            prefill_precision="int8",
        )  # fmt: skip
