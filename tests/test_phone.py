"""The Android app of the examples: what it asks LiteRT-LM, asked here through the Python package of
the same engine, from the same file of words; and its Kotlin, parsed and linted."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import litert_lm
import pytest
from needs import missing
from other_peoples_files import ktlint

import gemma_multi
from gemma_multi import Model

APP = Path(__file__).parents[1] / "examples" / "android"
SOURCES = APP / "app/src/main/java/com/example/gemma"
ASSET = APP / "app/src/main/assets/assistant.json"
ASSISTANT: dict[str, Any] = json.loads(ASSET.read_text())
CHAT, FUNCTIONS, CLASSIFY = (ASSISTANT[task] for task in ("chat", "functions", "classify"))
GUIDED = litert_lm.LiteRtLmConstraintProviderType.LL_GUIDANCE
MESSAGES = [
    CLASSIFY["suggestion"], "I was charged twice for my lamp.", "I forgot my password!",
    "The screen of my phone stays black.", "Nothing of that kind, only a greeting.",
]  # fmt: skip


def said(message: Any) -> str:
    return "".join(part.get("text", "") for part in message["content"])


class Desktop:
    """LanguageModel.kt in Python, call by call."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.said: list[dict[str, str]] = []
        self.conversation: Any = None

    def chat(self, text: str, stop_after: int | None = None) -> str:
        self.conversation = self.conversation or self.converse(CHAT, said=self.said)
        pieces: list[str] = []
        for piece in self.conversation.send_message_async(text):
            pieces.append(said(piece))
            if len(pieces) == stop_after:
                self.conversation.cancel_process()
        if stop_after:
            self.leave()
        answer = "".join(pieces)
        self.said += [{"role": "user", "content": text}, {"role": "model", "content": answer}]
        return answer

    def leave(self) -> None:
        if self.conversation is not None:
            self.conversation.close()
            self.conversation = None

    def call(self, text: str, result: str) -> tuple[dict[str, Any], str]:
        self.leave()
        with self.converse(FUNCTIONS, system=FUNCTIONS["system"], constrained=True) as open_:
            answer = said(open_.send_message(
                text, response_format=litert_lm.ResponseFormat.json(FUNCTIONS["schema"])
            ))  # fmt: skip
        (call,) = json.loads(answer)
        before = [{"role": "user", "content": text}, {"role": "model", "content": answer}]
        with self.converse(FUNCTIONS, system=FUNCTIONS["system"], said=before) as open_:
            return call, said(open_.send_message(results_of(call["name"], result)))

    def classify(self, text: str) -> str:
        self.leave()
        with self.converse(CLASSIFY, constrained=True) as open_:
            format_ = litert_lm.ResponseFormat.regex(CLASSIFY["pattern"])
            return said(open_.send_message(classified(text), response_format=format_))

    def converse(
        self, task: Mapping[str, Any], *, system: str | None = None,
        said: Sequence[Mapping[str, str]] = (), constrained: bool = False,
    ) -> Any:  # fmt: skip
        # `enable` would bring a second library of grammars along, which knows but Google's
        # vocabulary; Kotlin's enableResponseFormat does not, so it is said afterwards
        config = litert_lm.ConstrainedDecodingConfig(enable=False, provider=GUIDED)
        made = self.engine.create_conversation(
            system_message=system, messages=list(said), max_output_tokens=task["max_tokens"],
            sampler_config=litert_lm.SamplerConfig(**task["sampler"]),
            constrained_decoding_config=config if constrained else None,
        )  # fmt: skip
        if constrained:
            made.constrained_decoding_config = litert_lm.ConstrainedDecodingConfig(provider=GUIDED)
        return made


def results_of(name: str, result: str) -> str:
    told = FUNCTIONS["results"].replace("%name", json.dumps(name))
    return told.replace("%result", json.dumps(result))


def classified(text: str) -> str:
    return CLASSIFY["prompt"].replace("%text", text)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, in which two engines write the same text."""
    path = tmp_path_factory.mktemp("phone") / "model.litertlm"
    gemma_multi.export("storyteller", path, precision="float32", context_length=1024)
    return path


@pytest.fixture(scope="module")
def ours(file: Path) -> Model:
    return gemma_multi.load(file)


@pytest.fixture
def desktop(file: Path, tmp_path: Path) -> Iterator[Desktop]:
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.FATAL)
    with litert_lm.Engine(str(file), cache_dir=str(tmp_path)) as engine:
        desktop = Desktop(engine)
        yield desktop
        desktop.leave()


def test_a_chat_streams_and_a_seed_says_the_same_again(desktop: Desktop) -> None:
    story = desktop.chat(CHAT["suggestion"])
    assert "Pip" in story
    with desktop.converse(CHAT) as again:
        assert said(again.send_message(CHAT["suggestion"])) == story
    assert desktop.classify(MESSAGES[0]) == "shipping"
    assert "Pip" in desktop.chat("Who was the hero?")  # which is told the story again


def test_a_chat_that_was_stopped_goes_on(desktop: Desktop) -> None:
    begun = desktop.chat(CHAT["suggestion"], stop_after=12)
    assert 0 < len(begun) < 120
    assert "Pip" in desktop.chat("Who was the hero?")
    assert [turn["role"] for turn in desktop.said] == ["user", "model"] * 2


def test_a_conversation_that_was_stopped_says_no_more(desktop: Desktop) -> None:
    """Why LanguageModel.kt begins a new one. Should this fail, it need not any more. On a busy
    machine the whole story may be there before it can be stopped."""
    with desktop.converse(CHAT) as conversation:
        whole = said(conversation.send_message(CHAT["suggestion"]))
    for _ in range(20):
        with desktop.converse(CHAT) as conversation:
            told = ""
            for piece in conversation.send_message_async(CHAT["suggestion"]):
                told += said(piece)
                conversation.cancel_process()
            if told != whole:
                with pytest.raises(RuntimeError):
                    conversation.send_message("Who was the hero?")
                return
    pytest.fail("no story was stopped before its end")


def test_a_call_is_valid_and_the_one_that_our_engine_makes(desktop: Desktop, ours: Model) -> None:
    text, result = FUNCTIONS["suggestion"], "a timer runs"
    call, reply = desktop.call(text, result)
    jsonschema.validate([call], FUNCTIONS["schema"])
    messages = [
        {"role": "system", "content": FUNCTIONS["system"]}, {"role": "user", "content": text}
    ]  # fmt: skip
    grammar = f"start: %json {json.dumps(FUNCTIONS['schema'])}"
    answer = ours.generate(messages, grammar=grammar, temperature=0).text
    assert json.loads(answer) == [call]
    messages += [
        {"role": "model", "content": answer},
        {"role": "user", "content": results_of(call["name"], result)},
    ]
    most = FUNCTIONS["max_tokens"]
    assert reply == ours.generate(messages, temperature=0, max_tokens=most).text


def test_functions_are_declared_as_our_chat_declares_them(desktop: Desktop, ours: Model) -> None:
    tools = runpy.run_path(str(APP / "make_assets.py"))["FUNCTIONS"]
    with desktop.converse(FUNCTIONS, system=FUNCTIONS["system"]) as open_:
        told = open_.render_message_to_string(FUNCTIONS["suggestion"])
    chat = ours.chat(tools=tools)
    asked = chat.send(FUNCTIONS["suggestion"], tool_choice="required", temperature=0)
    system = {"role": "system", "content": FUNCTIONS["system"]}
    user = {"role": "user", "content": FUNCTIONS["suggestion"]}
    assert asked.prompt_tokens == len(ours.encode([system, user]))
    assert told == (
        f"<start_of_turn>user\n{FUNCTIONS['system']}\n\n{FUNCTIONS['suggestion']}<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


def test_a_label_is_one_of_those_and_the_one_that_our_engine_gives(
    desktop: Desktop, ours: Model
) -> None:
    labels = [desktop.classify(text) for text in MESSAGES]
    assert labels[:4] == ["shipping", "billing", "account", "technical"]
    assert labels == [
        ours.generate(classified(text), regex=CLASSIFY["pattern"], temperature=0).text
        for text in MESSAGES
    ]


def test_constrained_text_can_hold_no_space(desktop: Desktop) -> None:
    """Why no label and no argument has one. Should this fail, they may."""
    with desktop.converse(CLASSIFY, constrained=True) as open_, pytest.raises(RuntimeError):
        open_.send_message("Yes?", response_format=litert_lm.ResponseFormat.json(
            {"const": "a b", "x-guidance": {"whitespace_flexible": False}}))  # fmt: skip
    assert " " not in CLASSIFY["pattern"]


def test_a_constraint_stays_on_a_conversation(desktop: Desktop) -> None:
    """Why LanguageModel.kt tells results in another. Should this fail, it need not any more."""
    with desktop.converse(CLASSIFY, constrained=True) as open_:
        format_ = litert_lm.ResponseFormat.regex("yes|no")
        assert said(open_.send_message("Is it so?", response_format=format_)) in ("yes", "no")
        assert said(open_.send_message(CHAT["suggestion"])) in ("yes", "no")


def test_the_words_are_those_that_the_script_writes() -> None:
    assert runpy.run_path(str(APP / "make_assets.py"))["assistant"]() == ASSISTANT


def test_kotlin_reads_the_keys_that_are_there_and_has_the_functions() -> None:
    read = set(re.findall(r'get\w+\("(\w+)"\)', (SOURCES / "Assistant.kt").read_text()))
    there = {*ASSISTANT, *CHAT, *FUNCTIONS, *CLASSIFY, *CHAT["sampler"]}
    assert read == there
    code = (SOURCES / "Functions.kt").read_text()
    for one in FUNCTIONS["schema"]["items"]["anyOf"]:
        call = one["properties"]
        (line,) = re.findall(rf'^ +"{call["name"]["const"]}" -> (.+)$', code, re.MULTILINE)
        assert re.findall(r'get\w+\("(\w+)"\)', line) == call["arguments"]["required"]


def test_a_linter_has_nothing_to_say_on_the_kotlin(tmp_path: Path) -> None:
    """And would say it: two broken files stand beside the app."""
    java = shutil.which("java")
    if java is None:
        missing("no Java on the PATH, which ktlint runs on")
    shutil.copytree(APP, tmp_path / "app", ignore=shutil.ignore_patterns("build", ".gradle"))
    for name, text in (("Syntax.kt", "fun a() {"), ("Style.kt", "fun a( ) = 1\n")):
        (tmp_path / "app" / name).write_text(text)
    done = subprocess.run(
        [java, "-jar", str(ktlint()), "--relative", "**/*.kt", "**/*.kts"], cwd=tmp_path / "app",
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    found = set(re.findall(r"^(\S+):\d+:\d+: ", done.stdout, re.MULTILINE))
    assert found == {"Syntax.kt", "Style.kt"}, done.stdout + done.stderr


def test_gradle_files_and_the_manifest_name_what_is_there() -> None:
    catalog = tomllib.loads((APP / "gradle" / "libs.versions.toml").read_text())
    known = {name.replace("-", ".") for name in catalog["libraries"]}
    known |= {f"plugins.{name.replace('-', '.')}" for name in catalog["plugins"]}
    scripts = [(APP / name).read_text() for name in ("build.gradle.kts", "app/build.gradle.kts")]
    assert set(re.findall(r"libs\.([\w.]+)", "".join(scripts))) == known
    used = {one["version"]["ref"] for kind in ("libraries", "plugins")
            for one in catalog[kind].values() if "version" in one}  # fmt: skip
    assert used == set(catalog["versions"])
    android, tools = (
        f"{{http://schemas.android.com/{end}}}" for end in ("apk/res/android", "tools")
    )
    manifest = ET.parse(APP / "app/src/main/AndroidManifest.xml").getroot()
    for activity in manifest.iter("activity"):
        assert (SOURCES / f"{activity.attrib[f'{android}name'].removeprefix('.')}.kt").is_file()
    permissions = {one.attrib[f"{android}name"]: one.attrib.get(f"{tools}node")
                   for one in manifest.iter("uses-permission")}  # fmt: skip
    assert permissions == {
        "com.android.alarm.permission.SET_ALARM": None, "android.permission.INTERNET": "remove"
    }  # fmt: skip
