"""`app`: a model and a page that runs it in a browser."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from gemma_multi.cli.common import given, print_json, source_options


@click.command()
@click.argument("name", metavar="bedtime")
@click.option("-m", "--model", default="storyteller", show_default=True,
              help="As for generate; of a .tflite or .litertlm, that very file runs.")  # fmt: skip
@click.option("-o", "--output", metavar="PATH", help="A new folder, for any static server.")
@click.option("--serve", is_flag=True, help="Show it at 127.0.0.1, until Ctrl-C.")
@click.option("--port", type=int, default=8000, show_default=True, help="With --serve; 0: any.")
@click.option("--precision", help="int4, int8 or float32, of what is exported; as stored if unset.")
@click.option("--context-length", type=int, help="Tokens, of what is exported.  [640]")
@click.option("--transformers-js/--no-transformers-js", default=True,
              help="Also run the ONNX export, by a switch.  [yes]")  # fmt: skip
@source_options
@click.option("--json", "as_json", is_flag=True, help="What was packed, as JSON.")
def app(
    name: str, output: str | None, serve: bool, port: int, as_json: bool, **options: Any
) -> None:
    """Pack MODEL with a web page that runs it, offline: bedtime, bedtime stories."""
    from gemma_multi.apps import pack
    from gemma_multi.apps import serve as serving
    from gemma_multi.errors import OptionError
    from gemma_multi.terminal import notes

    if output is None and not serve:
        raise OptionError("nowhere to put the page: give -o FOLDER, or --serve, or both")
    with ExitStack() as stack:
        server = None
        if output is None:
            work = stack.enter_context(tempfile.TemporaryDirectory(prefix="gemma_multi."))
            output = str(Path(work, name))
        if serve:  # before the work, for the port may be taken
            server = stack.enter_context(serving(output, port))
        report = pack(name, output, **given(options))
        if as_json:
            print_json({**asdict(report), "path": output})
        else:
            notes.print(
                f"{output}: {report.nbytes / 1e6:.1f} MB in {report.files} files, of which the "
                f"model {report.model_bytes / 1e6:.1f} MB, {report.precision}",
                markup=False,
            )
        if server is not None:
            address = f"http://127.0.0.1:{server.server_port}/"
            notes.print(f"Open {address} in a browser. Ctrl-C ends it.", markup=False)
            server.serve_forever()
