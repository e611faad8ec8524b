"""What quantising did to a model, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorError:
    """How well one tensor sits on its grid; `error` is root-mean-square, relative."""

    name: str
    shape: tuple[int, ...]
    bits: int
    error: float


@dataclass(frozen=True)
class Closeness:
    """How near a model's answers are to the original's, on the same text."""

    divergence: float  # Kullback-Leibler, nats a token
    perplexity: float
    agreement: float  # share of tokens for which both find the same one likeliest


@dataclass(frozen=True)
class Calibration:
    """What calibration was worth, on text that it did not see."""

    source: str  # the text, for people
    tokens: int  # that it was fitted to
    perplexity: float  # of the original
    plain: Closeness  # of weights rounded each to its nearest code
    calibrated: Closeness

    def __str__(self) -> str:
        rows = [f"calibrated on {self.tokens:,} tokens of {self.source}; on text held out:",
                f"{'':<12} {'perplexity':>10} {'divergence':>10} {'same token':>10}",
                f"{'original':<12} {self.perplexity:>10.2f}"]  # fmt: skip
        rows += [
            f"{name:<12} {one.perplexity:>10.2f} {one.divergence:>10.4f} {one.agreement:>10.1%}"
            for name, one in (("rounded", self.plain), ("calibrated", self.calibrated))
        ]
        return "\n".join(rows)


@dataclass(frozen=True)
class Recovery:
    """How far an int4 model's probabilities are from the unquantised one's, on rows held out: the
    mean divergence a token, in nats, before and after training."""

    before: float
    after: float


@dataclass(frozen=True)
class QuantizationReport:
    """What quantising did to each tensor, before recovery, and to the answers."""

    tensors: tuple[TensorError, ...]
    path: Path | None = None
    nbytes: int = 0
    calibration: Calibration | None = None
    recovery: Recovery | None = None

    def __str__(self) -> str:
        width = max(len(t.name) for t in self.tensors)
        rows = [f"{'tensor':<{width}}  {'shape':>13}  bits   error"]
        rows += [
            f"{t.name:<{width}}  {'x'.join(map(str, t.shape)):>13}  {t.bits:>4}  {t.error:>6.2%}"
            for t in self.tensors
        ]
        if self.calibration is not None:
            rows += ["", str(self.calibration)]
        if self.recovery is not None:
            before, after = self.recovery.before, self.recovery.after
            rows.append(f"divergence from the original: {before:.4f} nats a token, "
                        f"recovered to {after:.4f}")  # fmt: skip
        return "\n".join(rows)
