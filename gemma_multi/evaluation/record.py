"""What was measured, kept beside the model: `evaluations.jsonl` and the card.

Design choices:
- Each score goes with its protocol and with the hashes of data and weights, so that it can be
  measured again, and so that nobody takes it for a score of other weights.
- `evaluations.jsonl` has all of it, a line a score, in the order in which they came. From it the
  card is written: a table for people, and in the header the `model-index` that hubs read.
- A save of changed weights carries no scores on: they were of the others.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_multi.checkpoint import Provenance
from gemma_multi.errors import CheckpointError, OptionError
from gemma_multi.files import locked, renamed_when_whole, write_atomically
from gemma_multi.formats import formats
from gemma_multi.formats.directory import CARD_FILE
from gemma_multi.sources import BUNDLED, Source, open_checkpoint

if TYPE_CHECKING:
    from gemma_multi.evaluation.report import EvaluationReport

FILE = "evaluations.jsonl"
_SECTION = re.compile(r"\n## Scores\n.*?(?=\n## |\Z)", re.DOTALL)
_LOCK = ".evaluations.lock"


def check_recordable(model: Source) -> Path:
    """The directory whose card may be written. Raises OptionError where there is none."""
    if isinstance(model, str | Path) and (isinstance(model, Path) or model not in BUNDLED):
        path = Path(model)
        if path.is_dir() and any(
            one.is_directory and one.looks_like(path) for one in formats().values()
        ):
            return path
    raise OptionError(
        f"{model}: scores are recorded in the card of a model's own directory; measure one that "
        "export, quantize or save wrote"
    )


def record(report: EvaluationReport, directory: Path) -> Path:
    """Adds a score to a directory; the card. Raises OptionError for a directory of none or of
    other weights, CheckpointError where it cannot be written."""
    check_recordable(directory)
    digest = open_checkpoint(directory).digest()
    if report.protocol.get("adapter") or digest != report.model["weights_sha256"]:
        raise OptionError(
            f"{directory}: its weights are not those that were measured; save what was measured "
            "and record it there"
        )
    facts = report.to_dict()
    del facts["rows"]  # which are somebody's data
    try:
        with locked(directory / _LOCK, f"{directory}: another process records a score there"):
            return _add(facts, directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written: {error.strerror}") from error


def recorded(directory: Path) -> list[dict[str, Any]]:
    """The scores that a directory's card states. Raises CheckpointError for a damaged file."""
    path = directory / FILE
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; move it away") from error


def _add(facts: dict[str, Any], directory: Path) -> Path:
    """Writes both files, or neither; the card."""
    from huggingface_hub import metadata_load, metadata_save

    kept, card = [*recorded(directory), facts], directory / CARD_FILE
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in kept)
    with renamed_when_whole(card) as temporary:
        if card.exists():
            shutil.copyfile(card, temporary)
        else:
            of = Provenance.read(directory)
            temporary.write_text(f"---\nlicense: {of.license}\n---\n\n# {of.source}\n")
        try:
            header = metadata_load(temporary) or {}
        except Exception as error:  # of its YAML library
            raise CheckpointError(f"{card}: its header is no YAML: {error}") from error
        text = _SECTION.sub("", temporary.read_text(encoding="utf-8")).rstrip("\n")
        temporary.write_text(f"{text}\n{_section(kept)}", encoding="utf-8")
        metadata_save(temporary, {**header, "model-index": _index(directory, kept)})
        write_atomically(directory / FILE, lines.encode())
    return card


def _section(kept: list[dict[str, Any]]) -> str:
    """For people."""
    rows = [
        f"| {one['task']} | {name} | {_number(name, figure)} | {one['data']['rows']} rows of "
        f"{one['data']['name']}, `{one['data']['sha256'][:12]}` | {_how(one)} |"
        for one in kept for name, figure in one["figures"].items()
    ]  # fmt: skip
    return "\n".join((
        "\n## Scores\n",
        f"With 95% intervals; protocols and hashes in full in `{FILE}`.\n",
        "| task | | score | data | how |", "| --- | --- | --- | --- | --- |", *rows, "",
    ))  # fmt: skip


def _number(name: str, figure: Mapping[str, Any]) -> str:
    from gemma_multi.evaluation.report import interval, shown
    from gemma_multi.scoring import Estimate

    one = Estimate(**figure)
    return f"{shown(name, one.value)} ({interval(name, one)})"


def _how(one: Mapping[str, Any]) -> str:
    how = one["protocol"]
    told = [how["prompt"], how.get("answer", ""), f"{how['backend']}, {how['weights']} weights, "
            f"{how['activations']} activations", f"gemma_multi {one['version']}"]  # fmt: skip
    return "; ".join(filter(None, told))


def _index(directory: Path, kept: list[dict[str, Any]]) -> Any:
    """`model-index`, as hubs read it."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = []
    for one in kept:
        data, how = one["data"], {"weights_sha256": one["model"]["weights_sha256"],
                                  **one["protocol"]}  # fmt: skip
        for metric, figure in one["figures"].items():
            results.append(EvalResult(
                task_type="text-generation", task_name=one["task"], dataset_name=data["name"],
                dataset_type=data["name"], dataset_revision=data["sha256"],
                dataset_args={"rows": data["rows"]}, metric_type=metric, metric_name=metric,
                metric_value=figure["value"],
                metric_args={"low": figure["low"], "high": figure["high"], **how},
            ))  # fmt: skip
    return eval_results_to_model_index(directory.resolve().name, results)
