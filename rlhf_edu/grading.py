"""Grade a folder of submissions, SUBMISSIONS/<student>/<notebook>.ipynb, by command.

Cells, points and solutions are nbgrader's, and nbgrader's steps make the student edition. Its autograder is not used:
there, a crash or a loop that cannot be interrupted loses the whole notebook, memory has no limit, a stripped or doubled
cell scores 0 without a word, and a check cell, which shows its verdict and never raises, always scores full.
"""

import concurrent.futures
import csv
import dataclasses
import hashlib
import json
import threading
from collections import Counter
from pathlib import Path

from . import editions, sandbox
from .errors import UserError
from .progress import Progress

COLUMNS = ("student", "notebook", "exercise", "score", "max", "status", "feedback")
BY_HAND = ("student", "notebook", "exercise", "max", "score", "text")
DEFAULTS = sandbox.Limits()
LARGEST = 20e6  # bytes of a submission


@dataclasses.dataclass(frozen=True)
class Master:
    """One notebook of the autograder folder: its exercises, and the cells of both editions by grade id."""

    name: str
    tasks: list[editions.Task]
    version: bytes  # of everything that a grade depends on
    cells: dict[
        str, dict
    ]  # grade id -> {"first": first line, "stub": the student edition's source, "id": cell id}


def grade(
    submissions: Path, output: Path, autograder: Path, *, limits=DEFAULTS, jobs: int = 1, quiet=False
) -> dict:
    """Grade what is new, write grades.csv, grades.json, by_hand.csv and a feedback file a student; return the totals."""
    masters, settings = load(autograder)
    found, problems = collect(submissions, masters)
    progress = Progress({f"{s}/{n}": 1.0 for s, n in found}, every=0.0)
    output.mkdir(parents=True, exist_ok=True)
    results, todo, stop = {}, {}, threading.Event()
    for (student, name), path in found.items():
        key = hashlib.sha256(path.read_bytes() + masters[name].version + repr(limits).encode()).hexdigest()
        saved = output / "done" / student / f"{name}.json"
        try:
            results[student, name] = json.loads(saved.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass
        if results.get((student, name), {}).get("key") == key:
            progress.skip(f"{student}/{name}")
        else:
            todo[student, name] = (path, key, saved)
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        work = {
            pool.submit(grade_one, path, masters[name], settings, limits, stop): (student, name)
            for (student, name), (path, _, _) in todo.items()
        }
        for done in concurrent.futures.as_completed(work):
            student, name = work[done]
            _, key, saved = todo[student, name]
            result = results[student, name] = {"key": key} | done.result()
            saved.parent.mkdir(parents=True, exist_ok=True)
            saved.write_text(json.dumps(result, indent=1), encoding="utf-8")
            if not quiet:
                progress.start(f"{student}/{name}")
                counts = Counter(r["status"] for r in result["rows"])
                progress.finish(", ".join(f"{n} {status}" for status, n in counts.items()))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return write(output, masters, results, problems, len(found) - len(todo))


def load(autograder: Path) -> tuple[dict[str, Master], dict]:
    """The masters and the settings of an autograder folder."""
    try:
        settings = json.loads((autograder / "settings.json").read_text(encoding="utf-8"))
        if not isinstance(settings, dict) or "variants" not in settings:
            raise ValueError("it is no settings file")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{autograder} is no autograder folder: make one with python -m rlhf_edu student --output DIST, "
            "and name its autograder folder with --autograder"
        ) from error
    own, package = autograder / "variants.py", sandbox.PACKAGE
    if settings["variants"] and own.exists():
        settings["variants"]["file"] = str(own.resolve())
    masters = {}
    for path in sorted(autograder.glob("*.ipynb")):
        master = editions.read(path)
        student = editions.student_notebook(master)
        cells = {
            editions.grade_id(c): {"first": c.source.split("\n")[0], "stub": s.source, "id": c.get("id")}
            for c, s in zip(master.cells, student.cells, strict=True)
            if editions.exercise_of(c)
        }
        version = hashlib.sha256(json.dumps(settings).encode())
        checks = [package / "checks" / "__init__.py", *sorted(package.glob(f"checks/*{path.stem[:2]}.py"))]
        for file in (path, own, *checks, package / "sandbox.py", package / "variants.py", Path(__file__)):
            version.update(file.read_bytes() if file.exists() else b"")
        tasks = editions.tasks(master, path.name)
        masters[path.stem] = Master(path.stem, tasks, version.digest(), cells)
    return masters, settings


def collect(submissions: Path, masters) -> tuple[dict[tuple[str, str], Path], list[str]]:
    """(student, notebook) -> file, and what was found but cannot be graded."""
    if not submissions.is_dir():
        raise UserError(
            f"{submissions} is no folder: it should hold one folder for each student, with notebooks"
        )
    found, problems = {}, []
    for folder in sorted(p for p in submissions.iterdir() if p.is_dir() and not p.name.startswith(".")):
        for path in sorted(folder.rglob("*.ipynb")):
            where = (folder.name, path.stem)
            if ".ipynb_checkpoints" in path.parts:
                continue
            if path.stem not in masters:
                problems.append(
                    f"{folder.name}: {path.name} is not graded, no notebook of the course has that name"
                )
            elif where in found:
                problems.append(f"{folder.name}: {path.name} is there twice; {found[where]} is graded")
            else:
                found[where] = path
    if not found:
        raise UserError(
            f"{submissions} holds nothing to grade: put files in {submissions}/STUDENT/, named like the notebooks"
        )
    return found, problems


def grade_one(path: Path, master: Master, settings: dict, limits: sandbox.Limits, stop=None) -> dict:
    """One submission: {"rows": one for each exercise, "problems": sentences, "errors", "seconds"}."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"it has more than {LARGEST / 1e6:.0f} MB: clear its outputs")
        notebook = editions.read(path)
        places, problems = find(notebook, master)
    except (UserError, AttributeError, KeyError, TypeError) as error:  # of JSON that is no notebook
        rows = [row(t, None, "unreadable", "this file is no notebook that can be read") for t in master.tasks]
        return {"rows": rows, "problems": [f"unreadable: {error}"], "errors": [], "seconds": 0.0}
    spoilt = {
        t.exercise: " and ".join(f"{i} {wrong}" for i in t.grade_ids if (wrong := _count(places[i])))
        for t in master.tasks
    }
    owner = {at[0]: i for i, at in places.items() if len(at) == 1}
    by_name = {t.exercise: t for t in master.tasks}
    cells, original = [], []
    for at, cell in enumerate(notebook.cells):
        identity = owner.get(at)
        name = editions.exercise_name(identity)
        if cell.cell_type != "code" and not (identity and identity.startswith("check-")):
            continue
        if name in by_name and not spoilt[name]:
            check = by_name[name].expression if identity.startswith("check-") else None
            cells.append(
                sandbox.Cell(cell.source, name, "pass" if check else master.cells[identity]["stub"], check)
            )
        else:
            cells.append(sandbox.Cell(cell.source))
        original.append(at)
    out = sandbox.run(cells, limits, seed=settings["seed"], variants=settings["variants"], stop=stop)
    rows = []
    for task in master.tasks:
        if spoilt[task.exercise]:
            rows.append(row(task, None, "not graded", f"{spoilt[task.exercise]}: not graded yet"))
            problems.append(f"exercise {task.exercise} is not graded, {spoilt[task.exercise]}")
        elif task.expression is None:
            text = notebook.cells[places[task.grade_ids[0]][0]].source
            if text.strip().lower() in ("", editions.TEXT_STUB.lower()):
                rows.append(row(task, 0.0, "not attempted", ""))
            else:
                rows.append(row(task, None, "by hand", "to be graded by hand", text=text))
        else:
            verdict = out.verdicts[task.exercise]
            score = {"right": task.points, "look": None}.get(verdict["status"], 0.0)
            rows.append(row(task, score, verdict["status"], verdict["message"]))
            if verdict["status"] == "look":
                problems.append(f"exercise {task.exercise} is not graded, {verdict['message']}: look at it")
    errors = [{"cell": original[at], "error": text} for at, text in sorted(out.errors.items()) if at >= 0]
    return {"rows": rows, "problems": problems, "errors": errors, "seconds": out.seconds}


def row(task: editions.Task, score: float | None, status: str, feedback: str, **more) -> dict:
    return {
        "exercise": task.exercise,
        "score": score,
        "max": task.points,
        "status": status,
        "feedback": feedback,
    } | more


def find(notebook, master: Master) -> tuple[dict[str, list[int]], list[str]]:
    """Where each grade id stands. A cell that lost its metadata is found by its id or its first line, if one fits."""
    places: dict[str, list[int]] = {i: [] for i in master.cells}
    for at, cell in enumerate(notebook.cells):
        if editions.grade_id(cell) in places:
            places[editions.grade_id(cell)].append(at)
    free = [(at, c) for at, c in enumerate(notebook.cells) if editions.grade_id(c) not in places]
    problems = []
    for identity, known in master.cells.items():
        if not places[identity]:
            fits = [at for at, c in free if c.get("id") == known["id"]] or [
                at for at, c in free if c.cell_type == "code" and c.source.split("\n")[0] == known["first"]
            ]
            if len(fits) == 1:
                places[identity] = fits
                problems.append(f"{identity} had lost its metadata and was found by its place or first line")
    return places, problems


def _count(places: list[int]) -> str:
    if len(places) == 1:
        return ""
    return (
        f"stands in {len(places)} cells, numbers {', '.join(str(p + 1) for p in places)}"
        if places
        else "is missing"
    )


def write(output: Path, masters, results: dict, problems: list[str], kept: int) -> dict:
    """The tables and the feedback; scores given by hand in an earlier by_hand.csv are put in."""
    by_hand, students = scores_by_hand(output / "by_hand.csv"), sorted({s for s, _ in results})
    unused = set(by_hand)
    names, rows, hand = [n for n in masters if any(n == m for _, m in results)], [], []
    for student, name in ((s, n) for s in students for n in names):
        result = results.get((student, name))
        if result is None:
            problems.append(f"{student}: {name} was not handed in")
        parts = result["rows"] if result else [row(t, 0.0, "not handed in", "") for t in masters[name].tasks]
        problems += [f"{student}/{name}: {p}" for p in (result or {}).get("problems", ())]
        for part in parts:
            part = {"student": student, "notebook": name} | part
            if part["status"] == "by hand":
                key = (student, name, *in_words(part["exercise"], part["text"]))
                unused.discard(key)
                if (given := by_hand.get(key)) is not None:
                    if not 0 <= given <= part["max"]:
                        raise UserError(
                            f"{output / 'by_hand.csv'}: {student}, exercise {part['exercise']}: {given:g} is not between "
                            f"0 and {part['max']:g}; correct it and run the command again"
                        )
                    part |= {"score": given, "feedback": "graded by hand"}
                hand.append(part | {"exercise": key[2]})
            rows.append(part)
    totals = {}
    for student in students:
        own = [r for r in rows if r["student"] == student]
        totals[student] = {
            "score": sum(r["score"] or 0.0 for r in own), "max": sum(r["max"] for r in own),
            "open": sum(r["score"] is None for r in own), "status": Counter(r["status"] for r in own),
        }  # fmt: skip
        safe_text(output / "feedback" / f"{student}.md", feedback(student, own, totals[student]))
    save_csv(output / "grades.csv", COLUMNS, rows)
    if unused:
        (output / "by_hand.csv").replace(output / "by_hand.earlier.csv")
        problems += [
            f"{student}/{name}: the score {by_hand[student, name, exercise, text]:g} for {exercise} in by_hand.csv belongs to no "
            "answer of now (was it changed?); it is kept in by_hand.earlier.csv, grade the answer again"
            for student, name, exercise, text in sorted(unused)
        ]
    save_csv(output / "by_hand.csv", BY_HAND, hand, encoding="utf-8-sig")  # which spreadsheets take for UTF-8
    errors = {f"{s}/{n}": r["errors"] for (s, n), r in results.items() if r["errors"]}
    summary = {"totals": totals, "problems": problems, "errors": errors, "kept": kept}
    safe_text(output / "grades.json", json.dumps(summary | {"rows": rows}, indent=1))
    return summary


def scores_by_hand(path: Path) -> dict[tuple, float]:
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            return {
                (r["student"], r["notebook"], *in_words(r["exercise"], r["text"])): float(r["score"])
                for r in csv.DictReader(file)
                if r["score"].strip()
            }
        except (KeyError, ValueError, AttributeError, csv.Error) as error:
            raise UserError(
                f"{path} cannot be read ({error}): a score is a number or nothing, and its columns are {', '.join(BY_HAND)}"
            ) from error


def in_words(exercise: str, text: str) -> tuple[str, str]:
    """Exercise and answer as they survive a spreadsheet, which takes 04.10 for the number 4.1 and changes line ends."""
    return f"exercise {exercise.removeprefix('exercise ')}", " ".join(text.split())


def save_csv(path: Path, columns, rows, encoding="utf-8") -> None:
    with open(path, "w", newline="", encoding=encoding) as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def safe_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def feedback(student: str, rows: list[dict], total: dict) -> str:
    """What the student gets back, in markdown."""
    lines = [f"# {student}", "", f"**{total['score']:g} of {total['max']:g} points**"]
    lines[-1] += f", {total['open']} not graded yet" if total["open"] else ""
    for name in dict.fromkeys(r["notebook"] for r in rows):
        lines += ["", f"## {name}", "", "| exercise | points | | |", "|---|---|---|---|"]
        for r in (r for r in rows if r["notebook"] == name):
            points = f"{'–' if r['score'] is None else format(r['score'], 'g')} / {r['max']:g}"
            said = " ".join(r["feedback"].split()).replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| {r['exercise']} | {points} | {r['status']} | {said} |")
    return "\n".join(lines) + "\n"
