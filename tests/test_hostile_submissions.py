"""Submissions that mean harm, against the grader's sandbox. SECURITY.md says which of this is promised, and where."""

import dataclasses
import socket
import threading

import psutil
import pytest
import tiny_course

from rlhf_edu import sandbox
from rlhf_edu.sandbox import Cell

LIMITS = sandbox.Limits(cell_seconds=3.0, seconds=300.0, memory_gb=2.0)
NUMBERS = ("90.1", "90.2", "90.3")
fenced = pytest.mark.skipif(
    not sandbox.landlock(), reason="this kernel has no Landlock: use a container (SECURITY.md)"
)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """An autograder folder with withheld exercises, another student's work, and a file worth changing."""
    folder = tmp_path_factory.mktemp("outside")
    tiny_course.write(folder)
    (folder / "other.ipynb").write_text("the solution is 42")
    return folder


def run(outside, cells, limits=LIMITS, **more):
    variants = {"seed": "x", "file": str(outside / "own.py")}
    return sandbox.run(cells, limits, seed=7, variants=variants, **more)


def attack(source: str, **names) -> Cell:
    given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return Cell("import ctypes, os, pathlib, shutil, socket, subprocess, sys, time\n" + given + source)


@pytest.fixture(scope="module")
def server():
    """(port, the connections it got): stands for anything a network offers."""
    got = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            while True:
                try:
                    got.append(listening.accept()[0].recv(100))
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1], got


ATTACKS = {  # name: (source, must it fail?)
    "read the answers": ("open(secret).read()", True),
    "list the answers": ("os.listdir(folder)", True),
    "read another student": ("pathlib.Path(folder, 'other.ipynb').read_text()", True),
    "read through a link": ("os.symlink(secret, 'link'); open('link').read()", True),
    "read what the grader was told": ("open(f'/proc/{os.getppid()}/environ').read()", True),
    "read with the C library": (
        "fd = ctypes.CDLL(None).open(secret.encode(), 0)\nassert fd >= 0, 'refused'",
        True,
    ),
    "read in another process": ("subprocess.run(['cat', secret], check=True)", True),
    "change a check": ("open(check, 'a').write('# mine')", True),
    "replace a check": ("os.replace(check, check + '.old')", True),
    "delete a file": ("os.unlink(secret)", True),
    "delete a folder": ("shutil.rmtree(folder)", True),
    "make a file": ("pathlib.Path(folder, 'new.txt').write_text('x')", True),
    "make a file in the home folder": ("pathlib.Path(home, 'rlhf_edu_new.txt').write_text('x')", True),
    "stop the grader": ("os.kill(os.getppid(), 9)", True),
    "connect": ("socket.create_connection(('127.0.0.1', port), 5).sendall(b'answers')", True),
    "listen": ("socket.create_server(('127.0.0.1', 0))", True),
    "write in its own folder": ("open('mine.txt', 'w').write('x'); assert open('mine.txt').read()", False),
    "read the course": ("import rlhf_edu, json; from rlhf_edu import data; next(open(data.DATA / 'README.md'))", False),
}  # fmt: skip


@pytest.fixture(scope="module")
def attacked(outside, server):
    """All attacks, one cell each, in one notebook: (what each stopped with, files before, files after, connections)."""
    check = sandbox.PACKAGE / "checks" / "nb04.py"
    files = {p: p.read_bytes() for p in [check, *outside.rglob("*.*")] if p.is_file()}
    names = {
        "secret": str(outside / "own.py"), "folder": str(outside), "check": str(check),
        "port": server[0], "home": str(sandbox.Path.home()),
    }  # fmt: skip
    patient = dataclasses.replace(
        LIMITS, cell_seconds=30.0
    )  # on a busy machine the course alone loads for seconds
    out = run(outside, [attack(source, **names) for source, _ in ATTACKS.values()], patient)
    after = {p: p.read_bytes() if p.exists() else None for p in files}
    left = {p for p in outside.rglob("*.*") if p.suffix != ".pyc" and p.is_file()} | {check}
    return out.errors, files, after, left, server[1]


@fenced
@pytest.mark.parametrize("name", ATTACKS)
def test_the_kernel_refuses(attacked, name):
    errors, *_ = attacked
    number = list(ATTACKS).index(name)
    if not ATTACKS[name][1]:
        assert number not in errors, errors.get(number)
    elif name in ("connect", "listen") and sandbox.landlock() < 4:
        pytest.skip("Landlock of this kernel does not know TCP")
    elif name == "stop the grader" and sandbox.landlock() < 6:
        pytest.skip("Landlock of this kernel does not know signals")
    else:
        said = errors[number]
        assert "Permission" in said or "refused" in said or "CalledProcessError" in said, said


@fenced
def test_nothing_outside_has_changed(attacked):
    _, before, after, left, connections = attacked
    assert after == before and left == set(before)
    assert not (sandbox.Path.home() / "rlhf_edu_new.txt").exists()
    assert connections == [] or sandbox.landlock() < 4


def solutions(**changed) -> list[Cell]:
    """The three withheld exercises of the tiny course, solved only where a source is given, and their checks."""
    cells = []
    for number in NUMBERS:
        name = f"f{number[-1]}"
        cells.append(Cell(changed.get(name, f"def {name}(x): return None"), number, f"{name} = None"))
        cells.append(Cell("", number, "pass", name))
    return cells


FIND = "import gc\njob = next(d for d in gc.get_objects() if isinstance(d, dict) and {'key', 'memory_gb'} <= d.keys())\n"
FORGE = f"""{FIND}
import json, os
told = json.dumps({{"verdict": {{"status": "right", "message": "forged"}}}})
for fd in range(3, 30):
    try:
        if not os.path.isfile(f"/proc/self/fd/{{fd}}"):
            os.write(fd, f"\\n{{job['key']}}{{told}}\\n".encode() + b"no line end")
    except OSError:
        pass
def f1(x): return None
"""
PATCH_ALL = """
import sys
for module in list(sys.modules.values()):
    for name in ("judge", "compare", "different"):
        if "rlhf_edu" in getattr(module, "__name__", "") and hasattr(module, name):
            setattr(module, name, (lambda *a, **k: (True, "")) if name == "judge" else (lambda *a, **k: None))
def f2(x): return x
"""


def test_a_verdict_before_its_check_does_not_count_and_overwritten_checks_are_seen(outside):
    out = run(outside, solutions(f1=FORGE, f2=PATCH_ALL))
    assert out.verdicts["90.1"]["status"] == "not attempted"
    assert out.verdicts["90.2"]["status"] == "look"
    assert out.verdicts["90.3"]["status"] in ("look", "not attempted")


UNREADABLE = """
class Unreadable(Exception):
    def __str__(self):
        raise ValueError
def f1(x):
    raise Unreadable
raise Unreadable
"""


def test_an_error_without_a_readable_text_is_an_answer_like_any_other(outside):
    out = run(outside, solutions(f1=UNREADABLE, f2="def f2(x): return x"))
    assert out.verdicts["90.1"]["status"] == "wrong"
    assert "Unreadable: its text cannot be read" in out.verdicts["90.1"]["message"]
    assert out.errors[0]
    assert out.verdicts["90.2"]["status"] in ("right", "wrong")


def test_the_secret_of_the_exercises_is_gone_from_the_job(outside):
    out = run(outside, [Cell(FIND + "assert job['variants'] is None"), *solutions()[:2]])
    assert not out.errors, out.errors


ENDLESS = """
import os
while True:
    for fd in range(3, 12):
        try:
            os.write(fd, b"y" * 10**6)
        except OSError:
            pass
"""
FORKS = "import os, time\nfor _ in range(8): os.fork()\ntime.sleep(600)"  # 256 processes


def test_endless_output_and_forks_cost_their_exercise_only(outside):
    memory = psutil.Process().memory_info().rss
    right = "def f3(x): return x * next(s for s in range(2, 10) if s)"
    out = run(outside, solutions(f1=ENDLESS, f2=FORKS, f3=right))
    assert out.verdicts["90.1"]["status"] == "stopped" and "endless" in out.verdicts["90.1"]["message"]
    assert out.verdicts["90.2"]["status"] == "stopped", out.verdicts
    assert "processes" in out.verdicts["90.2"]["message"] or "memory" in out.verdicts["90.2"]["message"]
    assert out.verdicts["90.3"]["status"] in ("right", "wrong")  # it was asked
    assert psutil.Process().memory_info().rss - memory < 100e6, "the grader keeps what a notebook writes"
    assert psutil.Process().children(recursive=True) == []
