"""`quantize`, `export` and `info`: models at rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_multi.cli.common import print_json, source_options

if TYPE_CHECKING:
    from gemma_multi.checkpoint import Checkpoint


@click.command()
@click.argument("model")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--bits", type=int, default=4, show_default=True, help="Of the linear layers.")
@click.option("--embedding-bits", type=int, default=4, show_default=True, help="4 or 8.")
@click.option("--recover", type=click.Path(path_type=Path), metavar="DATA",
              help="Train the int4 model to say on these rows what MODEL says.")  # fmt: skip
@click.option("--backend", help="With --recover: keras, mlx or auto.")
@click.option("--learning-rate", type=float, help="With --recover.")
@click.option("--epochs", type=int, help="With --recover.")
@source_options
@click.option("--json", "as_json", is_flag=True, help="The error of each tensor as JSON.")
def quantize(
    model: str,
    target: Path,
    bits: int,
    embedding_bits: int,
    recover: Path | None,
    revision: str | None,
    local_files_only: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write MODEL as an int4 directory TARGET."""
    from gemma_multi.checkpoint.resolve import resolve
    from gemma_multi.quantization import quantize as run
    from gemma_multi.terminal import notes, progress_bar

    checkpoint = resolve(model, revision=revision, local_files_only=local_files_only)
    given = {name: value for name, value in options.items() if value is not None}
    if recover is None:
        with progress_bar("quantising") as progress:
            report = run(checkpoint, target, bits, embedding_bits, progress, **given)
    else:  # shows its own progress
        report = run(checkpoint, target, bits, embedding_bits, recover=recover, **given)
    if as_json:
        rows = [{"name": t.name, "shape": t.shape, "bits": t.bits, "error": t.error}
                for t in report.tensors]  # fmt: skip
        won = report.recovery and {"before": report.recovery.before, "after": report.recovery.after}
        print_json({"path": str(target), "bytes": report.nbytes, "tensors": rows,
                    "recovery": won})  # fmt: skip
        return
    click.echo(report)
    sizes = f"{report.nbytes / 1e6:.1f} MB, was {checkpoint.nbytes / 1e6:.1f} MB"
    notes.print(f"{target}: {sizes}", markup=False)


@click.command()
@click.argument("model")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--context-length", type=int, help="Positions it can hold; all the model has.")
@click.option("--prefill", type=int, multiple=True, metavar="N",
              help="Tokens read at a time; may be repeated.  [default: 16, 128]")  # fmt: skip
@click.option("--precision", default="auto", show_default=True, help="int4, int8, float32 or auto.")
@click.option("--cache", default="auto", show_default=True,
              help="Type of the global layers' caches: float32, int8 or auto.")  # fmt: skip
@source_options
@click.option("--json", "as_json", is_flag=True, help="What was written, as JSON.")
def export(
    model: str,
    target: Path,
    prefill: tuple[int, ...],
    revision: str | None,
    local_files_only: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write MODEL as TARGET, a .tflite or .litertlm file for phones."""
    from gemma_multi.checkpoint.resolve import resolve
    from gemma_multi.exporters import check_format
    from gemma_multi.exporters import export as write
    from gemma_multi.quantization import QuantizationReport
    from gemma_multi.terminal import notes

    check_format(target)
    checkpoint = resolve(model, revision=revision, local_files_only=local_files_only)
    with notes.status(f"writing {target.name}"):
        report = write(checkpoint, target, prefill=prefill or None, **options)
    if as_json:
        errors = {t.name: t.error for t in report.refitted}
        print_json({"path": str(target), "bytes": report.nbytes, "format": report.format,
                     "precision": report.precision, "context_length": report.context_length,
                     "refitted": errors})  # fmt: skip
        return
    if report.refitted:
        click.echo(QuantizationReport(report.refitted))
        notes.print(f"{len(report.refitted)} tensors had scales LiteRT cannot hold and were "
                    "refitted; see the error of each")  # fmt: skip
    notes.print(
        f"{target}: {report.nbytes / 1e6:.1f} MB, {report.precision}, "
        f"context length {report.context_length:,}",
        markup=False,
    )


@click.command()
@click.argument("model", default="storyteller")
@source_options
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def info(model: str, revision: str | None, local_files_only: bool, as_json: bool) -> None:
    """Say what MODEL is: config, sizes, grid, hashes. Runs nothing."""
    from rich.console import Console

    from gemma_multi.checkpoint.resolve import resolve
    from gemma_multi.terminal import facts_table

    checkpoint = resolve(model, revision=revision, local_files_only=local_files_only)
    config = checkpoint.config
    facts = {
        "source": checkpoint.provenance.source,
        "revision": checkpoint.provenance.revision or "-",
        "license": checkpoint.provenance.license,
        "modified": list(checkpoint.provenance.modifications) or ["no"],
        "path": str(checkpoint.path),
        "parameters": config.num_parameters,
        "embedding_parameters": config.num_embedding_parameters,
        "layers": config.num_hidden_layers,
        "global_layers": [i for i in range(config.num_hidden_layers) if not config.is_sliding(i)],
        "hidden_size": config.hidden_size,
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, "
        f"{config.head_dim} wide",
        "sliding_window": config.sliding_window,
        "context_length": config.max_position_embeddings,
        **_exported_facts(checkpoint),
        "embedding_scale": config.embedding_scale,
        "vocabulary": checkpoint.tokenizer.vocab_size,
        "stored_as": checkpoint.precision,
        "grid": checkpoint.grid,
        "weight_bytes": checkpoint.nbytes,
        "weights_sha256": checkpoint.digest(),
    }
    if as_json:
        print_json(facts)
    else:
        Console(highlight=False).print(facts_table(facts))


def _exported_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What an exporter fixed in the file that was opened, if it is one."""
    from gemma_multi.checkpoint.litert_file import LitertTensors

    if not isinstance(checkpoint.tensors, LitertTensors):
        return {}
    info = checkpoint.tensors.file.info
    return {
        "exported_context": info.context_length,
        "exported_prefill": list(info.prefill),
        "exported_cache": info.cache,
    }
