"""Whether a backend is to be trusted on this machine: a minute of questions with known answers.

The answers come from `decoder`, the model in NumPy, which runs alike everywhere and shares nothing
with any backend but the weights. What is asked is what engines get wrong: sums in float32, layer by
layer; prompts in pieces; steps past the sliding window; going back; going apart; the int4 that
ships, with the activations that the engine rounds; tokens drawn with a seed. The bundled model's
window is 64, so short texts go well beyond it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.comparison.layers import LayerTrace
from gemma_multi.comparison.prompts import shipped_prompts
from gemma_multi.comparison.tolerances import tolerance_of
from gemma_multi.decoder import Decoder, Weights, log_softmax
from gemma_multi.engines import ALL, NOTHING, Backend, Engine, Session, backends, create_engine
from gemma_multi.model import Model
from gemma_multi.progress import Progress, reporting
from gemma_multi.sampling import GenerationOptions, choose
from gemma_multi.sources import open_checkpoint
from gemma_multi.transforms import to_precision

_LENGTH = 160  # of the text that is read: two windows and a half
_STEPS = 24  # tokens read one at a time
_SEED, _DRAWN = 7, 24
_NO_IDS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Check:
    """One question, and what came of it."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class SelfTest:
    """What one backend was asked, in order; the first that failed names the fault best."""

    backend: str
    checks: tuple[Check, ...]
    seconds: float

    @property
    def trusted(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def sentence(self) -> str:
        """In one line, whether to trust it."""
        if self.trusted:
            first = self.checks[0].found
            return f"can be trusted: {len(self.checks)} checks in {self.seconds:.0f} s; {first}"
        wrong = [check for check in self.checks if not check.passed]
        others = ", ".join(check.name for check in wrong[1:])
        return f"do not trust it: {wrong[0].name}: {wrong[0].found}" + (
            f"; and so are {others}" if others else ""
        )


def self_test(names: list[str] | None = None, progress: Progress = True) -> list[SelfTest]:
    """Asks each backend, those that are installed unless `names` says which. One that fails in
    any way is not trusted; none of it raises."""
    chosen = [one for one in backends().values()
              if (not one.is_reference and not one.missing() if names is None
                  else one.name in names)]  # fmt: skip
    questions = _Questions(open_checkpoint("storyteller"))
    found = []
    with reporting(progress, "verifying") as report:
        for i, backend in enumerate(chosen):
            started, checks = time.perf_counter(), []
            for check in questions.ask(backend):
                checks.append(check)
                report(i * COUNT + len(checks), len(chosen) * COUNT)
            spent = time.perf_counter() - started
            found.append(SelfTest(backend.name, tuple(checks), spent))
    return found


class _Reference:
    """The model in NumPy."""

    def __init__(self, checkpoint: Checkpoint, int8_activations: bool = False) -> None:
        self._decoder = Decoder(checkpoint.config, Weights(checkpoint), int8_activations)

    def states(self, ids: np.ndarray) -> np.ndarray:
        """As `Engine.trace` gives them: `f32[L + 2, T, D]`."""
        x = self._decoder.embed(ids)
        states = [x]
        for layer in range(self._decoder.config.num_hidden_layers):
            x = self._decoder.layer(layer, x)
            states.append(x)
        return np.stack([*states, self._decoder.last_norm(x)])

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Of every position: `f32[T, V]`."""
        return np.concatenate([part for _, part in self._decoder.head(self.states(ids)[-1])])


class _Questions:
    """A text, what the reference makes of it, and what is compared with that."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.stored = checkpoint
        self.plain = to_precision(checkpoint, "float32")
        self.reference = _Reference(self.plain)
        self.allowed = tolerance_of("float32", "float32")
        self.window = checkpoint.config.sliding_window
        texts = [prompt.content for prompt in shipped_prompts() if prompt.raw]
        encoded = max((checkpoint.tokenizer.encode(str(text)) for text in texts), key=len)
        self.ids = np.array([checkpoint.tokenizer.bos_id, *encoded][:_LENGTH])
        self.logits = self.reference.logits(self.ids)

    def ask(self, backend: Backend) -> Iterator[Check]:
        try:
            engine = create_engine(self.plain, backend.name, "float32")
        except Exception as error:
            yield Check("starting", False, f"{type(error).__name__}: {error}")
            return
        for name, question in _IN_FLOAT32.items():
            yield _asked(name, lambda question=question: question(self, engine))  # type: ignore[misc]
        yield _asked("int4", lambda: _int4(self, backend.name))

    def compare(self, rows: np.ndarray, start: int, expected: np.ndarray | None = None) -> str:
        """Logits of the positions from `start` on, `f32[n, V]`, against the reference's; the
        largest difference. Raises _Wrong, naming the first position that is."""
        expected = self.logits if expected is None else expected
        apart = np.abs(np.atleast_2d(rows) - expected[start : start + len(rows)]).max(axis=1)
        wrong = np.flatnonzero(~(apart <= self.allowed.logit))  # NaN is
        if len(wrong):
            at = int(wrong[0])
            raise _Wrong(f"logits are off by {apart[at]:.2g} at position {start + at}")
        return f"logits within {apart.max():.0e}"


class _Wrong(Exception):
    """What is."""


def _asked(name: str, question: Callable[[], str]) -> Check:
    try:
        return Check(name, True, question())
    except _Wrong as wrong:
        return Check(name, False, str(wrong))
    except Exception as error:  # a broken engine can fail in any way
        return Check(name, False, f"{type(error).__name__}: {error}")


def _layers(q: _Questions, engine: Engine) -> str:
    trace = LayerTrace(q.plain.config, q.allowed)
    trace.add(q.reference.states(q.ids), engine.trace(q.ids))
    found = trace.result()
    if not found.passed:
        raise _Wrong(found.summary)
    return q.compare(engine.session().read(q.ids, ALL), 0)


def _prefill(q: _Questions, engine: Engine) -> str:
    session, rows = engine.session(), []
    for size in (1, q.window - 1, 3, q.window, len(q.ids)):
        piece = q.ids[session.length :][:size]
        rows.append(session.read(piece, ALL))
    return q.compare(np.concatenate(rows), 0)


def _decode(q: _Questions, engine: Engine) -> str:
    session, start = engine.session(), q.window - 4
    session.read(q.ids[:start], NOTHING)
    return q.compare(_steps(session, q.ids[start : start + _STEPS]), start)


def _truncate(q: _Questions, engine: Engine) -> str:
    session, found = engine.session(), ""
    session.read(q.ids, NOTHING)
    for length in (len(q.ids) - 3, 2 * q.window - 5, 3):
        session.truncate(length)  # a little; further than a ring remembers; nearly all of it
        found = q.compare(_steps(session, q.ids[length : length + 3]), length)
    return found


def _fork(q: _Questions, engine: Engine) -> str:
    session, start = engine.session(), 100
    session.read(q.ids[:start], NOTHING)
    other = session.fork()
    elsewhere = np.concatenate([q.ids[:start], q.ids[1:11]])
    mine = _steps(session, q.ids[start : start + 5])
    theirs = _steps(other, elsewhere[start:])
    q.compare(theirs, start, q.reference.logits(elsewhere))
    rows = np.concatenate([mine, _steps(session, q.ids[start + 5 : start + 10])])
    return q.compare(rows, start)


def _seeds(q: _Questions, engine: Engine) -> str:
    model = Model(q.plain, engine)
    prompt = q.stored.tokenizer.decode(q.ids[1:40].tolist())
    said = [model.generate(prompt, seed=_SEED, max_tokens=_DRAWN).tokens for _ in range(2)]
    if said[0] != said[1]:
        raise _Wrong("one seed gave two texts")
    read = model.encode(prompt)
    whole = np.array([*read, *said[0]])
    options = GenerationOptions.merge(q.stored.generation, {"seed": _SEED})
    logits = q.reference.logits(whole)
    for position in range(len(read), len(whole)):
        token = choose(logits[position - 1], _NO_IDS, options, position)
        if token != whole[position]:
            raise _Wrong(f"token {position - len(read)} is {whole[position]}, expected {token}")
    return f"{len(said[0])} tokens as drawn"


def _int4(q: _Questions, backend: str) -> str:
    engine = create_engine(q.stored, backend, "int4")
    rounded = engine.compute == "int8"
    expected = log_softmax(_Reference(q.stored, rounded).logits(q.ids))
    session, start = engine.session(), len(q.ids) - _STEPS
    rows = [session.read(q.ids[:start], ALL), _steps(session, q.ids[start:])]
    found = log_softmax(np.concatenate(rows))
    divergence = float(np.mean(np.sum(np.exp(expected) * (expected - found), axis=1)))
    allowed = tolerance_of("float32", engine.compute)
    if not divergence <= allowed.divergence:  # NaN is not
        raise _Wrong(f"KL {divergence:.2g} to the same weights in NumPy, of {allowed.divergence}")
    return f"KL {max(divergence, 0):.0e}, activations in {engine.compute}"


def _steps(session: Session, ids: np.ndarray) -> np.ndarray:
    return np.stack([session.read(ids[i : i + 1]) for i in range(len(ids))])


_IN_FLOAT32: dict[str, Callable[[_Questions, Engine], str]] = {
    "float32": _layers, "prefill in pieces": _prefill, "steps past the window": _decode,
    "truncate": _truncate, "fork": _fork, "seeds": _seeds,
}  # fmt: skip
COUNT = len(_IN_FLOAT32) + 1  # checks of a backend
