"""The set-up cell: the same in every notebook, and tried in an environment that mimics Colab.

That environment is a virtual environment which sees the torch and the libraries that run these tests, with a
`google.colab` to import and no course in it. No test needs the network.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_edu import colab
from rlhf_edu.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIBRARIES = Path(torch.__file__).resolve().parent.parent


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# --- one cell, in one place ---


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_set_up_cell_is_the_stamped_one(path):
    found = colab.setup_of(read(path))
    assert found and "".join(found["source"]) == colab.setup_cell(), "run: python -m rlhf_edu stamp"


def small_course(folder: Path, repository="https://github.com/OWNER/rlhf_edu", dependencies=()) -> Path:
    """A course of a few lines with the real `colab`."""
    package = folder / "rlhf_edu"
    (package / "checks").mkdir(parents=True)
    shutil.copy(ROOT / "rlhf_edu" / "colab.py", package)
    shutil.copy(ROOT / "rlhf_edu" / "errors.py", package)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("print('the course runs')")
    (package / "lesson.py").write_text("def start(seed): return 'a small world'")
    (package / "checks" / "__init__.py").write_text("check = None")
    (folder / "LICENSE").write_text("free")
    (folder / "pyproject.toml").write_text(
        f"[project]\ndependencies = {list(dependencies)!r}\n[project.urls]\nRepository = {repository!r}\n"
    )
    for name in ("data", "notebooks"):
        (folder / name).mkdir()
        (folder / name / "one.txt").write_text(name)
    return folder


def test_a_stamp_changes_the_set_up_and_nothing_else(tmp_path):
    fork = small_course(tmp_path / "fork", repository="https://example.org/someone/fork.git")
    name = NOTEBOOKS[0].name
    shutil.copy(NOTEBOOKS[0], fork / "notebooks")
    before = read(NOTEBOOKS[0])
    assert colab.stamp(fork / "notebooks", fork) == [name]
    after = read(fork / "notebooks" / name)
    assert "https://example.org/someone/fork.git" in "".join(colab.setup_of(after)["source"])
    text = (fork / "notebooks" / name).read_bytes()
    assert colab.stamp(fork / "notebooks", fork) == []
    expected = copy.deepcopy(before)
    colab.setup_of(expected)["source"] = colab.setup_of(after)["source"]
    assert after == expected and any(c.get("outputs") for c in after["cells"])
    assert colab.stamp(fork / "notebooks", ROOT) == [name]
    assert (fork / "notebooks" / name).read_bytes() == NOTEBOOKS[0].read_bytes() != text


def test_a_notebook_without_a_set_up_cell_is_named(tmp_path, one_sentence):
    cell = {"cell_type": "code", "source": ["1 + 1"], "outputs": []}
    (tmp_path / "own.ipynb").write_text(json.dumps({"cells": [cell]}))
    with one_sentence("own.ipynb"):
        colab.stamp(tmp_path, ROOT)
    (tmp_path / "own.ipynb").write_text("no notebook")
    with one_sentence("own.ipynb"):
        colab.stamp(tmp_path, ROOT)
    with one_sentence("no notebooks"):
        colab.stamp(tmp_path / "elsewhere", ROOT)


# --- the zip ---


def test_the_bundle_is_whole_and_the_same_bytes_each_time(tmp_path):
    course = small_course(tmp_path / "course")
    (course / "rlhf_edu" / "__pycache__").mkdir()
    (course / "rlhf_edu" / "__pycache__" / "junk.pyc").write_text("junk")
    (course / "notebooks" / ".ipynb_checkpoints").mkdir()
    (course / "notebooks" / ".ipynb_checkpoints" / "old.ipynb").write_text("old")
    first = colab.bundle(tmp_path / "a", root=course)
    os.utime(course / "LICENSE", (1e9, 1e9))
    again = colab.bundle(tmp_path / "b", root=course)
    assert first.name == "rlhf_edu.zip" and first.read_bytes() == again.read_bytes()
    names = zipfile.ZipFile(first).namelist()
    assert {"data/one.txt", "notebooks/one.txt", "rlhf_edu/colab.py", "LICENSE"} < set(names)
    assert not [n for n in names if "junk" in n or "old" in n]
    assert names[-1] == "pyproject.toml"  # a zip half unpacked has none, and is unpacked again
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "without_solutions.ipynb").write_text("{}")
    names = zipfile.ZipFile(colab.bundle(tmp_path / "c", tmp_path / "student", course)).namelist()
    assert [n for n in names if n.startswith("notebooks/")] == ["notebooks/without_solutions.ipynb"]


def test_a_missing_part_of_the_course_is_named(tmp_path, one_sentence):
    with one_sentence("is missing"):
        colab.bundle(tmp_path / "a", root=tmp_path)


# --- a runtime like Colab's ---

RUN = """
import json, sys
space = {"__name__": "__main__"}
for source in json.load(open(sys.argv[1], encoding="utf-8")):
    exec(compile(source, "cell", "exec"), space)
"""


def new_runtime(folder: Path, colab_there=True):
    """`run(*sources)` runs cells in a new process of this runtime, in its folder `content`."""
    try:
        venv.create(folder / "runtime", with_pip=False)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no virtual environment can be made here: {error}")
    scheme = {"base": str(folder / "runtime"), "platbase": str(folder / "runtime")}
    site = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    (site / "preinstalled.pth").write_text(str(LIBRARIES), encoding="utf-8")
    if colab_there:
        (site / "google" / "colab").mkdir(parents=True)
        (site / "google" / "colab" / "__init__.py").write_text("")
    python = Path(sysconfig.get_path("scripts", "venv", vars=scheme)) / Path(sys.executable).name
    if not python.exists():
        python = python.with_name("python.exe" if os.name == "nt" else "python")
    content = folder / "content"
    content.mkdir()

    def run(*sources, **environment):
        (folder / "cells.json").write_text(json.dumps(sources), encoding="utf-8")
        (folder / "run.py").write_text(RUN, encoding="utf-8")
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
        env |= {"RLHF_EDU_SCALE": "smoke", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", **environment}
        command = [python, folder / "run.py", folder / "cells.json"]
        done = subprocess.run(command, cwd=content, env=env, capture_output=True, text=True, check=False)
        done.said = done.stdout + done.stderr
        return done

    there = run("import torch\nprint(torch.__version__)")
    if there.stdout.strip() != torch.__version__:
        pytest.skip(f"a virtual environment does not see this Python's torch: {there.said[-200:]}")
    absent = run("import importlib.util\nprint(importlib.util.find_spec('rlhf_edu'))")
    if absent.stdout.strip() != "None":
        pytest.skip("the course is installed among the libraries of this Python, so none is without it")
    return SimpleNamespace(run=run, content=content, site=site, folder=folder)


@pytest.fixture
def runtime(tmp_path):
    return new_runtime(tmp_path)


def test_outside_colab_the_cell_only_says_what_is_missing(tmp_path):
    plain = new_runtime(tmp_path, colab_there=False)
    shutil.copy(colab.bundle(tmp_path / "a", root=small_course(tmp_path / "course")), plain.content)
    done = plain.run(colab.setup_cell())
    assert done.returncode == 1 and "rlhf_edu is missing" in done.stderr
    assert [p.name for p in plain.content.iterdir()] == ["rlhf_edu.zip"]


def test_the_first_cells_of_the_tour_run_from_the_real_bundle(runtime):
    """No repository around, no installed course: only the zip in the file panel."""
    tour = [c for c in read(ROOT / "notebooks" / "00_tour.ipynb")["cells"] if c["cell_type"] == "code"]
    sources = ["".join(c["source"]) for c in tour[:4]]
    sources.append(
        "print('torch', torch.__version__); print(rlhf_edu.__file__)\n"
        "print(sampling.sample(world.sft, world.prompts('heldout', 1), eos_id=EOS, max_tokens=4))"
    )
    colab.bundle(runtime.content)
    done = runtime.run(*sources)
    assert done.returncode == 0, done.said
    assert f"torch {torch.__version__}" in done.stdout
    assert str(runtime.content.resolve() / "rlhf_edu_course") in done.stdout
    assert not [p for p in runtime.site.iterdir() if "rlhf" in p.name.lower()], "the course was installed"
    (runtime.content / "rlhf_edu.zip").unlink()
    again = runtime.run(sources[0], "print(world.scale)")  # the session was restarted: nothing is fetched
    assert again.returncode == 0 and "smoke" in again.stdout, again.said


def test_a_placeholder_says_so_and_a_dead_address_too(runtime):
    done = runtime.run(colab.setup_cell(small_course(runtime.folder / "course")))
    assert done.returncode == 1 and "placeholder" in done.stderr and "Traceback" not in done.stderr
    if not shutil.which("git"):
        pytest.skip("the rest needs git")
    nowhere = small_course(runtime.folder / "nowhere", repository=(runtime.folder / "gone").as_uri())
    done = runtime.run(colab.setup_cell(nowhere))
    assert done.returncode == 1 and "cannot clone" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_repository_that_pyproject_names_is_cloned(runtime):
    address = (runtime.folder / "published").as_uri()
    published = small_course(runtime.folder / "published", repository=address)
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "The course"]):
        subprocess.run(["git", *command], cwd=published, check=True)
    show = "import subprocess\nprint(world, subprocess.run([sys.executable, '-m', 'rlhf_edu'], capture_output=True, text=True).stdout)"
    done = runtime.run(colab.setup_cell(published), show)
    assert done.returncode == 0 and "a small world the course runs" in done.stdout, done.said


def wheel(folder: Path, name: str, requires: str = "") -> None:
    """A package of one empty module, as a wheel."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(
            f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
        )


def test_only_what_lacks_is_installed_and_never_another_torch(runtime):
    if "pip" not in runtime.run("import pip\nprint(pip.__name__)").stdout:
        pytest.skip("this Python has no pip")
    wheels = runtime.folder / "wheels"
    wheel(wheels, "colab_lacks_this")
    wheel(wheels, "wants_another_torch", "torch>=99")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    needs = ["torch>=98", "jupyterlab>=99", "pytest", "colab_lacks_this>=1"]
    course = small_course(runtime.folder / "course", dependencies=needs)
    shutil.copy(colab.bundle(runtime.folder / "a", root=course), runtime.content)
    before = {p.name for p in runtime.site.iterdir()}
    done = runtime.run(
        colab.setup_cell(course), "import colab_lacks_this, torch\nprint(torch.__version__)", **offline
    )
    assert done.returncode == 0 and torch.__version__ in done.stdout, done.said
    new = {p.name for p in runtime.site.iterdir()} - before
    assert {n.split("-")[0].removesuffix(".py") for n in new} <= {"colab_lacks_this", "__pycache__"}

    shutil.rmtree(runtime.content / "rlhf_edu_course")
    greedy = small_course(runtime.folder / "greedy", dependencies=[*needs, "wants_another_torch"])
    shutil.copy(colab.bundle(runtime.folder / "b", root=greedy), runtime.content)
    done = runtime.run(colab.setup_cell(greedy), **offline)
    assert done.returncode == 1 and "wants_another_torch" in done.stderr and "Traceback" not in done.stderr
    assert not list(runtime.site.glob("torch*"))


def test_a_library_that_was_loaded_before_asks_for_a_restart(runtime):
    if "pip" not in runtime.run("import pip\nprint(pip.__name__)").stdout:
        pytest.skip("this Python has no pip")
    wheels = runtime.folder / "wheels"
    wheel(wheels, "loaded_early")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    course = small_course(runtime.folder / "course", dependencies=["loaded_early>=1"])
    shutil.copy(colab.bundle(runtime.folder / "a", root=course), runtime.content)
    early = "import sys, types\nsys.modules['loaded_early'] = types.ModuleType('loaded_early')"
    done = runtime.run(early, colab.setup_cell(course), **offline)
    assert done.returncode == 1 and "restart the session" in done.stderr, done.said
    done = runtime.run(colab.setup_cell(course), "print(world)", **offline)
    assert done.returncode == 0 and "a small world" in done.stdout, done.said


def test_the_two_commands(tmp_path, capsys):
    (tmp_path / "notebooks").mkdir()
    shutil.copy(NOTEBOOKS[0], tmp_path / "notebooks")
    assert main(["stamp", "--notebooks", str(tmp_path / "notebooks")]) == 0
    said = capsys.readouterr().out
    assert "no notebook changed" in said and colab.repository() in said
    assert ("placeholder" in said) == (colab.PLACEHOLDER in colab.repository())
    assert main(["bundle", "--output", str(tmp_path), "--notebooks", str(tmp_path / "notebooks")]) == 0
    assert "rlhf_edu.zip" in capsys.readouterr().out and (tmp_path / "rlhf_edu.zip").stat().st_size > 1e6
