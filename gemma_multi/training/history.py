"""What happened in a run: `history.jsonl`, and what it means in a sentence or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_multi.files import write_atomically

_WORSE = 1.02  # times the best validation loss: from here on it counts as overfitting


class History:
    """One record a step (`loss`, `learning_rate`, `gradient_norm`, `tokens`, `seconds`) and one a
    validation (`validation_loss`), in memory and appended to a file as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []

    def resume(self, step: int, write: bool = True) -> None:
        """Goes back to what was known after `step` steps; what a killed run wrote later goes."""
        self.records = [r for r in read_history(self.path) if r["step"] <= step]
        if not write:
            return
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        write_atomically(self.path, lines.encode())

    def add(self, **record: Any) -> None:
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a field."""
        found = [(r["step"], r[name]) for r in self.records if name in r]
        return [step for step, _ in found], [value for _, value in found]


def read_history(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a last line that a killed process left unfinished is skipped."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def verdict(history: History, instead: str = "take `best`, the model of that step") -> str:
    """What came out, and whether it overfits, in plain words; `instead` is what to do then."""
    steps, losses = history.curve("validation_loss")
    if not losses:
        _, trained = history.curve("loss")
        return f"Training loss went from {trained[0]:.3f} to {trained[-1]:.3f}; none was held out."
    best = min(range(len(losses)), key=losses.__getitem__)
    if losses[0] <= losses[best]:
        return (
            f"Validation loss never fell below the {losses[0]:.3f} before training: the model "
            "learned nothing that carries over. Try a lower learning rate, or more rows."
        )
    said = f"Validation loss fell from {losses[0]:.3f} to {losses[best]:.3f} at step {steps[best]}."
    if losses[-1] > losses[best] * _WORSE:
        said += (
            f" After that it rose to {losses[-1]:.3f} while the model learned its examples by "
            "heart (it overfits). For a fixed voice that may be what you want; if not, "
            f"{instead}."
        )
    elif best == len(losses) - 1:
        said += " It was still falling at the end; more epochs may help."
    return said
