"""The set-up cell of the notebooks, kept here and stamped into all of them, and the zip for classes without a fork.

In Colab the cell fetches the course from the repository that pyproject.toml names, or from the zip, puts it on the
path and calls `complete`, which installs what that runtime lacks. The course itself is not installed, so no runtime
has to be restarted for it; torch is never touched. This file imports nothing that such a runtime may lack.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

from .errors import UserError, explained

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = "OWNER"  # stands in the repository's address until somebody publishes the course
BUNDLE = "rlhf_edu.zip"
IN_BUNDLE = (
    "rlhf_edu",
    "data",
    "notebooks",
    "LICENSE",
    "pyproject.toml",
)  # the last one says that it is whole
NOT_FOR_COLAB = {"torch", "jupyterlab"}  # Colab has its own of both

CELL = """\
# Set-up, the same in every notebook (`python -m rlhf_edu stamp`). Outside Colab it only imports the course.
import sys
from importlib.util import find_spec

# In Colab the course comes from an uploaded rlhf_edu.zip, or from here:
REPOSITORY = "{repository}"
if find_spec("google") and find_spec("google.colab") and not find_spec("rlhf_edu"):
    import shutil
    import subprocess
    from pathlib import Path

    course = Path("rlhf_edu_course").resolve()
    bundles = [p for p in (Path("rlhf_edu.zip"), Path("drive/MyDrive/rlhf_edu.zip")) if p.exists()]
    if (course / "pyproject.toml").exists():
        pass  # fetched before the last restart
    elif bundles:
        shutil.unpack_archive(bundles[0], course)
    elif "/OWNER/" in REPOSITORY:
        raise SystemExit(
            "REPOSITORY is still a placeholder, and there is no rlhf_edu.zip: put the one from your teacher "
            "(`python -m rlhf_edu bundle` makes it) into the file panel on the left, then run this cell again"
        )
    elif subprocess.run(["git", "clone", "-q", "--depth", "1", REPOSITORY, course], check=False).returncode:
        raise SystemExit(f"cannot clone {{REPOSITORY}}: check the address, or upload rlhf_edu.zip instead")
    sys.path.insert(0, str(course))
    from rlhf_edu import colab

    colab.complete()  # installs what this runtime lacks, and leaves its torch alone
try:
    import rlhf_edu
except ModuleNotFoundError as error:
    raise SystemExit(
        "rlhf_edu is missing: follow 'Colab' or 'pip' in the README, restart the kernel, run again"
    ) from error
from rlhf_edu import lesson
from rlhf_edu.checks import check

world = lesson.start(seed=0)"""


def repository(root: Path = ROOT) -> str:
    """The address that the course is cloned from; an instructor who forks changes this one line."""
    with explained(f"reading {root / 'pyproject.toml'}", "run this in a checkout of the course"):
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return project["urls"]["Repository"]


def setup_cell(root: Path = ROOT) -> str:
    return CELL.format(repository=repository(root))


def setup_of(notebook: dict) -> dict | None:
    """The set-up cell of a notebook: its first code cell, if that starts a lesson."""
    first = next((c for c in notebook["cells"] if c["cell_type"] == "code"), None)
    return first if first and "lesson.start(" in "".join(first["source"]) else None


def stamp(notebooks: Path, root: Path = ROOT) -> list[str]:
    """Write the set-up cell into every notebook of a folder; return the names of those that changed.

    Nothing else of a file changes: outputs, metadata and grade ids stay.
    """
    from .training import replacing

    cell, changed = setup_cell(root), []
    paths = sorted(Path(notebooks).glob("*.ipynb"))
    if not paths:
        raise UserError(f"{notebooks} holds no notebooks: run this in the course's folder, or name one")
    for path in paths:
        with explained(f"reading {path}", "restore the notebook"):
            notebook = json.loads(path.read_text(encoding="utf-8"))
            first = setup_of(notebook)
        if first is None:
            raise UserError(f"the first code cell of {path} starts no lesson: put a set-up cell there first")
        if "".join(first["source"]) == cell:
            continue
        first["source"] = cell.splitlines(keepends=True)
        with replacing(path) as temporary:  # as nbformat writes it
            text = json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"
            temporary.write_text(text, encoding="utf-8", newline="\n")
        changed.append(path.name)
    return changed


def bundle(output: Path, notebooks: Path | None = None, root: Path = ROOT) -> Path:
    """Zip the package, its data and the notebooks; the same files give the same bytes.

    notebooks: take these instead of the course's own, which hold the solutions, e.g. dist/student.
    """
    from .training import replacing

    files = []  # (name in the zip, file)
    for part in IN_BUNDLE:
        source = notebooks if part == "notebooks" and notebooks else root / part
        if not source.exists():
            raise UserError(f"{source} is missing: run this in a checkout of the course")
        inside = sorted(source.rglob("*"), key=lambda p: p.relative_to(source).as_posix())
        for file in inside if source.is_dir() else [source]:
            name = Path(part) / file.relative_to(source) if source.is_dir() else Path(part)
            if file.is_file() and not any(p.startswith((".", "__pycache__")) for p in name.parts):
                files.append((name.as_posix(), file))
    path = Path(output) / BUNDLE
    with (
        explained(f"writing {path}", "choose another folder or free some space"),
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
    ):
        for name, file in files:
            about = zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0))
            about.compress_type, about.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            about.create_system = 3  # also where it is made on Windows
            archive.writestr(about, file.read_bytes())
    return path


def lacking(requirements: list[str]) -> list[str]:
    """Which of them are not installed in a version that they admit; never one of `NOT_FOR_COLAB`."""
    from packaging.requirements import Requirement

    out = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.name in NOT_FOR_COLAB:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            out.append(text)
    return out


def complete(root: Path = ROOT) -> list[str]:
    """Install what this runtime lacks of the course's dependencies, torch held as it is; return what that was."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    os.environ["PYTHONPATH"] = os.pathsep.join(  # for `!python -m rlhf_edu`
        dict.fromkeys([str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    )
    missing = lacking(project["dependencies"])
    if not missing:
        return []
    names = [re.match(r"[\w.-]+", text)[0] for text in missing]
    loaded = [n for n in names if n in sys.modules]
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "held.txt"
        held.write_text(f"torch=={importlib.metadata.version('torch')}\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(held), *missing]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"pip could not install {', '.join(names)} beside this runtime's torch: {last_line(done.stderr)}"
        )
    if loaded:
        raise SystemExit(
            f"a new {', '.join(loaded)} was installed: restart the session (menu Runtime), then run this cell again"
        )
    importlib.invalidate_caches()
    return missing


def last_line(text: str) -> str:
    errors = [line for line in text.strip().splitlines() if line.startswith("ERROR")]
    return (errors or text.strip().splitlines() or ["it did not say why"])[-1][:300]
