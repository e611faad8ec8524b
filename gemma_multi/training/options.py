"""What a training run can be told, checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from gemma_multi.checkpoint import LINEAR_LAYERS
from gemma_multi.errors import OptionError
from gemma_multi.options import option, refuse_unknown
from gemma_multi.training.examples import LOSS_ON, SHORTEST, TOO_LONG

METHODS = ("full", "lora", "scales")
SCHEDULES = ("constant", "cosine")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LEARNING_RATES = {"full": 5e-5, "lora": 2e-4, "scales": 1e-3}  # where none is given


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. What each field means stands beside it, for the command line as well."""

    method: str | None = option(
        None,
        "full; lora: train an adapter; scales: of an int4 model, its codes stay.  "
        "[scales for a calibrated model, else full]",
    )
    qat: bool = option(
        True, "Train through the int4 grid, so that the int4 model is what was trained."
    )
    validation: float = option(
        0.1, "Share of the rows to hold out; 0 where they come by themselves."
    )
    epochs: int = option(3, "Times that all rows are read.")
    learning_rate: float | None = option(None, "[5e-5, with lora 2e-4, with scales 1e-3]")
    schedule: str = option("constant", "constant, or cosine: fall to 0.")
    warmup: float = option(0.0, "Share of the steps over which the learning rate rises from 0.")
    batch_size: int = option(4, "Rows at a time.")
    accumulate: int = option(1, "Batches to one step of the optimiser.")
    max_length: int = option(512, "Of a row, in tokens; at most the model's context.")
    packing: bool = option(False, "Fill rows with several examples, which do not see each other.")
    loss_on: str = option("answer", "answer, or all tokens.")
    too_long: str = option("refuse", "refuse, cut or skip rows beyond max-length.")
    clip: float = option(1.0, "The most that the gradient's norm may be.")
    weight_decay: float = option(0.0, "AdamW's, of matrices.")
    rank: int = option(8, "Of the adapter.")
    alpha: float = option(16.0, "Of the adapter, which is scaled by alpha / rank.")
    targets: tuple[str, ...] = option(LINEAR_LAYERS, "Layers to adapt, separated by commas.")
    dtype: str = option("auto", "Of activations: float32, bfloat16, float16 or auto.")
    gradient_checkpointing: bool | None = option(
        None, "Compute layers twice rather than keep what they gave.  [where that is over 1 GB]"
    )
    seed: int = option(0, "Of the order of rows, of what is held out, and of the adapter.")
    evaluate_every: int | None = option(None, "Steps between validations.  [each epoch]")
    save_every: float = option(300.0, "Seconds between saved states.")

    @classmethod
    def checked(
        cls, given: dict[str, Any], context_length: int, method: str = "full"
    ) -> TrainingOptions:
        """`method` is for where none is given. Raises OptionError naming the first option that
        cannot be."""
        refuse_unknown(cls, given)
        options = cls(**{"max_length": min(cls.max_length, context_length), **given})
        if options.method is None:
            options = replace(options, method=method)
        targets: Any = options.targets
        names = targets.split(",") if isinstance(targets, str) else targets
        if not isinstance(names, list | tuple | set) or not all(isinstance(n, str) for n in names):
            raise OptionError(f"targets is {targets!r}, expected names of layers")
        options = replace(options, targets=tuple(names))
        if options.learning_rate is None and options.method in METHODS:
            options = replace(options, learning_rate=LEARNING_RATES[options.method])
        options._check(context_length)
        return options

    def _check(self, context_length: int) -> None:
        for name, allowed in (
            ("method", METHODS), ("schedule", SCHEDULES), ("dtype", DTYPES),
            ("loss_on", LOSS_ON), ("too_long", TOO_LONG),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise OptionError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
                )
        for name in ("qat", "packing", "gradient_checkpointing"):
            value = getattr(self, name)
            if name == "gradient_checkpointing" and value is None:
                continue
            if type(value) is not bool:
                raise OptionError(f"{name} is {value!r}, expected True or False")
        if self.method == "scales" and not self.qat:
            raise OptionError(
                "method 'scales' trains the scales of the int4 grid, so qat=False cannot be; leave "
                "it out, or choose another method"
            )
        ranges: tuple[tuple[str, int, int], ...] = (
            ("epochs", 1, 1 << 20), ("batch_size", 1, 1 << 20), ("accumulate", 1, 1 << 20),
            ("max_length", SHORTEST, context_length), ("rank", 1, 1 << 16),
            ("seed", 0, (1 << 63) - 1), ("evaluate_every", 1, 1 << 40),
        )  # fmt: skip
        for name, least, most in ranges:
            value = getattr(self, name)
            if name == "evaluate_every" and value is None:
                continue
            if type(value) is not int or not least <= value <= most:
                raise OptionError(f"{name} is {value!r}, expected a whole number {least} to {most}")
        for name, limit in (("learning_rate", 1.0), ("clip", math.inf), ("alpha", 1e6)):
            self._check_number(name, 0 < _number(getattr(self, name)) <= limit,
                               f"a number above 0, at most {limit:g}")  # fmt: skip
        for name, limit in (("weight_decay", 1.0), ("save_every", math.inf)):
            self._check_number(name, 0 <= _number(getattr(self, name)) <= limit,
                               f"a number from 0 to {limit:g}")  # fmt: skip
        for name in ("validation", "warmup"):
            self._check_number(name, 0 <= _number(getattr(self, name)) < 1,
                               "a share from 0 to below 1")  # fmt: skip
        unknown = [t for t in self.targets if t not in LINEAR_LAYERS]
        if unknown or not self.targets:
            raise OptionError(
                f"LoRA target {unknown[0] if unknown else '()'!r} does not exist, expected some "
                f"of {', '.join(LINEAR_LAYERS)}"
            )

    def _check_number(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise OptionError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    @property
    def result(self) -> str:
        """What a run leaves: a "model" or an "adapter"."""
        return "adapter" if self.method == "lora" else "model"

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step (from 0) of `steps`."""
        assert self.learning_rate is not None
        warmup = round(self.warmup * steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - warmup) / max(1, steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "targets": list(self.targets)}


def _number(value: Any) -> float:
    """NaN for what is no number, which is outside every range."""
    return math.nan if isinstance(value, bool) or not isinstance(value, int | float) else value
