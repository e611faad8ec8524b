"""Small-model work on the real Gemma 3 270M in int4, on LiteRT: against plain generation of text.

    python benchmarks/task_costs.py [--rows 500] [--only WORDS] [--json FILE]

Each line is one thing done two ways on the same weights, engine and cores, in turn, so that a
machine that slows down slows both. Where llama-cpp-python is installed, labels are also generated
by llama.cpp under a grammar, from the same codes and scales (`llama_cpp_answers`). Accuracy is of
film reviews that people rated (`other_peoples_files`), by a base model that was never trained on
the task.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import llama_cpp_answers
import numpy as np
from other_peoples_files import brown_documents, gemma_270m
from pydantic import BaseModel, Field
from real_rows import film_reviews
from rich.console import Console
from rich.table import Table
from side_by_side import seconds

import gemma_multi
from gemma_multi.constraints import ConstraintOptions
from gemma_multi.constraints.vocabulary import llguidance_tokenizer
from gemma_multi.machine import available_cores
from gemma_multi.training.calibrated import calibrated
from gemma_multi.transforms import original

LABELS = ["billing", "delivery", "returns", "account", "technical", "warranty", "sales", "other"]
INSTRUCTION = """You sort the mail of a shop that sells lamps, small furniture and kitchen tools on
the internet. Each mail goes to exactly one of eight desks. The desk for billing answers questions
about invoices, double charges and discounts. The desk for delivery knows where parcels are and when
they will come. The desk for returns takes goods back within thirty days and sends the money. The
desk for accounts helps people who cannot log in, who want to change their address or who want their
data to be deleted. Technical questions are about how to mount, clean or repair something that was
bought from us. The desk for warranty looks after things that broke within two years. Sales answers
those who have not bought anything yet and want to know more, or who buy for a company. Everything
else, such as applications for a job, press, advertising and mail that nobody understands, goes to
the last desk. Read the mail, think of what the sender wants to happen next, and give the name of
one desk: billing, delivery, returns, account, technical, warranty, sales or other."""
MAILS = """The floor lamp that I ordered on the second of May still has not come, although your
page says it was handed to the driver nine days ago. Could somebody please look into
it and tell me?
|I was charged twice for the same set of knives, once on Monday and once on Tuesday,
and my bank says that both payments went through. Please send the second one back to
my card.
|The grinder stopped turning after fourteen months. I use it once a week for coffee and
have always cleaned it as the leaflet says. Can it be repaired, or do I get a new one
from you?
|We are furnishing an office for thirty people and would like to know whether there is
a lower price for that many desk lamps, and whether you could deliver all of them in
one go in March.
|Since the update I cannot log in any more. The page says that my address is not known,
though I get your letters to it every week. Please set my password anew or tell me
what to do.""".split("|")


class Ticket(BaseModel):
    desk: Literal["billing", "delivery", "returns", "account"]
    customer_is_angry: bool
    number_of_orders: int = Field(ge=0, le=99)
    preferred_language: Literal["English", "German", "French"]
    needs_answer_before: Literal["today", "this week", "any time"]
    contains_personal_data: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500, help="film reviews")
    parser.add_argument("--only", default="", help="lines whose name holds this")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    options = parser.parse_args()
    base = calibrated(original(gemma_multi.open_checkpoint(gemma_270m())), progress=True)
    lines: dict[str, Callable[[], dict[str, Any]]] = {
        "classify into 8 labels": lambda: classify(base),
        "a JSON object of 6 fields": lambda: fill_in(base),
        "an answer that copies": lambda: copy(base),
        "the mask": lambda: mask(base),
        "trimmed to 32,768 pieces": lambda: trimmed(base),
        "film reviews, no examples": lambda: reviews(base, options.rows, 0),
        "film reviews, 8 examples": lambda: reviews(base, options.rows, 8),
        "free whitespace": lambda: whitespace(base),
    }
    found = {name: line() for name, line in lines.items() if options.only in name}
    show(found)
    if options.json:
        kept = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps({**kept, **found}, indent=2) + "\n")


def loaded(base: Any, **given: Any) -> gemma_multi.Model:
    return gemma_multi.load(base, backend="litert", context_length=1024, **given)


def classify(base: Any) -> dict[str, Any]:
    """Rows a second. A generated label is three tokens at least: it, and what ends it."""
    model = loaded(base)
    without = loaded(base, prefix_cache=0)
    prompts = [
        [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": mail}]
        for mail in MAILS
    ]

    def generated(model: gemma_multi.Model) -> None:
        for prompt in prompts:
            model.generate(prompt, temperature=0, max_tokens=3)

    ways: list[Callable[[], Any]] = [
        lambda: generated(without), lambda: model.classify(MAILS, LABELS, INSTRUCTION)
    ]  # fmt: skip
    with ExitStack() as peers:
        if llama_cpp_answers.installed():
            threads = available_cores()
            llama = peers.enter_context(llama_cpp_answers.llama_cpp_model(base, 1024, threads))
            peer = llama_cpp_answers.GrammarLabels(llama, LABELS)
            ids = [model.encode(prompt) for prompt in prompts]
            ways.append(lambda: [peer(prompt) for prompt in ids])
        plain, by_logits, *theirs = seconds(*ways)
    tokens = model.tokenizer
    found = {
        "instruction_tokens": len(tokens.encode(INSTRUCTION)),
        "text_tokens": statistics.mean(len(tokens.encode(mail)) for mail in MAILS),
        "generated_rows_per_second": len(MAILS) / plain,
        "rows_per_second": len(MAILS) / by_logits, "ratio": plain / by_logits,
    }  # fmt: skip
    if theirs:
        found["llama_cpp_rows_per_second"] = len(MAILS) / theirs[0]
        found["ratio_to_llama_cpp"] = theirs[0] / by_logits
    return found


def fill_in(base: Any) -> dict[str, Any]:
    """The same tokens, step by step as generation takes them, and under the schema."""
    model = loaded(base, prefix_cache=0)
    prompt = f"Mail: {MAILS[0]}\n\nTicket:"
    result = model.generate(prompt, schema=Ticket, temperature=0, max_tokens=200)

    def step_by_step() -> None:
        session = model.new_session()
        session.read(model.encode(prompt))
        for token in result.tokens[:-1]:
            session.read([token]).argmax()

    def prefill() -> None:
        model.new_session().read(model.encode(prompt))

    plain, filled, read = seconds(
        step_by_step, lambda: model.generate(prompt, schema=Ticket, temperature=0), prefill
    )
    return {
        "text": result.text, "tokens": result.generated_tokens, "forced": result.forced_tokens,
        "generated_seconds": plain, "seconds": filled, "prompt_seconds": read,
        "ratio": plain / filled,
    }  # fmt: skip


def copy(base: Any) -> dict[str, Any]:
    """A passage of 60 tokens, written once more."""
    model = loaded(base, prefix_cache=0)
    one, other = (" ".join(d.split()[:45]) for d in brown_documents()[30:32])
    prompt = f"Text: {one}\nCopy: {one}\n\nText: {other}\nCopy:"

    def answer(lookup: bool) -> Any:
        return model.generate(prompt, raw=True, temperature=0, max_tokens=60, prompt_lookup=lookup)

    plain, guessed = answer(False), answer(True)
    without, with_it = seconds(lambda: answer(False), lambda: answer(True))
    return {
        "tokens": len(guessed.tokens), "same_text": plain.text == guessed.text,
        "copied": guessed.text.strip()[:40] == other[:40],
        "generated_seconds": without, "seconds": with_it, "ratio": without / with_it,
    }  # fmt: skip


def mask(base: Any) -> dict[str, Any]:
    """Of the tokens of JSON texts, over the whole vocabulary."""
    tokenizer = base.tokenizer
    started = time.perf_counter()
    llguidance_tokenizer(tokenizer, base.stop_ids)
    cold = time.perf_counter() - started
    started = time.perf_counter()
    llguidance_tokenizer(tokenizer, base.stop_ids)
    warm = time.perf_counter() - started
    schema = {"type": "object", "properties": {
        "title": {"type": "string"}, "words": {"type": "array", "items": {"type": "string"}},
        "year": {"type": "integer"}, "score": {"type": "number"},
    }, "required": ["title", "words", "year", "score"]}  # fmt: skip
    taken = []
    for document in brown_documents()[:20]:
        words = document.split()
        value = {"title": " ".join(words[:12]), "words": words[12:30], "year": 1961, "score": 0.25}
        text = json.dumps(value, ensure_ascii=False)
        constraint = ConstraintOptions(schema=schema).compile()
        assert constraint is not None
        matcher = constraint.matcher(tokenizer, base.stop_ids)
        for token in tokenizer.encode(text):
            started = time.perf_counter()
            matcher.allowed()
            matcher.take(token)
            taken.append(time.perf_counter() - started)
    return {
        "tokens": len(taken), "median_ms": 1e3 * statistics.median(taken),
        "mean_ms": 1e3 * statistics.mean(taken), "p99_ms": 1e3 * float(np.quantile(taken, 0.99)),
        "tokenizer_seconds_cold": cold, "tokenizer_seconds_warm": warm,
    }  # fmt: skip


def trimmed(base: Any) -> dict[str, Any]:
    """Steps a second, and what ships."""
    small = gemma_multi.trim(base, keep=32_768, progress=False)
    whole, less = loaded(base), loaded(small)

    def steps(model: gemma_multi.Model) -> None:
        session = model.new_session()
        session.read([2, *[500] * 200])
        for _ in range(40):
            session.read([500])

    plain, fast = seconds(lambda: steps(whole), lambda: steps(less))
    path = Path("build", "trimmed.litertlm").absolute()
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    report = gemma_multi.export(small, path, progress=False)
    path.unlink()
    brown = "\n".join(brown_documents()[:20])
    return {
        "litertlm_mb": report.nbytes / 1e6, "ratio": plain / fast,
        "more_tokens": len(small.tokenizer.encode(brown)) / len(base.tokenizer.encode(brown)),
    }  # fmt: skip


def reviews(base: Any, rows: int, count: int) -> dict[str, Any]:
    """Right answers, of `classify` and of generated words."""
    model, labels = loaded(base), ["positive", "negative"]
    known = [(row["prompt"].split("\n", 1)[1], row["completion"]) for row in film_reviews()]
    examples, unseen = known[:count], known[100 : 100 + rows]
    texts = [text for text, _ in unseen]
    asked = "Is the film review positive or negative?"
    started = time.perf_counter()
    found = model.classify(texts, labels, asked, examples, raw=True)
    taken = time.perf_counter() - started
    fair = model.classify(texts, labels, asked, examples, raw=True, calibrate=True)
    blocks = [f"Text: {text}\nLabel: {label}" for text, label in examples]
    right = 0
    started = time.perf_counter()
    for text, label in unseen:
        prompt = "\n\n".join([asked, *blocks, f"Text: {text}\nLabel:"])
        said = model.generate(prompt, raw=True, temperature=0, max_tokens=4).text.strip().lower()
        right += said.startswith(label)
    plain = time.perf_counter() - started
    result = {
        "rows": rows, "classify": share(found, unseen), "calibrated": share(fair, unseen),
        "generated_and_parsed": right / rows, "ratio": plain / taken,
    }  # fmt: skip
    if llama_cpp_answers.installed():
        with llama_cpp_answers.llama_cpp_model(base, 1024, available_cores()) as llama:
            peer = llama_cpp_answers.GrammarLabels(llama, labels, before=" ")
            theirs = [
                peer(model.encode("\n\n".join([asked, *blocks, f"Text: {text}\nLabel:"]), raw=True))
                for text in texts
            ]
        result["llama_cpp_grammar"] = statistics.mean(
            one == label for one, (_, label) in zip(theirs, unseen, strict=True)
        )
    return result


def share(found: list[Any], rows: list[tuple[str, str]]) -> float:
    return sum(c.label == label for c, (_, label) in zip(found, rows, strict=True)) / len(rows)


def whitespace(base: Any) -> dict[str, Any]:
    """Texts that end within 120 tokens, of JSON with and without free whitespace."""
    model = loaded(base)
    schema = {"type": "object", "properties": {
        "who": {"type": "string", "maxLength": 40}, "where": {"type": "string", "maxLength": 40},
        "sure": {"type": "boolean"},
    }, "required": ["who", "where", "sure"]}  # fmt: skip
    whole = {True: 0, False: 0}
    texts = [" ".join(d.split()[:40]) for d in brown_documents()[40:80]]
    for free in whole:
        for i, text in enumerate(texts):
            try:
                model.generate(f"Text: {text}\nJSON:", raw=True, schema=schema, whitespace=free,
                               max_tokens=120, seed=i)  # fmt: skip
                whole[free] += 1
            except gemma_multi.ConstraintError:
                pass
    return {"texts": len(texts), "whole_with": whole[True] / 40, "whole": whole[False] / 40}


def show(found: dict[str, dict[str, Any]]) -> None:
    table = Table(title="Gemma 3 270M in int4 on LiteRT, against plain generation")
    table.add_column("")
    table.add_column("ratio", justify="right")
    table.add_column("figures")
    for name, values in found.items():
        ratio = values.get("ratio")
        told = ", ".join(
            f"{k.replace('_', ' ')} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in values.items() if k not in ("ratio", "text")
        )  # fmt: skip
        table.add_row(name, "" if ratio is None else f"{ratio:.2f}", told)
    Console().print(table)


if __name__ == "__main__":
    main()
