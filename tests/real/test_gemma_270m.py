"""What only the real Gemma 3 270M can show: `make real`. Its weights come from a package."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from graph_in_numpy import Graph
from in_keras_hub import read_by_keras_hub
from in_onnxruntime import exported
from nats import divergence
from other_peoples_files import brown_documents, gemma_270m, gemma_tokenizer
from real_rows import film_reviews
from software_gpu import logits_on_gpu
from varied_text import samples

import gemma_multi
from gemma_multi.calibration.measure import Said, measure
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.decoder import Decoder, Weights
from gemma_multi.engines import ALL
from gemma_multi.exporters import save
from gemma_multi.formats.gguf.layout import stored_name
from gemma_multi.litert_lm import in_litert_lm
from gemma_multi.training.calibrated import calibrated
from gemma_multi.transforms import original, quantize_checkpoint, rescaled

pytestmark = pytest.mark.real
BACKENDS = ("keras", "litert", "mlx")


@pytest.fixture(scope="module")
def path() -> Path:
    return gemma_270m()


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Checkpoint:
    return gemma_multi.open_checkpoint(path)


@pytest.fixture(scope="module")
def text(checkpoint: Checkpoint) -> np.ndarray:
    """More tokens than the window."""
    ids = checkpoint.tokenizer.encode(brown_documents()[0])
    return np.array([checkpoint.tokenizer.bos_id, *ids[:699]])


def test_every_tensor_is_what_gguf_says(path: Path, checkpoint: Checkpoint) -> None:
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {t.tensor_type.name for t in stored.values()} == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    for name, info in checkpoint.tensors.infos.items():
        theirs = stored[stored_name(name)]
        dense = gguf.quants.dequantize(theirs.data, theirs.tensor_type).reshape(info.shape)
        ours = checkpoint.weight(name).astype(np.float32)
        np.testing.assert_array_equal(ours + (len(info.shape) == 1), dense)


def test_a_gguf_as_google_publishes_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Q4_0 with an embedding in Q8_0, in Google's 241 MB, and the same when it is opened."""
    int4 = quantize_checkpoint(checkpoint, 4, embedding_bits=8)[0]
    report = gemma_multi.export(int4, tmp_path / "m.gguf", progress=False)
    assert 240e6 < report.nbytes < 242e6
    opened = gemma_multi.open_checkpoint(tmp_path / "m.gguf")
    assert (opened.config, opened.digest()) == (int4.config, int4.digest())
    for text in samples(300):
        assert opened.tokenizer.encode(text) == checkpoint.tokenizer.encode(text), repr(text)


def test_its_tokenizer_gives_hugging_faces_ids(checkpoint: Checkpoint) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(gemma_tokenizer() / "tokenizer.json"))
    special = theirs.get_added_tokens_decoder().values()
    spelled = [token.content for token in special if token.special]
    for text in samples(2400):
        if not any(piece in text for piece in spelled):  # which no text may become here
            expected = theirs.encode(text, add_special_tokens=False).ids
            assert checkpoint.tokenizer.encode(text) == expected, repr(text)


@pytest.fixture(scope="module")
def expected(
    checkpoint: Checkpoint, text: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> np.ndarray:
    """transformers' logits, float32, of a directory that holds the same weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("real") / "dense"
    save(original(checkpoint), directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # of the bfloat16 original, whose scale transformers rounds where weights are bfloat16
    model.model.embed_tokens.embed_scale = torch.tensor(checkpoint.config.embedding_scale)
    with torch.no_grad():
        return model(torch.tensor(text[None])).logits[0].numpy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_logits_are_transformers(
    checkpoint: Checkpoint, text: np.ndarray, expected: np.ndarray, backend: str
) -> None:
    count = 64 if backend == "mlx" else len(text)  # MLX on Linux is for checking, not for speed
    model = gemma_multi.load(checkpoint, backend=backend, precision="float32", context_length=1024)
    ours = model.engine.session().read(text[:count], ALL)
    np.testing.assert_allclose(ours, expected[:count], rtol=0, atol=2e-3)


def test_transformers_reads_the_tokenizer_that_is_made(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A GGUF file has none beside it."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(save(original(checkpoint), tmp_path / "x"))
    for sample in samples(300):
        ids = theirs.encode(sample, add_special_tokens=False)
        assert ids == checkpoint.tokenizer.encode(sample)


def test_keras_hub_reads_the_preset_and_agrees(checkpoint: Checkpoint, tmp_path: Path) -> None:
    report = gemma_multi.export(checkpoint, tmp_path / "x", format="keras", progress=False)
    said = "The capital of France is Paris, and the kettle is on."
    ids, logits = read_by_keras_hub(report.path, said, tmp_path / "found")
    assert ids == [checkpoint.tokenizer.bos_id, *checkpoint.tokenizer.encode(said)]
    opened = gemma_multi.open_checkpoint(report.path)
    # in float32 keras-hub does not round the embedding scale
    config = opened.config.replace(embedding_scale=opened.config.hidden_size**0.5)
    model = gemma_multi.load(opened.replace(config=config), backend="mlx", precision="float32")
    np.testing.assert_allclose(logits, model.engine.session().read(ids, ALL), rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_residual_scale_changes_no_bit(
    checkpoint: Checkpoint, text: np.ndarray, backend: str
) -> None:
    scaled = rescaled(checkpoint)
    assert scaled.config.residual_scale == 2.0**-4  # of a stream that reaches 104,000
    plain, other = (
        gemma_multi.load(one, backend=backend, precision="float32", context_length=128)
        .engine.session().read(text[:64], ALL)
        for one in (checkpoint, scaled)
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(other), np.asarray(plain))


@pytest.mark.parametrize("backend", ["keras", "mlx"])
def test_float16_is_nearly_float32(
    checkpoint: Checkpoint, text: np.ndarray, expected: np.ndarray, backend: str
) -> None:
    """At that scale; at its own size the first token alone overflows."""
    model = gemma_multi.load(checkpoint, backend=backend, precision="float16", context_length=128)
    assert model.engine.config.residual_scale == 2.0**-4
    ours = model.engine.session().read(text[:64], ALL)
    assert divergence(expected[:64], ours) < 2e-4


@pytest.mark.parametrize("backend", ["keras", "litert"])
def test_it_writes_sense(checkpoint: Checkpoint, backend: str) -> None:
    model = gemma_multi.load(checkpoint, backend=backend, context_length=1024)
    told = model.generate("The capital of France is", raw=True, temperature=0, max_tokens=8).text
    assert "capital" in told


@pytest.fixture(scope="module")
def int4(checkpoint: Checkpoint) -> Checkpoint:
    """What `quantize` makes of nothing but the model, and specialists begin with: kept."""
    return calibrated(original(checkpoint), progress=False)


@pytest.fixture(scope="module")
def directory(int4: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real") / "int4"
    save(int4, output)
    return output


def test_calibration_halves_what_rounding_loses(
    checkpoint: Checkpoint, int4: Checkpoint, text: np.ndarray
) -> None:
    """On text that it was not fitted to."""
    texts = [text[:512]]
    with ThreadPoolExecutor(2) as pool:
        reference, *others = (
            Said.by(Decoder(one.config, Weights(one)), texts, pool)
            for one in (checkpoint, quantize_checkpoint(checkpoint)[0], int4)
        )
        _, (plain, fitted) = measure(reference, others, texts, pool)
    assert fitted.divergence < 0.5 * plain.divergence
    assert fitted.perplexity < plain.perplexity
    assert int4.config.residual_scale == 2.0**-4


def test_int8_activations_cost_little(directory: Path, text: np.ndarray) -> None:
    """LiteRT, which rounds them, against Keras, which does not, on the same int4 weights."""
    logits = [
        gemma_multi.load(directory, backend=backend, context_length=1024)
        .engine.session().read(text, ALL)
        for backend in ("keras", "litert")
    ]  # fmt: skip
    assert divergence(*logits) < 0.01
    assert np.mean(logits[0].argmax(-1) == logits[1].argmax(-1)) > 0.94


def test_litert_lm_says_what_we_say(directory: Path, tmp_path: Path) -> None:
    """Google's own runtime for phones, on the exported file: it asks in turns, which the base model
    has not learnt, and answers as our engine does over the same file."""
    exported = gemma_multi.export(directory, tmp_path / "model.litertlm", context_length=128)
    model = gemma_multi.load(exported.path, backend="litert")
    ours = model.generate("The capital of France is", temperature=0, max_tokens=8).text
    with in_litert_lm(Path(exported.path), max_tokens=8) as ask:
        theirs = ask("The capital of France is")
    assert theirs.split()[:3] == ours.split()[:3]  # later ones may part at a tie


@pytest.fixture(scope="module")
def for_gpus(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("real") / "gpu.tflite"
    gemma_multi.export(checkpoint, file, target="gpu", precision="int8", context_length=128)
    return file


def test_a_file_for_gpus_computes_what_float16_holds(for_gpus: Path, text: np.ndarray) -> None:
    """Each operator's result rounded to it."""
    rounded = Graph(for_gpus, float16=True)
    found = divergence(Graph(for_gpus).read(text[:64]), rounded.read(text[:64]))
    assert found < 1e-3
    assert rounded.largest < 65_504


def test_googles_delegate_computes_it_on_a_gpu(
    for_gpus: Path, text: np.ndarray, software_gpu: dict[str, str], tmp_path: Path
) -> None:
    theirs = logits_on_gpu(software_gpu, for_gpus, text[:32], tmp_path)
    np.testing.assert_allclose(theirs, Graph(for_gpus).read(text[:32]), rtol=0, atol=2e-3)


def test_a_trimmed_vocabulary_ships_in_75_mb(directory: Path, tmp_path: Path) -> None:
    whole = gemma_multi.open_checkpoint(directory)
    documents = brown_documents()[:20]
    small = gemma_multi.trim(whole, documents, keep=32_768, progress=False)
    assert gemma_multi.export(small, tmp_path / "small.litertlm", progress=False).nbytes < 75e6
    old_ids = [whole.tokenizer.id(small.tokenizer.piece(i)) for i in range(32_768)]
    text = documents[3][:600]
    logits = [
        gemma_multi.load(c, backend="keras", precision="float32")
        .new_session().read(c.tokenizer.encode(text), ALL)
        for c in (whole, small)
    ]  # fmt: skip
    np.testing.assert_allclose(logits[1], logits[0][:, old_ids], rtol=0, atol=1e-3)


def test_film_reviews_are_classified_and_answers_fit(directory: Path) -> None:
    """By a base model that was never trained on either."""
    model = gemma_multi.load(directory, backend="litert", context_length=1024)
    rows = [(r["prompt"].split("\n", 1)[1], r["completion"]) for r in film_reviews()[:108]]
    found = model.classify(
        [text for text, _ in rows[8:]], ["positive", "negative"],
        "Is the film review positive or negative?", rows[:8], raw=True, progress=False,
    )  # fmt: skip
    right = sum(one.label == label for one, (_, label) in zip(found, rows[8:], strict=True))
    assert right >= 65  # of a hundred
    kind = {"type": "object", "properties": {"about": {"type": "string", "maxLength": 60},
            "kind": {"enum": ["praise", "blame"]}}, "required": ["about", "kind"]}  # fmt: skip
    for text, _ in rows[:5]:
        made = model.extract(text, kind, raw=True)
        assert set(made) == {"about", "kind"}


def test_onnx_in_200_mb_and_in_float16_without_overflow(
    checkpoint: Checkpoint, text: np.ndarray, tmp_path: Path
) -> None:
    """float16 with the weights as they came, and int4 with each kind of activations."""
    int4, ids = quantize_checkpoint(checkpoint)[0], text[:150]
    for source, options, most in (
        (checkpoint, {"precision": "float16"}, 1e-4),
        (int4, {"activations": "float16"}, 1e-4),
        (int4, {"activations": "float32"}, 1e-6),
        (int4, {}, 5e-3),
    ):
        model = exported(source, tmp_path / f"{len(list(tmp_path.iterdir()))}", **options)
        engine = gemma_multi.load(source, backend="keras", precision="float32", context_length=256)
        expected = engine.engine.session().read(ids, ALL)
        assert divergence(expected, model.read(ids)[0][0]) < most  # all of it is finite
        assert source is checkpoint or model.file.stat().st_size < 200e6
