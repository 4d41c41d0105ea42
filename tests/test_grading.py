"""Grading by command: a submission can cost only its own student points, and no point is lost without a word."""

import csv
import json
import os
import re
import shutil
import time

import nbformat
import pandas as pd
import psutil
import pytest
import tiny_course

from rlhf_edu import __main__ as command_line
from rlhf_edu import editions, grading, sandbox

pytest.importorskip("nbgrader", reason="nbgrader makes the student edition: pip install -e '.[instructor]'")

LIMITS = sandbox.Limits(cell_seconds=6.0, seconds=600.0, memory_gb=2.0)
NAME = "90_withheld"


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    masters, own = tiny_course.write(folder)
    editions.make(masters, folder / "dist", variant_seed="x", variants_file=own)
    return folder / "dist"


def cell_of(book, grade_id):
    return next(c for c in book.cells if editions.grade_id(c) == grade_id)


def hand_in(course, folder, student, *, edition="student", change=None, **solutions):
    """A submission with these sources in place of solution cells; None: the right one."""
    book = editions.read(course / edition / f"{NAME}.ipynb")
    solved = editions.read(course / "autograder" / f"{NAME}.ipynb")
    for name, source in solutions.items():
        identity = f"90-{name[1:]}-withheld"
        cell_of(book, identity).source = cell_of(solved, identity).source if source is None else source
    if change:
        change(book)
    (folder / student).mkdir(parents=True)
    nbformat.write(book, folder / student / f"{NAME}.ipynb")


def rows_of(output):
    with open(output / "grades.csv", newline="", encoding="utf-8") as file:
        return {(r["student"], r["exercise"]): r for r in csv.DictReader(file)}


def cheat(book):
    """Puts in place of `check` and of the module's parts what always agrees; changes points and the check cell."""
    cell_of(book, "check-90-1-withheld").source = "print('passed')"
    cell_of(book, "check-90-1-withheld").metadata["nbgrader"]["points"] = 100.0
    source = "import rlhf_edu.checks as c\nc.judge = c.compare = lambda *a, **k: (True, '')\ncheck = c.check = print"
    book.cells.insert(2, nbformat.v4.new_code_cell(source))


@pytest.fixture(scope="module")
def graded(course, tmp_path_factory):
    """One run of the command over a class in which everything happens."""
    class_, output = tmp_path_factory.mktemp("class"), tmp_path_factory.mktemp("out") / "grades"
    loop = "def f1(x):\n    while True:\n        try:\n            1 / 0\n        except BaseException:\n            pass"
    crash = "def f2(x):\n    import ctypes\n    ctypes.string_at(0)"
    hog = "def f1(x):\n    return x.new_zeros(4 * 10**9).sum()"
    stray = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(987)'], start_new_session=True)\n"
    noise = "import os\nfor _ in range(300): print('x' * 10**6)\nos.write(1, b'y' * 10**6)\nos.fork()\n"
    hand_in(course, class_, "solved", edition="autograder")
    hand_in(course, class_, "unsolved")
    hand_in(course, class_, "loop and crash", f1=loop, f2=crash, f3=None)
    hand_in(course, class_, "hog and exit", f1=hog, f2=stray + "import os\nos._exit(0)", f3=None)
    hand_in(course, class_, "noisy", f1=noise + "def f1(x):\n    return input()", f2=None, f3="def f3(x:\n")
    hand_in(course, class_, "cheat", change=cheat, f1="def f1(x):\n    return 3.0 * x + 1", f2=None)
    patch = "import numpy\nnumpy.allclose = lambda *a, **k: True\n"
    hand_in(course, class_, "patch", f1=patch + "def f1(x):\n    return x + 1")
    answers = editions.read(course / "student" / "91_tiny.ipynb")
    nbformat.write(answers, class_ / "unsolved" / "91_tiny.ipynb")
    cell_of(answers, "91-1-why").source = "- because | of <b>it</b>"
    nbformat.write(answers, class_ / "solved" / "91_tiny.ipynb")
    (class_ / "solved" / "90_withheld (1).ipynb").write_text("{}")
    (class_ / "broken").mkdir()
    (class_ / "broken" / f"{NAME}.ipynb").write_text("no notebook")
    summary = grading.grade(class_, output, course / "autograder", limits=LIMITS, jobs=2)
    return class_, output, summary


def test_solved_scores_all_and_unsolved_nothing(graded):
    _, output, summary = graded
    rows = rows_of(output)
    for i in (1, 2, 3):
        assert rows["solved", f"90.{i}"]["score"] == "2.0" and rows["solved", f"90.{i}"]["status"] == "right"
        assert rows["unsolved", f"90.{i}"]["status"] == "not attempted"
    assert summary["totals"]["solved"]["score"] == 6 and summary["totals"]["solved"]["open"] == 1
    assert summary["totals"]["unsolved"] == {"score": 0, "max": 8, "open": 0, "status": {"not attempted": 4}}


def test_loops_crashes_and_hogs_cost_their_exercise_only(graded):
    _, output, _ = graded
    rows = rows_of(output)
    said = {key: (r["score"], r["status"], r["feedback"]) for key, r in rows.items()}
    assert (
        said["loop and crash", "90.1"][:2] == ("0.0", "stopped")
        and "endless" in said["loop and crash", "90.1"][2]
    )
    assert (
        said["loop and crash", "90.2"][:2] == ("0.0", "stopped")
        and "SIGSEGV" in said["loop and crash", "90.2"][2]
    )
    assert said["loop and crash", "90.3"][:2] == ("2.0", "right")
    assert said["hog and exit", "90.1"][0] == "0.0" and "emory" in said["hog and exit", "90.1"][2]
    assert said["hog and exit", "90.2"][1] == "stopped" and "ended" in said["hog and exit", "90.2"][2]
    assert said["hog and exit", "90.3"][:2] == ("2.0", "right")
    assert said["noisy", "90.1"][1] == "wrong" and said["noisy", "90.2"][:2] == ("2.0", "right")
    assert "SyntaxError" in said["noisy", "90.3"][2] and "not defined" in said["noisy", "90.3"][2]


@pytest.mark.skipif(os.name != "posix", reason="looks for processes as Linux and macOS name them")
def test_nothing_is_left_running(graded):
    def stray(process):
        try:
            return "time.sleep(987)" in " ".join(process.cmdline())
        except psutil.Error:
            return False

    time.sleep(0.5)
    assert not [p for p in psutil.process_iter() if stray(p)]


def test_edited_checks_and_patches_gain_nothing(graded):
    _, output, summary = graded
    rows = rows_of(output)
    assert rows["cheat", "90.1"]["status"] == "wrong" and rows["cheat", "90.1"]["max"] == "2.0"
    assert rows["cheat", "90.2"]["status"] == "right"
    assert rows["patch", "90.1"]["status"] == "look" and rows["patch", "90.1"]["score"] == ""
    assert any("patch" in p and "look" in p for p in summary["problems"])


def test_what_cannot_be_graded_is_said(graded):
    _, output, summary = graded
    said = "\n".join(summary["problems"])
    assert "90_withheld (1).ipynb" in said and "broken/90_withheld: unreadable" in said
    assert "noisy: 91_tiny was not handed in" in said
    assert {r["status"] for k, r in rows_of(output).items() if k[0] == "broken"} == {
        "unreadable",
        "not handed in",
    }


def test_feedback_and_json_say_the_same(graded):
    _, output, summary = graded
    saved = json.loads((output / "grades.json").read_text(encoding="utf-8"))
    assert len(saved["rows"]) == len(rows_of(output)) == 8 * 4
    assert set(saved["rows"][0]) >= set(grading.COLUMNS)
    text = (output / "feedback" / "loop and crash.md").read_text(encoding="utf-8")
    assert "**2 of 8 points**" in text and "| 90.1 | 0 / 2 | stopped |" in text
    assert saved["totals"].keys() == summary["totals"].keys() and saved["errors"]["noisy/90_withheld"]


def test_scores_by_hand_are_put_in_and_nothing_is_graded_twice(graded, course, one_sentence):
    class_, output, _ = graded
    began, path = time.monotonic(), output / "by_hand.csv"
    with open(path, newline="", encoding="utf-8-sig") as file:
        (answer,) = csv.DictReader(file)
    assert (
        answer["student"] == "solved"
        and answer["text"] == "- because | of <b>it</b>"
        and answer["score"] == ""
    )
    for score, total in (("1.5", 7.5), ("9", None), ("good", None)):
        grading.save_csv(path, grading.BY_HAND, [answer | {"score": score}])
        if total is None:
            with one_sentence("by_hand.csv"):
                grading.grade(class_, output, course / "autograder", limits=LIMITS)
            continue
        again = grading.grade(class_, output, course / "autograder", limits=LIMITS)
        assert again["kept"] == 10 and again["totals"]["solved"]["score"] == total
        assert again["totals"]["solved"]["open"] == 0
        assert rows_of(output)["solved", "91.1"]["score"] == score
    assert time.monotonic() - began < 60  # no process was started


def test_scores_by_hand_survive_a_spreadsheet(graded, course, tmp_path):
    """Which reads 91.10 as a number, ends lines in its own way and may drop the spaces at a text's end."""
    class_, output, _ = graded
    path = tmp_path / "out" / "by_hand.csv"
    shutil.copytree(output, tmp_path / "out")
    table = pd.read_csv(path, encoding="utf-8-sig")
    assert table["exercise"].tolist() == ["exercise 91.1"]
    table["score"], table["text"] = 1.5, table["text"] + " \r\n"
    table.to_csv(path, index=False)
    again = grading.grade(class_, tmp_path / "out", course / "autograder", limits=LIMITS)
    assert again["totals"]["solved"]["score"] == 7.5 and not any("by_hand" in p for p in again["problems"])
    table["exercise"] = 91.1  # of a file that stood there before
    table.to_csv(path, index=False)
    assert (
        grading.grade(class_, tmp_path / "out", course / "autograder", limits=LIMITS)["totals"]["solved"][
            "score"
        ]
        == 7.5
    )
    table["text"] = "another answer"
    table.to_csv(path, index=False)
    lost = grading.grade(class_, tmp_path / "out", course / "autograder", limits=LIMITS)
    assert lost["totals"]["solved"]["open"] == 1 and any(
        "by_hand.earlier.csv" in p and "1.5" in p for p in lost["problems"]
    )
    assert pd.read_csv(tmp_path / "out" / "by_hand.earlier.csv")["score"].tolist() == [1.5]


def test_each_grade_id_stands_once_or_is_named(course, tmp_path):
    """A doubled and a missing cell are named and not scored; cells that lost their metadata are found again."""

    def spoil(book):
        first = cell_of(book, "90-1-withheld")
        book.cells.insert(1, nbformat.v4.new_code_cell(first.source, metadata=first.metadata))
        book.cells.remove(cell_of(book, "check-90-2-withheld"))

    def strip(book):
        for cell in book.cells:
            cell.metadata = {}
            cell.id = nbformat.v4.new_code_cell().id

    hand_in(course, tmp_path / "in", "spoilt", change=spoil, f1=None, f2=None, f3=None)
    hand_in(course, tmp_path / "in", "stripped", edition="autograder", change=strip)
    summary = grading.grade(tmp_path / "in", tmp_path / "out", course / "autograder", limits=LIMITS, jobs=2)
    said, rows = "\n".join(summary["problems"]), rows_of(tmp_path / "out")
    assert re.search(r"spoilt.*90\.1 is not graded.*90-1-withheld stands in 2 cells", said)
    assert re.search(r"spoilt.*90\.2 is not graded.*check-90-2-withheld is missing", said)
    assert [rows["spoilt", f"90.{i}"]["score"] for i in (1, 2, 3)] == ["", "", "2.0"]
    assert summary["totals"]["stripped"]["score"] == 6 and "had lost its metadata" in said


def test_the_whole_notebook_has_a_limit(course, tmp_path):
    hand_in(course, tmp_path / "in", "slow", f1=None, f2="import time\ntime.sleep(500)", f3=None)
    limits = sandbox.Limits(cell_seconds=300.0, seconds=20.0)
    began = time.monotonic()
    grading.grade(tmp_path / "in", tmp_path / "out", course / "autograder", limits=limits)
    rows = rows_of(tmp_path / "out")
    assert time.monotonic() - began < 120 and rows["slow", "90.2"]["status"] == "stopped"
    assert "not reached" in rows["slow", "90.3"]["feedback"]


def test_the_command_says_what_it_needs(course, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    ask = ["grade", "--output", str(tmp_path / "out"), "--autograder"]
    assert command_line.main([*ask, str(tmp_path), str(tmp_path / "empty")]) == 1
    assert "no autograder folder" in capsys.readouterr().err
    assert command_line.main([*ask, str(course / "autograder"), str(tmp_path / "empty")]) == 1
    assert "nothing to grade" in capsys.readouterr().err
    assert command_line.main([*ask, str(course / "autograder"), str(tmp_path / "none")]) == 1
    assert "no folder" in capsys.readouterr().err


def test_the_command_grades(course, tmp_path, capsys):
    hand_in(course, tmp_path / "in", "ada", f1=None)
    ask = [
        "grade",
        str(tmp_path / "in"),
        "--output",
        str(tmp_path / "out"),
        "--autograder",
        str(course / "autograder"),
    ]
    assert command_line.main(ask) == 0
    assert re.search(r"ada +2 of 6", capsys.readouterr().out)
    assert command_line.main(ask) == 0 and "1 were graded before" in capsys.readouterr().out
