"""Stages: what is done is not done again, what was begun goes on, what has changed begins anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_multi import CheckpointError, OptionError
from gemma_multi.shipping.asking import Answers
from gemma_multi.shipping.journal import Journal, Stage


class Killed(BaseException):
    """Stands for `kill -9`: nothing after it runs."""


class Way:
    """Three stages: the second reads the first's file, the third is independent of the second."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.ran = directory, list[str]()
        self.dies_in = ""

    def go(self, rows: str = "rows", rate: float = 1.0) -> list[str]:
        """What each stage was, as it was said."""
        self.ran, said = [], list[str]()
        stages = [
            Stage("rows", "", self.stage("rows", "rows.txt"), (), {"rows": rows}, ("rows.txt",)),
            Stage("train", "", self.stage("train", "run"), ("rows",), {"rate": rate}, ("run",)),
            Stage("ask", "", self.stage("ask", "answers"), ("rows",), None, ("answers",)),
        ]  # fmt: skip
        journal = Journal(self.directory)
        journal.pass_through(stages, lambda i, title, how: said.append(how))
        assert [journal.facts(s.name)["lines"] for s in stages] == [
            len((self.directory / s.leaves[0]).read_text().splitlines()) for s in stages
        ]
        return said

    def stage(self, name: str, file: str) -> Callable[[bool], dict[str, Any]]:
        def run(goes_on: bool) -> dict[str, Any]:
            path = self.directory / file
            assert goes_on or not path.exists()
            with path.open("a") as out:
                out.write("a line\n")
            if self.dies_in == name:
                raise Killed
            self.ran.append(name)
            return {"lines": len(path.read_text().splitlines())}

        return run


def test_a_killed_stage_goes_on_and_finished_ones_are_left_alone(tmp_path: Path) -> None:
    way = Way(tmp_path)
    way.dies_in = "train"
    with pytest.raises(Killed):
        way.go()
    way.dies_in = ""
    assert way.go() == ["was done", "goes on", "begins"]
    assert way.ran == ["train", "ask"]
    assert (tmp_path / "run").read_text() == "a line\n" * 2  # what it had written was there
    assert way.go() == ["was done"] * 3


def test_what_has_changed_begins_anew_with_all_that_follows(tmp_path: Path) -> None:
    way = Way(tmp_path)
    assert way.go() == ["begins"] * 3
    assert way.go(rate=2.0) == ["was done", "begins", "was done"]
    assert way.go(rows="others", rate=2.0) == ["begins"] * 3
    assert (tmp_path / "run").read_text() == "a line\n"


def test_a_begun_stage_whose_rows_changed_begins_anew(tmp_path: Path) -> None:
    way = Way(tmp_path)
    way.dies_in = "train"
    with pytest.raises(Killed):
        way.go()
    way.dies_in = ""
    assert way.go(rows="others") == ["begins"] * 3


def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="exists already"):
        Journal.check(tmp_path)
    (tmp_path / "ship.json").write_text("{")
    Journal.check(tmp_path)
    with pytest.raises(CheckpointError, match=r"ship\.json: not valid JSON"):
        Journal(tmp_path)


def test_answers_go_on_after_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"answer": "yes"}\n{"answer": "n')
    answers = Answers(path)
    assert answers.texts == ["yes"]
    answers.keep([{"answer": "no"}])
    assert [json.loads(line)["answer"] for line in path.read_text().splitlines()] == ["yes", "no"]
    assert Answers(path).texts == ["yes", "no"]
