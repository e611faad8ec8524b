"""`export`: a model to what phones and peers load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_multi.exporters import ExportReport, choose_format, export_checkpoint
from gemma_multi.files import check_output
from gemma_multi.model import Model
from gemma_multi.progress import Progress, reporting
from gemma_multi.sources import Source, open_checkpoint
from gemma_multi.verifying import check_verifiable
from gemma_multi.verifying import verify as verified


def export(
    model: Source,
    output: str | Path,
    *,
    format: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    verify: bool | None = None,
    progress: Progress = True,
    **options: Any,
) -> ExportReport:
    """Writes a model in another format.

    model, revision, local_files_only: what to export; see `open_checkpoint`.
    output: a new file or directory. `.gguf`, `.sbs`, `.tflite` and `.litertlm` say what they are.
    format: for a directory `"huggingface"` (dense), `"mlx"` (dense or quantised), `"keras"` (a
        preset for keras-hub, dense), `"jax"` (for google-deepmind/gemma, dense) or `"onnx"` (for
        Transformers.js and onnxruntime).
    verify: whether a program that reads the format, where one is installed, computes a short text
        from what was written, to compare; None where that takes less than ten seconds. The report's
        `verification` says with what and how near.
    progress: True for a bar on a terminal, False for none, or a function of (done, total).
    options: the format's own. All take `precision`; `.tflite`, `.litertlm` and `onnx` also
        `context_length` (positions the file can hold; all the model has), the first two `prefill`
        (how many tokens are read at a time, one graph each), `cache` (type of the global layers'
        caches: `"float32"`, `"int8"` or `"auto"`), `target` (`"cpu"` or `"gpu"`),
        `prefill_precision` (`"same"`, or `"int8"` to read prompts with) and `decode_batch` (2, 4 or
        8 conversations whose next tokens one call reads), `onnx` `activations` (what
        is multiplied: `"float32"`, `"float16"`, `"int8"` or `"auto"`, which of int4 is int8),
        `.sbs` `wrapping` (`"it"`, or `"pt"` for a base model).

    Raises OptionError, CheckpointError or BackendError; then nothing is left behind. Raises
    VerificationError where what was written is read differently; then it is left to be looked at.
    """
    # before anything is downloaded
    chosen = choose_format(output, format)
    check_output(Path(output), directory=chosen.is_directory)
    check_verifiable(chosen.name, verify)
    checkpoint = open_checkpoint(
        model, revision=revision, local_files_only=local_files_only, progress=progress is True
    )
    if isinstance(model, Model):
        report = model.export(output, format=format, progress=progress, **options)
    else:
        with reporting(progress, "exporting") as bar:
            report = export_checkpoint(checkpoint, output, format=format, progress=bar, **options)
    return replace(report, verification=verified(report, checkpoint, verify))
