#!/usr/bin/env python3
"""Set up the course and run it; needs Python 3.11 or newer and nothing else. On Windows: py start.py lab

    python3 start.py reproduce   the main job: the two figures and their report, in outputs/
    python3 start.py test        unit tests, and the notebooks at their smallest scale
    python3 start.py test-full   the notebooks as a student runs them, marked outputs compared
    python3 start.py lab         JupyterLab on notebooks/
    python3 start.py student     for instructors: the notebooks without solutions, in dist/
    python3 start.py grade IN    for instructors: grade what is in the folder IN
    python3 start.py site        the course as a static site, in build/site/
    python3 start.py slides      a deck of slides for each notebook, in build/slides/
    python3 start.py install     the environment alone, in .venv

--python PATH right after the command takes another Python for .venv; the rest goes to the program.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV, LOCK = ROOT / ".venv", ROOT / "constraints.txt"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
LOG = VENV / "install.log"
STAMP = VENV / "installed"  # what the finished installation was made from
BUSY = VENV / "installing"  # outlives only an installation that was killed
OLDEST = (3, 11)  # of which the pinned packages have builds
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ENV = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUTF8": "1"}
ENV["PATH"] = str(PYTHON.parent) + os.pathsep + ENV.get("PATH", "")
NETWORK = "name resolution|getaddrinfo|dns error|failed to (establish|fetch|connect)|unreachable|timed out|"
NETWORK += "connection (broken|refused|reset|aborted)|proxyerror|sslerror|error sending request"
ADVICE = (  # found in the log: what to do; the first that matches is printed
    ("no space left|errno 28|disk full", "The disk is full: free about 4 GB"),
    ("ensurepip|module named venv", "This Python lacks venv: on Debian or Ubuntu apt install python3-venv"),
    (r"c10\.dll|winerror 126", "PyTorch needs the Microsoft Visual C++ Redistributable: install it"),
    (NETWORK, "The network is missing or broke off: connect (what is downloaded is kept)"),
    ("no matching dist|no solution", "No build for this Python or system: try another --python, or Colab"),
    ("", "The lines above say why; delete .venv if nothing else helps"),
)


def stop(message):
    sys.exit("start.py: " + message)


def output(*command):
    """What a small command prints, or None where it fails."""
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, timeout=60, env=ENV, text=True)
    except (OSError, subprocess.SubprocessError):
        return None


def version(python):
    """(3, 11) for a Python that runs, else None."""
    text = output(str(python), "-c", "import sys; print(*sys.version_info[:2])")
    return tuple(map(int, text.split())) if text else None


def step(label, *command, needed=True):
    """Run one step of the installation: one line on the screen, its output in the log."""
    began, before, screen = time.monotonic(), LOG.stat().st_size, sys.stdout.isatty()
    print("  " + label, end=" ", flush=True)
    with open(LOG, "ab") as log:
        os.write(log.fileno(), f"\n$ {' '.join(command)}\n".encode())
        env = {**ENV, "TMPDIR": str(VENV)}  # /tmp may be small; and what a kill leaves behind goes with .venv
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=ROOT)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                print(f"\r  {label} {time.monotonic() - began:.0f} s " * screen, end="", flush=True)
        finally:
            if process.poll() is None:  # stopped by Ctrl-C or a signal
                process.terminate()
                process.wait()
    done = process.returncode == 0
    print(f"\r  {label} " * screen + f"{time.monotonic() - began:.0f} s" + ": no" * (not done), flush=True)
    if needed and not done:
        BUSY.unlink(missing_ok=True)  # pip ended by itself: what it finished is whole
        text = LOG.read_bytes()[before:].decode(errors="replace").strip()
        advice = next(advice for pattern, advice in ADVICE if re.search(pattern, text, re.IGNORECASE))
        print(*(line[:200] for line in text.splitlines()[-15:]), sep="\n", file=sys.stderr)
        stop(f"'{label}' failed. {advice}; then run the same command again. The whole log: {LOG}")
    return done


def fingerprint():
    text = (ROOT / "pyproject.toml").read_bytes() + LOCK.read_bytes() + f"{version(PYTHON)} {ROOT}".encode()
    return hashlib.sha256(text).hexdigest()


def need_disk(gigabytes):
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < gigabytes:
        stop(f"{ROOT} has {free:.1f} GB free and the installation needs {gigabytes}: make room, try again.")


def install_torch(pip, links):
    """The CPU build unless there is a GPU: on Linux, PyPI's torch brings gigabytes of CUDA packages."""
    pin = re.search(r"^torch==\S+", LOCK.read_text(encoding="utf-8"), re.MULTILINE).group()
    if pin in (output(str(PYTHON), "-c", "import torch; print('torch==' + torch.__version__)") or ""):
        return
    gpu = output("nvidia-smi") is not None
    if sys.platform == "linux" and not gpu:
        local = [*pip, "--no-deps", "--no-index", pin]
        if links and step(f"{pin}, CPU build in pip's find-links", *local, needed=False):
            return
        try:
            urllib.request.urlopen(CPU_INDEX + "/torch/", timeout=5).close()
        except OSError:
            print(f"  {CPU_INDEX} does not answer: PyPI's build instead, with several GB of CUDA packages")
        else:
            step(f"{pin}, CPU build", *pip, "--no-deps", "--index-url", CPU_INDEX, pin)
            return
    if sys.platform == "linux":
        need_disk(12)
    if sys.platform == "win32" and gpu:
        print("  PyPI's build for Windows is without GPU: pytorch.org says how to put the other into .venv")
    step(f"{pin}, PyPI's build", *pip, pin)


def install(python=None):
    """Make .venv what pyproject.toml and constraints.txt say; at once if it is so already."""
    found = version(PYTHON)
    if found and (found < OLDEST or python and found != version(python)):
        found = None
    if found and not BUSY.exists() and STAMP.exists() and STAMP.read_text() == fingerprint():
        return
    base = python or getattr(sys, "_base_executable", sys.executable)
    if (found or version(base) or (0, 0)) < OLDEST:
        stop(f"{base} is not Python {OLDEST[0]}.{OLDEST[1]} or newer: name one with --python PATH.")
    need_disk(3)
    began, uv = time.monotonic(), shutil.which("uv")
    print(f"Setting up {VENV}: about 2 GB and a few minutes, once. Log: {LOG}", flush=True)
    whole = found and not BUSY.exists() and (uv or output(str(PYTHON), "-c", "import pip") is not None)
    if VENV.exists() and not whole:
        shutil.rmtree(VENV)
    VENV.mkdir(exist_ok=True)
    BUSY.touch()
    LOG.touch()
    links = ENV.get("PIP_FIND_LINKS") or output(base, "-m", "pip", "config", "get", "global.find-links")
    if links:  # uv does not read pip's setting
        ENV.setdefault("UV_FIND_LINKS", ",".join(links.split()))
    pip = [uv, "pip", "install", "--python", str(PYTHON)] if uv else [str(PYTHON), "-m", "pip", "install"]
    make = [uv, "venv", "--seed", "--allow-existing", "--python", base] if uv else [base, "-m", "venv"]
    if not whole:
        step("virtual environment", *make, str(VENV))
    step("setuptools", *pip, "-c", str(LOCK), "setuptools>=77")
    install_torch(pip, links)
    step("the course and its packages", *pip, "-c", str(LOCK), "--no-build-isolation", "-e", ".[dev]")
    step("check: torch and transformers import", str(PYTHON), "-c", "import torch, transformers")
    STAMP.write_text(fingerprint())
    BUSY.unlink()
    print(f"Ready after {time.monotonic() - began:.0f} s.", flush=True)


def run(module, *arguments):
    """Run the program (a module or a file) in the environment and return its exit code."""
    program = [module] if module.endswith(".py") else ["-m", module]
    process = subprocess.Popen([str(PYTHON), *program, *arguments], env=ENV, cwd=ROOT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program gets Ctrl-C too and ends in its own way
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    return 130 if code == 0xC000013A else 128 - code if code < 0 else code  # the first is Ctrl-C on Windows


def main(command="", *rest):
    if command not in (
        "reproduce",
        "test",
        "test-full",
        "lab",
        "student",
        "grade",
        "site",
        "slides",
        "install",
    ):
        print(__doc__.strip())
        return 0 if command in ("", "-h", "--help") else 2
    python = None
    if rest[:1] == ("--python",):
        found = shutil.which("".join(rest[1:2])) or stop("--python needs the path or name of a Python.")
        python, rest = os.path.abspath(found), rest[2:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with open(__file__) as guard:
        if os.name == "posix":
            import fcntl

            fcntl.flock(guard, fcntl.LOCK_EX)  # of two installations at the same time the second waits
        install(python)
    if command in ("test", "test-full"):
        ENV["RLHF_EDU_SCALE"] = "smoke" if command == "test" else "mini"
        ENV.setdefault("OMP_NUM_THREADS", "1")  # of the notebooks' kernels: two run at a time
        named = any(a[:1] != "-" and (ROOT / a.split("::")[0]).exists() for a in rest)
        notebooks = ["notebooks"] * any(ROOT.glob("notebooks/*.ipynb"))
        places = [] if named else ["tests"] * (command == "test") + notebooks
        checks = ["--nbval-lax", "--nbval-current-env", "--nbval-kernel-startup-timeout", "600"]
        return run("pytest", "-q", "-n", "2", "--dist", "loadfile", *checks, *places, *rest)
    programs = {name: ("rlhf_edu", name) for name in ("reproduce", "student", "grade")}
    programs |= {"lab": ("jupyterlab", "notebooks"), "site": ("site/make.py",), "slides": ("site/slides.py",)}
    return run(*programs[command], *rest) if command in programs else 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nstart.py: stopped; the same command installs anew.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        stop(f"{error}: check the disk and your rights, close the JupyterLab of this folder, try again.")
