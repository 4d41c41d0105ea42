"""Two editions from one source: the notebooks with solutions, and what students get.

The masters carry nbgrader's cell metadata, and nbgrader's own steps take the solutions out. What they make runs
anywhere, without nbgrader.
"""

import ast
import copy
import dataclasses
import json
import re
import secrets
import shutil
import warnings
import zlib
from pathlib import Path

from . import variants
from .errors import UserError, explained

STUB, TEXT_STUB = "...  # your code here", "Your answer here"
GRADE_ID = re.compile(r"(check-)?(\d\d)-(\d+)-[a-z0-9-]+")  # check-04-1-dpo-loss belongs to exercise 04.1
WITHHELD = "90_withheld"


@dataclasses.dataclass(frozen=True)
class Task:
    """An exercise as it stands in a notebook: its cells, and how it is graded."""

    exercise: str  # "04.1"
    points: float
    grade_ids: tuple[str, ...]
    expression: str | None  # what its check cell asks of the checks; None: graded by hand


def read(path: Path):
    import nbformat

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of cells without an id, which older tools write
            return nbformat.read(path, as_version=4)
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        RecursionError,
        nbformat.ValidationError,
    ) as error:
        raise UserError(f"{path} is no notebook that can be read: {str(error)[:120]}") from error


def grade_id(cell) -> str | None:
    about = cell.metadata.get("nbgrader")
    found = about.get("grade_id") if isinstance(about, dict) else None
    return found if isinstance(found, str) else None


def exercise_name(identity: str | None) -> str | None:
    found = GRADE_ID.fullmatch(identity or "")
    return f"{found[2]}.{found[3]}" if found else None


def exercise_of(cell) -> str | None:
    return exercise_name(grade_id(cell))


def tasks(master, where: str = "a notebook") -> list[Task]:
    """The graded exercises of a notebook, in its order."""
    found: dict[str, dict] = {}
    for cell in master.cells:
        if not (name := exercise_of(cell)):
            continue
        about = cell.metadata["nbgrader"]
        task = found.setdefault(name, {"points": None, "ids": [], "expression": None})
        task["ids"].append(about["grade_id"])
        if about.get("grade"):
            if task["points"] is not None:
                raise UserError(f"{where}: exercise {name} is graded in two cells; one is allowed")
            task["points"] = float(about["points"])
            task["expression"] = None if about.get("solution") else asked(cell.source, name, where)
    return [
        Task(name, t["points"], tuple(t["ids"]), t["expression"])
        for name, t in found.items()
        if t["points"] is not None
    ]


def asked(source: str, name: str, where: str) -> str:
    """`check("04.1", answer)` -> "answer"."""
    try:
        call = ast.parse(source, mode="eval").body
        if (
            call.func.id == "check"
            and call.args[0].value == name
            and len(call.args) == 2
            and not call.keywords
        ):
            return ast.unparse(call.args[1])
    except (SyntaxError, AttributeError, IndexError):
        pass
    raise UserError(
        f'{where}: the check cell of exercise {name} must be the one line check("{name}", answer)'
    )


def student_notebook(master):
    """The same notebook with stubs for solutions, and without outputs: below a prediction, they would answer it."""
    try:
        from nbgrader import preprocessors as steps
        from traitlets.config import Config
    except ModuleNotFoundError as error:
        raise UserError(
            "nbgrader makes the student edition and is missing: pip install -c constraints.txt -e '.[instructor]'"
        ) from error

    notebook = copy.deepcopy(master)
    config = Config({"ClearSolutions": {"code_stub": {"python": STUB}, "text_stub": TEXT_STUB}})
    names = "LockCells ClearSolutions ClearOutput CheckCellMetadata ComputeChecksums ClearHiddenTests"
    with explained("the student edition", "correct the master notebook's cells or their nbgrader metadata"):
        for name in names.split():
            notebook, _ = getattr(steps, name)(config=config).preprocess(notebook, {})
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for key in ("execution", "collapsed", "scrolled"):
            cell.metadata.pop(key, None)
        if cell.metadata.get("nbgrader", {}).get("solution"):  # folded for self-learners, open for students
            cell.metadata.pop("jupyter", None)
            cell.metadata.pop("tags", None)
    return notebook


def make(
    masters: Path, output: Path, *, variant_seed: str | None = None, variants_file: Path | None = None
) -> str:
    """Write output/student, to hand out, and output/autograder, which `grade` reads; return what was made."""
    import nbformat

    paths = sorted(masters.glob("*.ipynb"))
    if not paths:
        raise UserError(
            f"{masters} holds no notebooks: run this in the course's folder, or name one with --notebooks"
        )
    books = {p.stem: read(p) for p in paths}
    settings = {"seed": secrets.randbelow(2**31), "variants": None}
    if variant_seed:
        settings = {"seed": zlib.crc32(f"checks {variant_seed}".encode()), "variants": {"seed": variant_seed}}
        books[WITHHELD] = variants.notebook(variant_seed, variants_file)
    elif variants_file:
        raise UserError("--variants needs --variant-seed SECRET, from which the numbers are drawn")
    for name, book in books.items():
        tasks(book, name)
    ours = (output / "autograder" / "settings.json").exists()
    for folder in (output / "student", output / "autograder"):
        if folder.exists() and not ours:
            raise UserError(
                f"{folder} is there and was not made by this command: name another folder with --output"
            )
    students = {name: student_notebook(book) for name, book in books.items()}
    for folder in (output / "student", output / "autograder"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    (output / "autograder" / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    for name, book in books.items():
        student = students[name]
        if name == WITHHELD:
            variants.hide_checks(student)
        nbformat.write(student, output / "student" / f"{name}.ipynb")
        nbformat.write(book, output / "autograder" / f"{name}.ipynb")
    if variants_file:
        shutil.copy(variants_file, output / "autograder" / "variants.py")
    return f"{output / 'student'}: {len(books)} notebooks to hand out. Keep {output / 'autograder'}: it has the solutions."
