"""The nine stages from rows to a report. Each says what its outcome follows from, and goes on where
a killed one stopped: rows that were asked are not asked again, and training resumes by itself."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gemma_multi import formats
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.comparison import Prompt, parity
from gemma_multi.errors import DataError
from gemma_multi.exporters import save
from gemma_multi.exporting import export
from gemma_multi.litert_lm import litert_lm_version
from gemma_multi.loading import load
from gemma_multi.model import Model
from gemma_multi.progress import Progress
from gemma_multi.quantizing import quantize
from gemma_multi.scoring import LOSS
from gemma_multi.shipping.asking import Answers, Questions, ask
from gemma_multi.shipping.held_out import Split, write_rows
from gemma_multi.shipping.journal import Journal, Stage
from gemma_multi.shipping.phone import run_as_on_a_phone
from gemma_multi.shipping.plan import Plan
from gemma_multi.training.calibrated import calibrated
from gemma_multi.training.finetune import finetune
from gemma_multi.training.history import History, verdict
from gemma_multi.training.result import RUN_FILE, FineTune, read_run

FILE, MODEL, TRAINING = "model.litertlm", "model", "training"
TRAINING_ROWS, HELD_ROWS = "rows/training.jsonl", "rows/held-out.jsonl"
BEFORE, AFTER, SHIPPED = "before", "after", "shipped"
_COMPARED = 16  # held-out rows whose logits are compared, and answers of so many tokens:
_COMPARED_TOKENS = 32


@dataclass
class Shipment:
    """One way through the stages."""

    base: Checkpoint
    split: Split
    plan: Plan
    backend: str  # that trains, and asks in float
    journal: Journal
    progress: Progress

    @property
    def directory(self) -> Path:
        return self.journal.directory

    @property
    def file(self) -> Path:
        return self.directory / FILE

    @property
    def expected(self) -> list[str | None]:
        return [one.answer for one in self.split.held]

    @cached_property
    def questions(self) -> Questions:
        asked = [one.question or [] for one in self.split.held]
        loss = self.split.scoring.kind == LOSS
        return Questions([] if loss else asked, self.directory / HELD_ROWS, self.plan.max_tokens,
                         self.plan.options.max_length)  # fmt: skip

    def answers(self, when: str) -> Answers:
        return Answers(self.directory / "answers" / f"{when}.jsonl")

    def stages(self) -> list[Stage]:
        split, plan, base = self.split, self.plan, self.base
        rows = {
            "training": [one.raw for one in split.training],
            "held": [one.raw for one in split.held], "scoring": asdict(split.scoring),
            "max_tokens": plan.max_tokens,
        }  # fmt: skip
        pieces = hashlib.sha256(base.tokenizer.model).hexdigest()
        model = {"weights": base.digest(), "config": base.config.to_dict(), "pieces": pieces}
        training = {k: v for k, v in plan.options.to_dict().items() if k != "save_every"}
        asking = {"max_length": plan.options.max_length, "backend": self.backend}
        answers = "answers/{}.jsonl"
        return [
            Stage("rows", "check the rows", self._rows, depends_on=rows, leaves=("rows",)),
            Stage("before", "ask the model as it came", self._before, ("rows",),
                  {**model, **asking}, (answers.format(BEFORE),)),
            Stage("train", "train through the int4 grid" if plan.options.qat else "train",
                  self._train, ("rows",), {**model, "options": training, "on": self.backend},
                  (TRAINING,)),
            Stage("quantise", "put it on the int4 grid", self._quantise, ("train",), None,
                  (MODEL,)),
            Stage("export", f"export {FILE}", self._export, ("quantise",),
                  {"context_length": plan.context_length}, (FILE,)),
            Stage("run", "run that file, and ask it", self._run, ("rows", "export"),
                  {**asking, "in": litert_lm_version()}, (answers.format(SHIPPED),)),
            Stage("after", "ask what was trained, in float", self._after, ("rows", "quantise"),
                  asking, (answers.format(AFTER),)),
            Stage("compare", "compare the file with what was trained", self._compare,
                  ("rows", "export"), asking),
        ]  # fmt: skip

    @cached_property
    def shipped(self) -> Checkpoint:
        """What the file was exported from."""
        return formats.read(self.directory / MODEL)

    def _rows(self, _: bool) -> dict[str, Any]:
        write_rows(self.split.training, self.directory / TRAINING_ROWS)
        write_rows(self.split.held, self.directory / HELD_ROWS)
        return {"training": len(self.split.training), "held_out": len(self.split.held),
                "max_tokens": self.plan.max_tokens}  # fmt: skip

    def _before(self, _: bool) -> dict[str, Any]:
        return self._ask(self.base, BEFORE, held_to_labels=True)

    def _train(self, _: bool) -> dict[str, Any]:
        result = self._finetune()
        history = History(result.output / "history.jsonl")
        history.records = result.history
        losses = [record for record in result.history if "loss" in record]
        options = result.options
        return {
            "verdict": verdict(history, "train for fewer epochs"), "method": options.method,
            "qat": options.qat, "backend": result.backend,
            "device": read_run(result.output)["device"], "epochs": options.epochs,
            "steps": len(losses), "tokens": sum(record["tokens"] for record in losses),
            "history": result.history,
        }  # fmt: skip

    def _finetune(self) -> FineTune:
        output = self.directory / TRAINING
        base = self.base
        if self.plan.options.method == "scales" and not base.is_int4:
            base = calibrated(base, self.progress)  # once, and kept in the cache
        return finetune(
            base, self.directory / TRAINING_ROWS, output, backend=self.backend,
            validation=self.directory / HELD_ROWS, resume=(output / RUN_FILE).exists(),
            progress=self.progress, **self.plan.training,
        )  # fmt: skip

    def _quantise(self, _: bool) -> dict[str, Any]:
        """What was trained through the grid is on it; nothing is rounded again."""
        result, target = self._finetune(), self.directory / MODEL
        checkpoint = result.checkpoint()
        shutil.rmtree(target, ignore_errors=True)
        if checkpoint.is_int4:
            save(checkpoint, target)
            return {"how": "trained on the int4 grid, so nothing was rounded afterwards"}
        for text in (self.directory / TRAINING_ROWS, "self"):
            try:
                report = quantize(checkpoint, target, calibrate=text, progress=self.progress)
            except DataError:  # too few rows to tell what its inputs look like
                if text == "self":
                    raise
                continue
            break
        return {"how": f"calibrated after training: {report}"}

    def _export(self, _: bool) -> dict[str, Any]:
        self.file.unlink(missing_ok=True)
        report = export(self.directory / MODEL, self.file, progress=self.progress,
                        context_length=self.plan.context_length)  # fmt: skip
        return {
            "bytes": report.nbytes, "precision": report.precision,
            "context_length": report.context_length, "refitted": len(report.refitted),
        }  # fmt: skip

    def _run(self, _: bool) -> dict[str, Any]:
        return run_as_on_a_phone(
            self.file, self.plan.context_length, self.questions, self.split.scoring,
            self.answers(SHIPPED).path, self.progress,
        )  # fmt: skip

    def _after(self, _: bool) -> dict[str, Any]:
        return self._ask(self.shipped, AFTER)

    def _ask(
        self, checkpoint: Checkpoint, when: str, held_to_labels: bool = False
    ) -> dict[str, Any]:
        model: Model = load(checkpoint, backend=self.backend, progress=self.progress,
                            context_length=self.plan.context_length)  # fmt: skip
        ask(model, self.questions, self.answers(when), self.split.scoring, self.progress,
            held_to_labels)  # fmt: skip
        found = model.describe()
        return {key: found[key] for key in ("backend", "device", "weights", "activations")}

    def _compare(self, _: bool) -> dict[str, Any]:
        # training with answers says nothing of what should follow inside of a question; a base
        # model's turn markers, which it never saw, are then the least certain places of all
        chosen = [
            Prompt(one.where, tuple(one.opening) or one.row.text, only_answer=bool(one.opening))
            for one in self.split.held[:_COMPARED]
        ]
        report = parity(
            self.shipped, [self.backend], against=str(self.file),
            prompts=chosen, max_tokens=_COMPARED_TOKENS, progress=self.progress,
        )  # fmt: skip
        logits = report.comparisons[0].logits.summary_where()
        assert logits is not None
        return {**report.to_dict(), "summary": {
            "passed": report.passed, "headline": report.headline, "failures": report.failures,
            "positions": logits.positions, "divergence": logits.divergence, "top1": logits.top1,
            "largest": logits.largest,
        }}  # fmt: skip
