"""An ONNX directory, as onnxruntime runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

import gemma_multi
from gemma_multi.checkpoint import Checkpoint


class Exported:
    """A directory in onnxruntime, with float32 or float16 caches as it wants them."""

    def __init__(self, directory: Path) -> None:
        (self.file,) = (directory / "onnx").glob("*.onnx")  # weights may lie beside it
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        self.session = onnxruntime.InferenceSession(str(self.file), options)
        self.caches = [i for i in self.session.get_inputs() if i.name.startswith("past_")]
        self.outputs = [output.name for output in self.session.get_outputs()]

    def read(
        self, ids: np.ndarray, past: dict | None = None, mask: np.ndarray | None = None,
        keep: int = 0,
    ) -> tuple[np.ndarray, dict]:  # fmt: skip
        """(logits `f32[B, T, V]`, what to give as `past` next)."""
        ids = np.atleast_2d(ids).astype(np.int64)
        if past is None:
            past = {
                cache.name: np.zeros(
                    (len(ids), cache.shape[1], 0, cache.shape[3]),
                    np.float16 if cache.type == "tensor(float16)" else np.float32,
                )
                for cache in self.caches
            }
        before = past["past_key_values.0.key"].shape[2]
        if mask is None:
            mask = np.ones((len(ids), before + ids.shape[1]), np.int64)
        found = self.session.run(
            None,
            {
                "input_ids": ids,
                "attention_mask": mask,
                "num_logits_to_keep": np.array(keep),
                **past,
            },
        )
        outputs = dict(zip(self.outputs, found, strict=True))
        logits = outputs.pop("logits")
        assert all(np.isfinite(value).all() for value in (logits, *outputs.values()))
        return logits, {n.replace("present", "past_key_values"): v for n, v in outputs.items()}


def exported(source: str | Checkpoint, directory: Path, **options: object) -> Exported:
    gemma_multi.export(source, directory, format="onnx", progress=False, **options)
    return Exported(directory)
