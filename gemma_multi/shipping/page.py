"""The page of a `ship`, for people who decide: is it good, what goes wrong, what does it cost?"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from gemma_multi.errors import BackendError
from gemma_multi.pages import details, document, figures, mark, table
from gemma_multi.plots import INSTALL, Line, plot
from gemma_multi.scoring import LOSS, SCORES, Score
from gemma_multi.shipping.report import Asked, ShipReport
from gemma_multi.shipping.stages import AFTER, BEFORE, SHIPPED
from gemma_multi.training.curves import smoothed

_MOST_WRONG = 40
_LONGEST = 400  # characters of a text in a table
_TITLES = {
    "rows": "checking rows", "before": "asking before", "train": "training",
    "quantise": "int4", "export": "exporting", "run": "asking the file", "after": "asking after",
    "compare": "comparing",
}  # fmt: skip


def page(report: ShipReport) -> str:
    """The whole HTML."""
    scope = (
        f"{report.source}, trained on {report.training_rows} rows and asked {_held(report)} that "
        "it never saw"
    )
    parts = [
        _scores(report), _wrong(report), _curves(report), _device(report), _parity(report),
        _commands(report), _made(report),
    ]  # fmt: skip
    return document(report.headline, scope, parts, "ok" if report.good else "fail")


def _held(report: ShipReport) -> int:
    return report.scores[SHIPPED].estimate.count


def _scores(report: ShipReport) -> str:
    top = max(score.estimate.high for score in report.scores.values())
    whole = top if report.scoring.kind == LOSS else 1.0
    rows = []
    for when, title in report.titles.items():
        estimate = report.scores[when].estimate
        rows.append([
            escape(title), f"<b>{report.shown(estimate.value)}</b>", report.interval(estimate),
            _range(estimate.low / whole, estimate.value / whole, estimate.high / whole),
        ])  # fmt: skip
    what = f"{SCORES[report.scoring.kind]}, since {report.scoring.why}"
    if report.scoring.why == "as asked for":
        what = f"{SCORES[report.scoring.kind]}, as asked for"
    lower = " Lower is better." if report.scoring.kind == LOSS else ""
    notes = "".join(f"<li>{escape(note)}.</li>" for note in report.notes)
    return (
        f"<p><b>{escape(report.verdict)}</b></p><h2>Score</h2>"
        f"<p>What is counted: {escape(what)}.{lower} So many rows tell the "
        "score only roughly: 95 of 100 such intervals hold the true one.</p>"
        + table(["", "score", "95% interval", ""], rows)
        + (f'<ul class="soft">{notes}</ul>' if notes else "")
        + _changes(report) + _by_label(report.scores[SHIPPED]) + _by_field(report.scores)
    )  # fmt: skip


def _range(low: float, value: float, high: float) -> str:
    """An interval on a line from 0 to the whole, as a picture."""
    a, b, c = (round(200 * min(max(x, 0.0), 1.0), 1) for x in (low, value, high))
    return (
        '<svg viewBox="-4 0 208 14" role="img" style="min-width:8rem" aria-label="interval">'
        '<path d="M0 7H200" stroke="var(--faint)" stroke-width="2"/>'
        f'<path d="M{a} 7H{c}" stroke="var(--series-1)" stroke-width="4"/>'
        f'<circle cx="{b}" cy="7" r="4" fill="var(--series-1)"/></svg>'
    )


def _changes(report: ShipReport) -> str:
    if not report.rows:
        return ""
    mended = sum(row.right[SHIPPED] and not row.right[BEFORE] for row in report.rows)
    broken = sum(row.right[BEFORE] and not row.right[SHIPPED] for row in report.rows)
    return f"<p>Rows that are right now and were wrong before: {mended}; the reverse: {broken}.</p>"


def _by_label(score: Score) -> str:
    if not score.confusion:
        return ""
    given = [
        label
        for label in next(iter(score.confusion.values()))
        if any(row[label] for row in score.confusion.values()) or label in score.confusion
    ]
    rows = [
        [f"<b>{escape(want)}</b>", *(
            f"<b>{counts[label]}</b>" if label == want else str(counts[label] or "·")
            for label in given
        )]
        for want, counts in score.confusion.items()
    ]  # fmt: skip
    header = ["expected", *(escape(label) for label in given)]
    return "<h3>What the file said, by what was expected</h3>" + table(header, rows)


def _by_field(scores: dict[str, Score]) -> str:
    before, shipped = scores[BEFORE].fields, scores[SHIPPED].fields
    if not shipped:
        return ""
    rows = [
        [f"<code>{escape(name)}</code>", f"{before[name].f1:.0%}", f"<b>{one.f1:.0%}</b>",
         f"{one.precision:.0%}", f"{one.recall:.0%}", str(one.count)]
        for name, one in shipped.items()
    ]  # fmt: skip
    header = ["field", "F1 before", "F1 of the file", "precision", "recall", "values"]
    return "<h3>By field</h3>" + table(header, rows)


def _wrong(report: ShipReport) -> str:
    if not report.rows:
        return ""
    header = ["row", "asked", "expected", "the file said", "before"]
    wrong = [_row(row) for row in report.wrong]
    text = "<h2>What the file got wrong</h2>"
    if not wrong:
        text += "<p>Nothing, of the rows that were held out.</p>"
    else:
        text += table(header, wrong[:_MOST_WRONG])
        if len(wrong) > _MOST_WRONG:
            text += f"<p>and {len(wrong) - _MOST_WRONG} more; see the JSON.</p>"
    right = [_row(row) for row in report.rows if row.right[SHIPPED]]
    return text + (details("What it got right", header, right) if right else "")


def _row(row: Asked) -> list[str]:
    said = escape(_short(row.answers[SHIPPED]))
    if row.answers[SHIPPED] != row.answers[AFTER]:
        said += f' <span class="soft">(in float: {escape(_short(row.answers[AFTER]))})</span>'
    asked = "\n".join(str(message["content"]) for message in row.question)
    return [f'<span class="soft">{escape(row.where)}</span>', escape(_short(asked)),
            escape(_short(row.expected)), said, escape(_short(row.answers[BEFORE]))]  # fmt: skip


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _curves(report: ShipReport) -> str:
    facts = report.facts["train"]
    text = f"<h2>Training</h2><p>{escape(facts['verdict'])}</p>"
    try:
        return text + figures([(_curve(facts["history"]), "Loss over the steps: what the model has "
                                "not learned yet. The held-out rows chose nothing.")])  # fmt: skip
    except BackendError:
        return text + f'<p class="soft">The curves need: <code>{escape(INSTALL)}</code>.</p>'


def _curve(history: Sequence[dict[str, float]]) -> str:
    lines = []
    for name, label in (("loss", "rows to learn from"), ("validation_loss", "held-out rows")):
        found = [(record["step"], record[name]) for record in history if name in record]
        if found:
            steps, losses = map(list, zip(*found, strict=True))
            held = name != "loss"
            lines.append(Line(label, steps, losses if held else smoothed(losses), marked=held))
    return plot(lines, "step", "loss, nats a token", logarithmic_y=False)


def _device(report: ShipReport) -> str:
    rows = [[escape(name), escape(value)] for name, value in report.device.items()]
    return "<h2>Size, speed and memory</h2>" + table(["", ""], rows)


def _parity(report: ShipReport) -> str:
    return (
        "<h2>Is the file what was trained?</h2>"
        f"<p>{mark(report.passed)} {escape(report.parity_line)}.</p>"
    )


def _commands(report: ShipReport) -> str:
    file, model = report.file, report.model
    blocks = {
        "On this computer": f'gemma-multi generate -m {file} "..."',
        "On an Android phone, with LiteRT-LM's command line (built for android_arm64)": (
            f"adb push {file} /data/local/tmp/{file.name}\n"
            "adb push litert_lm_main /data/local/tmp/\n"
            "adb shell /data/local/tmp/litert_lm_main --backend=cpu \\\n"
            f"  --model_path=/data/local/tmp/{file.name} --input_prompt='...'"
        ),
        "In a browser: with LiteRT.js, or with Transformers.js": (
            f"gemma-multi export {model} -o web/model.tflite "
            f"--context-length {report.facts['export']['context_length']}\n"
            f"gemma-multi export {model} -o web/onnx --format onnx --precision int8"
        ),
    }
    code = "".join(
        f"<h3>{escape(title)}</h3><pre><code>{escape(text)}</code></pre>"
        for title, text in blocks.items()
    )
    return f"<h2>Run it</h2>{code}"


def _made(report: ShipReport) -> str:
    changes = "".join(f"<li>{escape(how)}</li>" for how in report.modifications)
    took = [[_TITLES[name], f"{seconds:,.1f} s"] for name, seconds in report.seconds.items()]
    train = report.facts["train"]
    facts = [[name, escape(str(train[name]))] for name in ("method", "epochs", "steps", "tokens")]
    facts += [["trained on", escape(f"{train['backend']}, {train['device']}")],
              ["int4", escape(report.facts["quantise"]["how"])]]  # fmt: skip
    return (
        f'<h2>Licence</h2><p>{escape(report.license)}: <a href="{escape(report.license_link)}">'
        f"{escape(report.license_link)}</a>. Who passes the file on passes its NOTICE on, which is "
        f"in it and says what was changed:</p><ul>{changes}</ul>"
        "<h2>How it was made</h2>"
        + table(["", ""], facts)
        + details("How long each stage took", ["stage", ""], took)
    )
