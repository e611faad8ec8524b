"""The command line: `gemma-multi generate | chat | quantize | export | info | doctor | demo`.

Errors are one line on standard error and exit status 2. Standard output carries only what was
asked for; `--json` makes it one JSON object.
"""

from __future__ import annotations

import io
import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_multi import __version__
from gemma_multi.errors import GemmaError, OptionError

if TYPE_CHECKING:
    from gemma_multi.checkpoint import Checkpoint

Command = Callable[..., Any]


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    _prepare_streams()
    try:
        code = cli.main(arguments, prog_name="gemma-multi", standalone_mode=False)
    except GemmaError as error:
        code = _fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = 2
    except click.ClickException as error:
        code = _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except OSError as error:  # of the streams: a full disk behind `>`
        code = _fail(f"{error.strerror or error}")
    sys.exit(code if isinstance(code, int) else 0)


def _prepare_streams() -> None:
    """Any bytes may come in, any character may go out, and either stream may be closed."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  for as long as we live
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the tokenizer keeps such bytes
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _fail(message: str) -> int:
    click.echo(f"gemma-multi: {' '.join(message.split())}", err=True)
    return 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Gemma 3 270M: one model on MLX, Keras and LiteRT."""


def _model_options(command: Command) -> Command:
    for option in reversed(
        (
            click.option("-m", "--model", default="storyteller", show_default=True,
                         help="Bundled name, directory, exported file or Hugging Face id."),
            click.option("-b", "--backend", default="auto", show_default=True,
                         help="mlx, keras, litert or auto."),
            click.option("--precision", default="auto", show_default=True,
                         help="float32, bfloat16, int4, int8 or auto."),
            click.option("--context-length", type=int,
                         help="Tokens; all the model has if unset (LiteRT: at most 4096)."),
            click.option("--threads", type=int, help="LiteRT only: processor cores to use."),
            click.option("--revision", help="Branch, tag or commit of a hub repository."),
            click.option("--local-files-only", is_flag=True, help="Never ask the hub."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def _generation_options(command: Command) -> Command:
    for option in reversed(
        (
            click.option("--max-tokens", type=int, help="The most tokens to generate."),
            click.option("--temperature", type=float, help="0 always takes the best token."),
            click.option("--top-k", type=int),
            click.option("--top-p", type=float),
            click.option("--min-p", type=float),
            click.option("--repetition-penalty", type=float),
            click.option("--seed", type=int, help="The same seed gives the same text."),
        )
    ):
        command = option(command)
    return command


def _load(options: dict[str, Any]) -> Any:
    """Takes `load`'s options out of a command's and loads; the others are checked before."""
    from gemma_multi import GenerationOptions, load

    names = ("model", "backend", "precision", "context_length", "threads", "revision",
             "local_files_only")  # fmt: skip
    chosen = {name: options.pop(name) for name in names}
    GenerationOptions.merge({}, options)
    return load(**chosen)


@cli.command()
@click.argument("prompt", required=False)
@click.option("--system", help="Text in front of the conversation.")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without a turn.")
@click.option("--stop", multiple=True, help="A text that ends generation; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object.")
@_model_options
@_generation_options
def generate(
    prompt: str | None, system: str | None, raw: bool, as_json: bool, **options: Any
) -> None:
    """Answer PROMPT, or what is piped in."""
    from gemma_multi.terminal import show_stream

    text = _read_prompt(prompt)
    if raw and system:
        raise OptionError("--raw continues plain text and takes no --system")
    if not text.strip():
        raise OptionError("the prompt is empty; give it some text")
    model = _load(options)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    stream = model.stream(text if raw else messages, raw=raw, **options)
    if not as_json:
        show_stream(stream)
        return
    for _ in stream:
        pass
    result = stream.result
    _print_json(
        {
            "text": result.text,
            "tokens": list(result.tokens),
            "finish_reason": result.finish_reason,
            "prompt_tokens": result.prompt_tokens,
            "generated_tokens": result.generated_tokens,
            "seed": result.seed,
            "prefill_seconds": round(result.prefill_seconds, 4),
            "decode_seconds": round(result.decode_seconds, 4),
            "backend": model.backend,
        }
    )


def _read_prompt(prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    if sys.stdin is None or sys.stdin.isatty():
        raise OptionError("no prompt: give one as an argument or pipe it in")
    return sys.stdin.read()


@cli.command()
@click.option("--system", help="Text in front of the conversation.")
@_model_options
@_generation_options
def chat(system: str | None, **options: Any) -> None:
    """Talk to a model. /reset starts anew, Ctrl-C stops an answer, Ctrl-D leaves."""
    from gemma_multi.terminal import notes, show_stream

    model = _load(options)
    conversation = model.chat(system)
    interactive = sys.stdin.isatty()
    if interactive:
        notes.print(
            f"{model.checkpoint.provenance.source} on {model.backend}. "
            "/reset starts anew, Ctrl-D leaves.",
            style="dim",
            markup=False,
        )
    while True:
        if interactive:
            notes.print("[bold]> [/bold]", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        if line.strip() == "/reset":
            conversation.reset()
            continue
        try:
            stream = conversation.stream(line, **options)
        except GemmaError as error:
            if not interactive:
                raise
            notes.print(f"{error}; /reset starts anew", markup=False)
            continue
        try:
            show_stream(stream)
        except KeyboardInterrupt:
            stream.close()


@cli.command()
@click.argument("model")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--bits", type=int, default=4, show_default=True, help="Of the linear layers.")
@click.option("--embedding-bits", type=int, default=4, show_default=True, help="4 or 8.")
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option("--local-files-only", is_flag=True, help="Never ask the hub.")
@click.option("--json", "as_json", is_flag=True, help="The error of each tensor as JSON.")
def quantize(
    model: str,
    target: Path,
    bits: int,
    embedding_bits: int,
    revision: str | None,
    local_files_only: bool,
    as_json: bool,
) -> None:
    """Write MODEL as an int4 directory TARGET."""
    from gemma_multi.checkpoint.resolve import resolve
    from gemma_multi.quantization import quantize as run
    from gemma_multi.terminal import notes, progress_bar

    checkpoint = resolve(model, revision=revision, local_files_only=local_files_only)
    with progress_bar("quantising") as progress:
        report = run(checkpoint, target, bits, embedding_bits, progress)
    if as_json:
        rows = [{"name": t.name, "shape": t.shape, "bits": t.bits, "error": t.error}
                for t in report.tensors]  # fmt: skip
        _print_json({"path": str(target), "bytes": report.nbytes, "tensors": rows})
        return
    click.echo(report)
    sizes = f"{report.nbytes / 1e6:.1f} MB, was {checkpoint.nbytes / 1e6:.1f} MB"
    notes.print(f"{target}: {sizes}", markup=False)


@cli.command()
@click.argument("model")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--context-length", type=int, help="Positions it can hold; all the model has.")
@click.option("--prefill", type=int, multiple=True, metavar="N",
              help="Tokens read at a time; may be repeated.  [default: 16, 128]")  # fmt: skip
@click.option("--precision", default="auto", show_default=True, help="int4, int8, float32 or auto.")
@click.option("--cache", default="auto", show_default=True,
              help="Type of the global layers' caches: float32, int8 or auto.")  # fmt: skip
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option("--local-files-only", is_flag=True, help="Never ask the hub.")
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
        _print_json({"path": str(target), "bytes": report.nbytes, "format": report.format,
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


@cli.command()
@click.argument("model", default="storyteller")
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option("--local-files-only", is_flag=True, help="Never ask the hub.")
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
        _print_json(facts)
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


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def doctor(as_json: bool) -> None:
    """Say which backends work here, why others do not, and what to install."""
    from gemma_multi.diagnosis import diagnose

    found = diagnose()
    if as_json:
        _print_json({d.backend: {"works": d.works, "device": d.device, "versions": d.versions,
                                 "advice": d.advice} for d in found})  # fmt: skip
    else:
        for d in found:
            click.echo(f"{d.backend:<8} {'works on ' + d.device if d.works else 'does not work'}")
            versions = ", ".join(f"{name} {version}" for name, version in d.versions.items())
            for line in filter(None, (versions, d.advice)):
                click.echo(textwrap.indent(textwrap.fill(line, 70), " " * 9))
    if not any(d.works for d in found):
        raise click.exceptions.Exit(2)


@cli.command()
@click.option("--seed", type=int, default=7, show_default=True)
def demo(seed: int) -> None:
    """Tell one bedtime story on every installed backend and from the phone's file; compare."""
    from gemma_multi.demo import run

    if not run(seed):
        raise click.exceptions.Exit(1)


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, ensure_ascii=False))
