"""Two editions from one source: nothing of a solution is left in the student's, and it needs no nbgrader."""

import json
import random
import sys

import nbformat
import pytest
import tiny_course

from rlhf_edu import __main__ as command_line
from rlhf_edu import checks, editions, variants

nbgrader = pytest.importorskip(
    "nbgrader", reason="nbgrader makes the student edition: pip install -e '.[instructor]'"
)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("editions")
    masters, own = tiny_course.write(folder)
    editions.make(masters, folder / "dist", variant_seed="term 1", variants_file=own)
    return folder / "dist"


def test_the_student_edition_has_stubs_and_nothing_of_a_solution(dist):
    for path in sorted((dist / "student").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        for told in ("BEGIN SOLUTION", "END SOLUTION", "return ", "Because of 42", "the answer is 42"):
            assert told not in text, f"{path.name}: {told}"
        book = nbformat.read(path, 4)
        nbformat.validate(book)
        assert not any(c.get("outputs") or c.get("execution_count") for c in book.cells)
        for cell in book.cells:
            about = cell.metadata.get("nbgrader", {})
            if about.get("solution"):
                assert "jupyter" not in cell.metadata and "tags" not in cell.metadata  # unfolded
                assert editions.STUB in cell.source or cell.source == editions.TEXT_STUB
            if about.get("locked"):
                assert cell.metadata["editable"] is False and cell.metadata["deletable"] is False


def test_stubs_run_and_give_none(dist):
    book, names = nbformat.read(dist / "student" / "90_withheld.ipynb", 4), {}
    for cell in book.cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
    assert names["f1"](1) is None and names["f3"](1) is None


def test_the_autograder_keeps_solutions_points_and_ids(dist):
    book = editions.read(dist / "autograder" / "90_withheld.ipynb")
    found = editions.tasks(book)
    assert [(t.exercise, t.points, t.expression) for t in found] == [
        (f"90.{i}", 2.0, f"f{i}") for i in (1, 2, 3)
    ]
    assert found[0].grade_ids == ("90-1-withheld", "check-90-1-withheld")
    (by_hand,) = editions.tasks(editions.read(dist / "autograder" / "91_tiny.ipynb"))
    assert by_hand.expression is None and by_hand.points == 2.0
    settings = json.loads((dist / "autograder" / "settings.json").read_text())
    assert settings["seed"] != 0 and settings["variants"] == {"seed": "term 1"}
    for path in (dist / "student").iterdir():
        assert "term 1" not in path.read_text(encoding="utf-8") and path.suffix == ".ipynb"


def test_one_command_makes_both_and_makes_them_again(tmp_path, monkeypatch, capsys):
    masters, _ = tiny_course.write(tmp_path)
    arguments = ["student", "--notebooks", str(masters), "--output", str(tmp_path / "dist")]
    assert command_line.main(arguments) == 0 and "1 notebooks to hand out" in capsys.readouterr().out
    assert command_line.main(arguments) == 0
    assert sorted(p.name for p in (tmp_path / "dist").rglob("*.*")) == ["91_tiny.ipynb"] * 2 + [
        "settings.json"
    ]
    (tmp_path / "mine" / "student").mkdir(parents=True)
    assert command_line.main([*arguments[:-1], str(tmp_path / "mine")]) == 1
    assert "not made by this command" in capsys.readouterr().err
    assert command_line.main(["student", "--notebooks", str(tmp_path / "none"), "--output", "x"]) == 1
    assert command_line.main([*arguments, "--variants", str(tmp_path / "own.py")]) == 1
    assert "--variant-seed" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "nbgrader", None)
    assert command_line.main(arguments) == 1 and "[instructor]" in capsys.readouterr().err


def test_what_is_wrong_with_a_master_is_one_sentence(tmp_path, one_sentence):
    book = tiny_course.public_notebook()
    cell = tiny_course.graded(
        nbformat.v4.new_code_cell("x = 1\ncheck('91.2', x)"), "check-91-2-x", grade=True, points=1
    )
    book.cells.append(cell)
    with one_sentence("91.2", "one line"):
        editions.tasks(book, "a.ipynb")
    book.cells[-1] = tiny_course.graded(
        nbformat.v4.new_code_cell("### BEGIN SOLUTION\n"), "91-2-x", solution=True
    )
    with one_sentence("student edition"):
        editions.student_notebook(book)
    (tmp_path / "a.ipynb").write_text("{}")
    with one_sentence("a.ipynb"):
        editions.read(tmp_path / "a.ipynb")
    (tmp_path / "own.py").write_text("1 / 0")
    with one_sentence("own.py", "ZeroDivisionError"):
        variants.load("x", str(tmp_path / "own.py"))


@pytest.mark.parametrize("secret", [f"term {i}" for i in range(20)])
def test_withheld_exercises_are_right_whatever_the_secret(secret):
    """Their solutions pass, their mistakes are refused, and unsolved ones are called not attempted."""
    book, found = variants.notebook(secret), variants.load(secret)
    sources = {editions.grade_id(c): c.source for c in book.cells}
    for variant in found:
        task, names = variant.exercise, {}
        exec("import math, torch\n" + sources[f"{task.name.replace('.', '-')}-withheld"], names)
        assert checks.judge(task, names[variant.answer], 1)[0] is True, task.name
        for mistake in task.mistakes:
            passed, message = checks.judge(task, mistake.answer, 1)
            assert passed is False and message == mistake.hint, f"{task.name}: {message}"
        assert checks.judge(task, None)[0] is None
    assert 3 <= len(found) <= 7


def test_another_secret_draws_other_exercises():
    texts = {secret: [v.statement for v in variants.load(secret)] for secret in ("a", "b", "c", "d")}
    assert texts["a"] == [v.statement for v in variants.load("a")]
    for number in range(len(texts["a"])):
        assert len({texts[s][number] for s in texts}) > 1
    assert random.Random("rlhf_edu a").random() != random.Random("rlhf_edu b").random()
