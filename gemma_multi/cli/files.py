"""`quantize`, `export`, `push`, `trim`, `info` and `cache`: models at rest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from gemma_multi.cli.common import (
    field_options,
    given,
    output_option,
    print_json,
    source_options,
)
from gemma_multi.exporters import ExportReport, exporters

verify_option = click.option(
    "--verify/--no-verify", default=None,
    help="Compare what a program that reads the format computes; on where that is under 10 s.",
)  # fmt: skip


@click.command()
@click.argument("model")
@output_option("A new directory.")
@click.option("--bits", type=int, default=4, show_default=True, help="Of the linear layers.")
@click.option("--embedding-bits", type=int, default=4, show_default=True, help="4 or 8.")
@click.option(
    "--calibrate",
    metavar="self|none|DATA",
    help="Text to choose codes by: what MODEL "
    "writes itself (the default for 4 bits), none, or rows that it will see.",
)
@click.option(
    "--recover",
    metavar="self|DATA",
    help="Train its scales on top, to say what MODEL says: on rows, or on what MODEL writes.",
)
@click.option("--backend", help="With --recover: keras, mlx or auto.")
@click.option("--learning-rate", type=float, help="With --recover.")
@click.option("--epochs", type=int, help="With --recover.")
@click.option("--texts", type=int, help="With --recover self: how many MODEL writes; 128.")
@source_options
@click.option("--json", "as_json", is_flag=True, help="The error of each tensor as JSON.")
def quantize(model: str, output: str, as_json: bool, **options: Any) -> None:
    """Write MODEL as an int4 directory."""
    from gemma_multi.quantizing import quantize as run
    from gemma_multi.terminal import notes

    chosen = given(options)
    if chosen.get("calibrate") == "none":
        chosen["calibrate"] = None
    report = run(model, output, **chosen)
    if as_json:
        rows = [{"name": t.name, "shape": t.shape, "bits": t.bits, "error": t.error}
                for t in report.tensors]  # fmt: skip
        won = report.recovery and {"before": report.recovery.before, "after": report.recovery.after}
        worth = report.calibration and asdict(report.calibration)
        print_json({"path": output, "bytes": report.nbytes, "tensors": rows,
                    "calibration": worth, "recovery": won})  # fmt: skip
        return
    click.echo(report)
    notes.print(f"{output}: {report.nbytes / 1e6:.1f} MB", markup=False)


@click.command()
@click.argument("model")
@output_option("A new directory.")
@click.option("--corpus", metavar="DATA", help="Rows whose pieces stay.")
@click.option("--keep", type=int, help="Pieces in all.")
@source_options
def trim(model: str, output: str, corpus: str | None, keep: int | None, **options: Any) -> None:
    """Write MODEL with fewer pieces in its vocabulary."""
    from gemma_multi.exporters import save
    from gemma_multi.files import check_output
    from gemma_multi.terminal import notes
    from gemma_multi.trimming import trim as run

    check_output(Path(output), directory=True)
    checkpoint = run(model, corpus, keep=keep, **options)
    save(checkpoint, output)
    size, pieces = checkpoint.nbytes / 1e6, checkpoint.config.vocab_size
    notes.print(f"{output}: {pieces:,} pieces, {size:.1f} MB", markup=False)


@click.command()
@click.argument("model")
@output_option("A new file, or a directory with --format.")
@click.option("--format", help=f"{', '.join(exporters())}; a file's suffix says it as well.")
@field_options({name: one.options for name, one in exporters().items()})
@verify_option
@source_options
@click.option("--json", "as_json", is_flag=True, help="What was written, as JSON.")
def export(model: str, output: str, as_json: bool, **options: Any) -> None:
    """Write MODEL for phones (.tflite, .litertlm), llama.cpp (.gguf), gemma.cpp (.sbs), or as a
    directory (onnx: for browsers; huggingface, mlx, keras, jax: for transformers, mlx-lm, keras-hub
    and google-deepmind/gemma)."""
    from gemma_multi.exporting import export as run
    from gemma_multi.terminal import notes
    from gemma_multi.transforms import QuantizationReport

    report = run(model, output, **given(options))
    if as_json:
        errors = {t.name: t.error for t in report.refitted}
        print_json({"path": output, "bytes": report.nbytes, "format": report.format,
                     "precision": report.precision, "context_length": report.context_length,
                     "target": report.target, "refitted": errors,
                     "verification": _verification(report)})  # fmt: skip
        return
    if report.refitted:
        click.echo(QuantizationReport(report.refitted))
        notes.print(f"{len(report.refitted)} tensors had scales that the format cannot hold and "
                    "were refitted; see the error of each")  # fmt: skip
    target = f", for {report.target.upper()}s" if report.target else ""
    notes.print(
        f"{output}: {report.nbytes / 1e6:.1f} MB, {report.precision}, "
        f"context length {report.context_length:,}{target}",
        markup=False,
    )
    if report.verification:
        notes.print(str(report.verification), markup=False)


@click.command()
@click.argument("source")
@click.argument("output")
@click.option("--format", help=f"{', '.join(exporters())}; a file's suffix says it as well.")
@field_options({name: one.options for name, one in exporters().items()})
@verify_option
@source_options
@click.option("--json", "as_json", is_flag=True, help="What was written and changed, as JSON.")
def convert(source: str, output: str, as_json: bool, **options: Any) -> None:
    """Write SOURCE as OUTPUT, in any format, and say which numbers changed."""
    from gemma_multi.converting import convert as run
    from gemma_multi.terminal import notes
    from gemma_multi.transforms import QuantizationReport

    found = run(source, output, **given(options))
    if as_json:
        print_json({"path": output, "bytes": found.export.nbytes, "format": found.export.format,
                    "before": found.before, "precision": found.export.precision,
                    "compared": found.compared,
                    "changed": {t.name: t.error for t in found.changed},
                    "verification": _verification(found.export)})  # fmt: skip
        return
    if found.changed:
        click.echo(QuantizationReport(found.changed))
    click.echo(str(found))
    notes.print(f"{output}: {found.export.nbytes / 1e6:.1f} MB", markup=False)
    if found.export.verification:
        notes.print(str(found.export.verification), markup=False)


def _verification(report: ExportReport) -> dict[str, Any] | None:
    return asdict(report.verification) if report.verification else None


@click.command()
@click.argument("directory")
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="A repository that is made is private.")
@click.option("--revision", help="A branch; made where there is none.")
@click.option("--progress/--no-progress", default=True, help="Bars on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="The commit as JSON.")
def push(directory: str, repo_id: str, as_json: bool, **options: Any) -> None:
    """Upload an exported DIRECTORY to the Hugging Face hub as REPO_ID, with NOTICE and card."""
    from gemma_multi.pushing import push as run
    from gemma_multi.terminal import notes

    report = run(directory, repo_id, **options)
    if as_json:
        print_json(asdict(report))
        return
    notes.print(f"{directory}: pushed to {report.url}", markup=False)


@click.command()
@click.argument("model", default="storyteller")
@source_options
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def info(model: str, as_json: bool, **options: Any) -> None:
    """Say what MODEL is: config, sizes, grid, hashes. Runs nothing."""
    from rich.console import Console

    from gemma_multi.sources import open_checkpoint
    from gemma_multi.terminal import facts_table

    checkpoint = open_checkpoint(model, **given(options))
    config, origin = checkpoint.config, checkpoint.tensors.origin
    facts = {
        "source": checkpoint.provenance.source,
        "revision": checkpoint.provenance.revision or "-",
        "license": checkpoint.provenance.license,
        "modified": list(checkpoint.provenance.modifications) or ["no"],
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "parameters": config.num_parameters,
        "embedding_parameters": config.num_embedding_parameters,
        "layers": config.num_hidden_layers,
        "global_layers": [i for i in range(config.num_hidden_layers) if not config.is_sliding(i)],
        "hidden_size": config.hidden_size,
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, "
        f"{config.head_dim} wide",
        "sliding_window": config.sliding_window,
        "context_length": config.max_position_embeddings,
        **({f"exported_{name}": value for name, value in origin.facts.items()} if origin else {}),
        "embedding_scale": config.embedding_scale,
        "residual_scale": config.residual_scale,
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


@click.command()
@click.option("--clear", is_flag=True, help="Remove everything, or what --kind names.")
@click.option("--kind", help="exports, tokenizers, jax, libraries, test-data or benchmarks.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def cache(clear: bool, kind: str | None, as_json: bool) -> None:
    """Show or empty what is kept to be quicker next time. Nothing there is ever needed."""
    from gemma_multi import cache as kept
    from gemma_multi.errors import OptionError
    from gemma_multi.terminal import facts_table, notes

    files = kept.cached_files()
    kinds = kept.KINDS
    if kind is not None and kind not in kinds:
        raise OptionError(f"kind is {kind!r}, expected one of {', '.join(kinds)}")
    if clear:
        freed = kept.clear(kind)
        if as_json:
            print_json({"path": str(kept.cache_directory()), "freed_bytes": freed})
        else:
            notes.print(f"{kept.cache_directory()}: freed {freed / 1e6:,.1f} MB", markup=False)
        return
    sizes = {name: sum(file.nbytes for file in files if file.kind == name)
             for name in kinds if kind in (None, name)}  # fmt: skip
    facts = {"path": str(kept.cache_directory()),
             **{f"{name}_bytes": size for name, size in sizes.items()},
             "limit_of_exports_bytes": kept.limit()}  # fmt: skip
    if as_json:
        print_json(facts)
        return
    from rich.console import Console

    Console(highlight=False).print(facts_table(facts))
