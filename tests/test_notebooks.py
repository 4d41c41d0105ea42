"""Lint of the notebooks, and both editions of each run by the grader: solved scores all, unsolved runs to its end."""

import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from rlhf_edu import checks, editions, grading, sandbox

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [p.stem for p in PATHS]
BOOKS = {p.stem: nbformat.read(p, 4) for p in PATHS}
CHECKED = {
    e.name
    for m in pkgutil.iter_modules(checks.__path__)
    if m.name.startswith("nb")
    for e in importlib.import_module(f"rlhf_edu.checks.{m.name}").EXERCISES
}
HEADING = re.compile(r"(?m)^### Exercise (\d\d\.\d+) · ([★☆]{5}) · (\d+) min · \S")
SPARED = "nd,te,fpr,ans"  # words that codespell takes for typing errors

each = pytest.mark.parametrize("name", NAMES)
needs_nbgrader = pytest.mark.skipif(
    not importlib.util.find_spec("nbgrader"),
    reason="nbgrader makes the student edition: pip install -e '.[instructor]'",
)


def prose(book) -> str:
    return "\n\n".join(c.source for c in book.cells if c.cell_type == "markdown")


def code(book):
    return [c for c in book.cells if c.cell_type == "code"]


def run(*command, **more):
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, check=False, text=True, cwd=ROOT, **more
    )


@each
def test_ruff(name):
    path = f"notebooks/{name}.ipynb"
    found = run("ruff", "check", "--quiet", "--output-format", "concise", path)
    assert found.returncode == 0, found.stdout + found.stderr
    assert run("ruff", "format", "--check", "--quiet", path).returncode == 0, f"run: ruff format {path}"


@each
def test_the_file_is_small_valid_and_free_of_this_machine(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    text = path.read_text(encoding="utf-8")
    nbformat.validate(BOOKS[name])
    assert len(text) < 1.5e6, f"{len(text) / 1e6:.1f} MB"
    assert "widgets" not in BOOKS[name].metadata, "saved widget state: restart, run all, save without it"
    assert set(BOOKS[name].metadata) <= {"kernelspec", "language_info"}
    without_figures = re.sub(r'"image/png": "[^"]*"', "", text)
    found = re.search(
        r"(?<![\w.:/])/(home|root|tmp|work|Users|usr|opt|var|mnt|content)/[\w.]+|\b[A-Z]:\\\\Users",
        without_figures,
    )
    assert not found, f"an absolute path: {found[0]}"


@each
def test_pictures_and_links_need_no_network_and_exist(name):
    text = prose(BOOKS[name])
    assert not re.search(r"!\[[^]]*\]\(\s*https?:|<img[^>]+https?:", text), "a hot-linked picture"
    for target in re.findall(r"\[[^]\n]*\]\(([^)\s#]+)", text):
        if not re.match(r"https?:|mailto:|attachment:", target):
            assert (ROOT / "notebooks" / target).exists(), f"a link to {target}, which does not exist"


@each
def test_cells_were_run_in_order_and_without_a_complaint(name):
    ran = [c for c in code(BOOKS[name]) if c.source.strip()]
    assert [c.execution_count for c in ran] == list(range(1, len(ran) + 1)), "restart the kernel and run all"
    for cell in ran:
        for output in cell.outputs:
            assert output.output_type != "error", (
                f"an error is saved: {output.get('ename')} in {cell.source[:80]}"
            )
            assert output.get("name") != "stderr", f"warnings are saved: {output.text[:200]}"
            assert "Warning" not in str(output.get("text", "")), f"a warning is saved: {output.text[:200]}"


@each
def test_ids_stand_once_and_have_the_form_that_graders_read(name):
    cells = BOOKS[name].cells
    assert len({c.id for c in cells}) == len(cells)
    ids = [editions.grade_id(c) for c in cells if "nbgrader" in c.metadata]
    assert len(set(ids)) == len(ids)
    for identity in ids:
        assert editions.exercise_name(identity), (
            f"{identity} is not like 04-1-dpo-loss or check-04-1-dpo-loss"
        )
        assert editions.exercise_name(identity).startswith(name[:2])
    for cell in cells:
        about = cell.metadata.get("nbgrader", {})
        marked = "### BEGIN SOLUTION" in cell.source
        assert marked == bool(cell.cell_type == "code" and about.get("solution")), cell.source[:80]
        if about.get("solution") and cell.cell_type == "code":
            assert cell.metadata.get("jupyter", {}).get("source_hidden"), f"{about['grade_id']} is not folded"
        if about.get("grade"):
            assert about["points"] > 0 and about["locked"] == (not about["solution"])
        if about.get("grade") and about.get("solution"):
            assert cell.source.startswith("<details>"), f"{about['grade_id']}: the model answer is not folded"


@each
def test_exercises_have_a_heading_minutes_stars_hints_and_a_way_to_grade(name):
    book = BOOKS[name]
    tasks, headings = editions.tasks(book, name), HEADING.findall(prose(book))
    said = [h[0] for h in headings]
    assert sorted(said) == sorted(t.exercise for t in tasks), "headings and graded cells differ"
    assert len(said) == prose(book).count("### Exercise ") >= 4
    assert all(re.fullmatch("★+☆*", stars) for _, stars, _ in headings)
    for part in prose(book).split("### Exercise ")[1:]:
        assert 2 <= part.split("\n## ")[0].count("<details>") <= 4, f"hints of {part[:40]}"
    top = "\n".join(c.source for c in book.cells[:2])
    assert "|" in top and re.search(r"\bminutes?\b", top) and "2 cores" in top, (
        "the card does not say the minutes"
    )
    assert all(exercise in top for exercise in said) or all(e.split(".")[1] in top for e in said)
    unfinished = re.search("TIME_HERE|MINUTES |TODO", prose(book))
    assert not unfinished, unfinished[0]


def test_every_check_has_one_exercise_and_every_exercise_one_check():
    asked = [
        t.exercise for name in NAMES for t in editions.tasks(BOOKS[name], name) if t.expression is not None
    ]
    assert len(set(asked)) == len(asked)
    assert set(asked) == CHECKED


def test_spelling(tmp_path):
    for name in NAMES:
        comments = "\n".join(
            line for c in code(BOOKS[name]) for line in c.source.splitlines() if "#" in line or '"' in line
        )
        (tmp_path / f"{name}.txt").write_text(prose(BOOKS[name]) + "\n" + comments, encoding="utf-8")
    found = run("codespell_lib", f"--ignore-words-list={SPARED}", str(tmp_path))
    assert not found.stdout.strip(), found.stdout.replace(str(tmp_path), "")


@pytest.fixture(scope="module")
def autograder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    editions.make(ROOT / "notebooks", folder / "dist")
    return folder / "dist"


LIMITS = sandbox.Limits(cell_seconds=240.0, seconds=3000.0)


def errors_of(rows_and_more) -> str:
    return json.dumps(rows_and_more["errors"], indent=1)


@needs_nbgrader
@each
def test_the_student_edition_runs_and_scores_nothing(name, autograder):
    masters, settings = grading.load(autograder / "autograder")
    unsolved = grading.grade_one(autograder / "student" / f"{name}.ipynb", masters[name], settings, LIMITS)
    assert not unsolved["errors"], errors_of(unsolved)
    assert {r["status"] for r in unsolved["rows"]} == {"not attempted"}, unsolved["rows"]
    assert sum(r["score"] for r in unsolved["rows"]) == 0


@needs_nbgrader
@each
@pytest.mark.skipif(
    not os.environ.get("RLHF_EDU_GRADE_SOLVED"),
    reason="slow, and nbval runs the same cells: RLHF_EDU_GRADE_SOLVED=1",
)
def test_the_solved_edition_scores_all(name, autograder):
    masters, settings = grading.load(autograder / "autograder")
    solved = grading.grade_one(autograder / "autograder" / f"{name}.ipynb", masters[name], settings, LIMITS)
    assert not solved["errors"], errors_of(solved)
    assert {r["status"] for r in solved["rows"]} <= {"right", "by hand"}, solved["rows"]


@each
def test_saved_checks_say_right(name):
    for cell in BOOKS[name].cells:
        if cell.cell_type == "code" and re.fullmatch(r"check\(\S+, \w+\)", cell.source.strip()):
            text = "".join(str(o.get("data", o).get("text/plain", o.get("text"))) for o in cell.outputs)
            assert "right" in text or cell.source.rstrip(")").endswith("None"), f"{cell.source}: {text}"


@needs_nbgrader
@each
def test_the_student_edition_tells_no_solution(name, autograder):
    student = nbformat.read(autograder / "student" / f"{name}.ipynb", 4)
    text = "\n".join(c.source for c in student.cells)
    for cell in BOOKS[name].cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            told = re.search(r"(?s)### BEGIN SOLUTION\n(.*?)\n\s*### END SOLUTION", cell.source)
            assert (told[1] if told else cell.source) not in text
    assert not any(c.get("outputs") for c in student.cells)


def test_nbval_stops_a_notebook_after_a_failure_and_sees_the_small_scale(tmp_path):
    from nbformat import v4

    shutil.copy(ROOT / "notebooks" / "conftest.py", tmp_path)
    cells = [
        "import os\nassert os.environ['RLHF_EDU_SCALE'] == 'smoke'",
        "# NBVAL_CHECK_OUTPUT\nprint(2)",
        "print(3)",
    ]
    book = v4.new_notebook(cells=[v4.new_code_cell(source) for source in cells])
    book.cells[1].outputs = [v4.new_output("stream", text="1\n")]
    nbformat.write(book, tmp_path / "a.ipynb")
    env = {k: v for k, v in os.environ.items() if k != "RLHF_EDU_SCALE"}
    done = run(
        "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env", str(tmp_path), env=env
    )
    assert "1 failed, 1 passed, 1 skipped" in done.stdout, done.stdout
