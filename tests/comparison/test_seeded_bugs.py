"""A parity run must be able to fail: real bugs, one at a time, in an engine that was whole.

LiteRT is the reference; Keras is broken. Each test says which level must notice, what it must
name, and which levels must stay quiet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from comparison.conftest import Start

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.comparison.prompts import Prompt
from gemma_multi.comparison.run import Comparison, compare
from gemma_multi.comparison.subjects import Subject
from gemma_multi.engines import LAST, Wanted
from gemma_multi.engines.keras import KerasEngine, KerasSession
from gemma_multi.quantization.tensor import QuantizedTensor
from gemma_multi.sources import BUNDLED, open_checkpoint

WINDOW = 64


def run(subjects: list[Subject], prompts: list[Prompt], trace: bool = True) -> Comparison:
    (found,) = compare(subjects, prompts, max_tokens=24, trace=trace)
    return found


def failed(found: Comparison) -> set[str]:
    return {level for level, result in found.levels.items() if not result.passed}


def two_checkpoints(start: Start, whole: Checkpoint, broken: Checkpoint) -> list[Subject]:
    """LiteRT with one checkpoint, Keras with the other."""
    return [*start(["litert"], checkpoint=whole), *start(["keras"], checkpoint=broken)]


def attentions(engine: KerasEngine) -> list[Any]:
    return [layer.attention for layer in engine.backbone.transformer_layers]


def unrounded_embedding_scale(engine: KerasEngine, patch: pytest.MonkeyPatch) -> None:
    engine.config = engine.config.replace(embedding_scale=engine.config.hidden_size**0.5)


def window_off_by_one(engine: KerasEngine, patch: pytest.MonkeyPatch) -> None:
    engine.config = engine.config.replace(sliding_window=engine.config.sliding_window + 1)


def rope_bases_swapped(engine: KerasEngine, patch: pytest.MonkeyPatch) -> None:
    bases = {10_000.0: 1_000_000.0, 1_000_000.0: 10_000.0}
    for attention in attentions(engine):
        attention.rope_layer.max_wavelength = bases[attention.rope_layer.max_wavelength]


def norm_without_one(engine: KerasEngine, patch: pytest.MonkeyPatch) -> None:
    norm = type(engine.backbone.layer_norm)
    whole = norm.call

    def call(self: Any, x: Any) -> Any:
        return whole(self, x) * (self.scale / (1 + self.scale))

    patch.setattr(norm, "call", call)


def query_scale_missing(engine: KerasEngine, patch: pytest.MonkeyPatch) -> None:
    for attention in attentions(engine):
        attention.head_dim = 1.0


@pytest.mark.parametrize(
    ("bug", "layer", "position", "part"),
    [
        (unrounded_embedding_scale, "embedding", 0, "embedding or its scale"),
        (window_off_by_one, "layer 0 (sliding)", WINDOW, f"sliding window, which is {WINDOW}"),
        (rope_bases_swapped, "layer 0 (sliding)", 1, "attention"),
        (norm_without_one, "layer 0 (sliding)", 0, "norms"),
        (query_scale_missing, "layer 0 (sliding)", 1, "attention"),
    ],
)
def test_a_bug_in_the_sums_is_found_and_its_layer_named(
    bug: Callable[[KerasEngine, pytest.MonkeyPatch], None], layer: str, position: int, part: str,
    start: Start, some_prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    subjects = start(["litert", "keras"])
    engine = subjects[1].model.engine
    assert isinstance(engine, KerasEngine)
    bug(engine, monkeypatch)
    engine.compile()
    found = run(subjects, some_prompts)
    assert {"logits", "layers"} <= failed(found)
    assert not failed(found) & {"weights", "tokens"}
    assert found.layers is not None
    assert found.layers.first is not None
    assert found.layers.names[found.layers.first] == layer
    assert found.layers.position == position
    assert part in found.layers.hint
    regions = found.logits.by_region()
    if bug is window_off_by_one:  # and nothing before the window
        assert regions["short"].largest < 1e-3 < regions["past the window"].largest  # type: ignore[union-attr]


def test_a_doubled_bos_is_found_in_the_tokens_alone(
    start: Start, some_prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = start(["litert", "keras"])
    model = subjects[1].model
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda *a, **k: [2, *encode(*a, **k)])
    found = run(subjects, some_prompts, trace=False)
    assert failed(found) == {"tokens"}
    assert len(found.tokens.different) == len(some_prompts)
    assert "position 1 is '<start_of_turn>' (105), not '<bos>' (2)" in found.tokens.summary


def test_a_space_that_the_tokenizer_adds_is_found_in_the_tokens_alone(
    start: Start, some_prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (open_checkpoint(BUNDLED["storyteller"]) for _ in range(2))
    encode = broken.tokenizer.encode
    monkeypatch.setattr(broken.tokenizer, "encode", lambda text: encode(" " + text))
    found = run(two_checkpoints(start, whole, broken), some_prompts, trace=False)
    assert failed(found) == {"tokens"}
    assert "\u2581" in found.tokens.different[0].what


def derail_steps(patch: pytest.MonkeyPatch) -> None:
    """Keras gives the wrong logits when it reads one token to go on, and no other time."""
    forward = KerasSession._forward

    def derailed(self: KerasSession, ids: np.ndarray, want: Wanted) -> Any:
        result = forward(self, ids, want)
        if len(ids) > 1 or want is not LAST:
            return result
        return np.roll(self.engine.numpy(result), 1)

    patch.setattr(KerasSession, "_forward", derailed)


def with_tensor(checkpoint: Checkpoint, name: str, **changes: Any) -> Checkpoint:
    tensor = checkpoint.tensors[name]
    assert isinstance(tensor, QuantizedTensor)
    parts = {f: getattr(tensor, f) for f in ("packed", "scales", "biases", "bits", "group_size")}
    changed = QuantizedTensor(**{**parts, **changes})
    return checkpoint.with_tensors({name: changed})


def test_one_flipped_code_is_found_in_the_weights(start: Start, some_prompts: list[Prompt]) -> None:
    name = "model.layers.4.mlp.up_proj.weight"
    whole = open_checkpoint(BUNDLED["storyteller"])
    packed = np.array(whole.tensors[name].packed)
    packed[17, 3] ^= 1 << 8  # the lowest bit of one code
    found = run(
        two_checkpoints(start, whole, with_tensor(whole, name, packed=packed)), some_prompts
    )
    assert "weights" in failed(found)
    assert [tensor.name for tensor in found.weights.different] == [name]
    assert found.weights.sha256[0] != found.weights.sha256[1]


def test_scales_rounded_to_float16_in_one_layer_are_found_in_the_weights(
    start: Start, some_prompts: list[Prompt]
) -> None:
    """A checkpoint of somebody else's, with float32 scales that float16 does not hold."""
    name = "model.layers.2.self_attn.q_proj.weight"
    whole = open_checkpoint(BUNDLED["storyteller"])
    scales = whole.tensors[name].scales.astype(np.float32) * np.float32(1.0003)
    rounded = scales.astype(np.float16).astype(np.float32)
    exact = with_tensor(whole, name, scales=scales, biases=-8 * scales)
    broken = with_tensor(whole, name, scales=rounded, biases=-8 * rounded)
    found = run(two_checkpoints(start, exact, broken), some_prompts, trace=False)
    assert "weights" in failed(found)
    assert [tensor.name for tensor in found.weights.different] == [name]


@pytest.mark.parametrize("names", [["litert", "keras"], ["keras", "litert"]])
@pytest.mark.parametrize("many", [True, False])
def test_a_bug_in_stepping_alone_is_found_in_the_text(
    names: list[str], many: bool, start: Start, some_prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On either side, over many prompts, where sides take turns, and over one."""
    prompts = [replace(p, name=f"{p.name}-{i}") for i in range(3) for p in some_prompts[:5]]
    subjects = start(names)
    derail_steps(monkeypatch)
    found = run(subjects, prompts if many else some_prompts[:1], trace=False)
    assert failed(found) == {"text"}
    assert found.text.bugs[0].gap > 0.1


def test_a_third_side_that_derails_does_not_speak_for_the_others(
    start: Start, some_prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = start(["litert", "mlx", "keras"])
    derail_steps(monkeypatch)
    mlx, keras = compare(subjects, some_prompts[:2], max_tokens=24)
    assert failed(keras) == {"text"}
    assert failed(mlx) == set()
    assert mlx.text.texts["greedy"] == 4  # two prompts, written by LiteRT and by MLX


def test_without_a_bug_nothing_is_found(start: Start, some_prompts: list[Prompt]) -> None:
    for found in compare(
        start(["litert", "keras", "mlx"]), some_prompts, max_tokens=24, trace=True
    ):
        assert not failed(found)
        assert not found.text.divergences
        assert found.weights.sha256[0] == found.weights.sha256[1]


def test_int8_activations_pass_by_their_own_tolerance(
    start: Start, some_prompts: list[Prompt]
) -> None:
    found = run(start(["keras", "litert"], "auto"), some_prompts)
    assert not failed(found)
    summary = found.logits.summary_where()
    assert summary is not None
    assert summary.largest > 0.01  # they do differ
