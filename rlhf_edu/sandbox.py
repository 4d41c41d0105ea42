"""A student's notebook, run in a process of its own: what loops, crashes or takes all memory costs one exercise.

`run` is the grader's side, `main` the student's. The student's process has loaded the checks under a name of its own
before the first cell runs, so that a notebook which redefines `check`, or changes `rlhf_edu.checks`, changes nothing;
after a right answer the same check must still refuse a known wrong one. What the cells print goes nowhere; verdicts
come through a pipe, each with a key. On Linux the kernel (Landlock) keeps the process from files it has no business
with. SECURITY.md says what this stops and what it does not: grade strangers' work in a container, without a network.
"""

import dataclasses
import glob
import importlib.util
import json
import os
import queue
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from .errors import UserError, described

PACKAGE = Path(__file__).resolve().parent
KEPT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "SYSTEMROOT",
    "VIRTUAL_ENV",
)  # of the grader's environment
STARTING = 600.0  # seconds to load PyTorch on a busy machine
PATIENCE = 5  # a busy machine costs nobody points
FORKS = 50  # a notebook needs none; more is a mistake that would take the machine along


@dataclasses.dataclass
class Cell:
    """A code cell; `exercise` if it is the solution or the check of one, `expression` what its check is asked."""

    source: str
    exercise: str | None = None
    stub: str = "pass"  # put in its place once it was stopped
    expression: str | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    cell_seconds: float = 60.0  # of the processor; by the wall clock it may be PATIENCE times as long
    seconds: float = 1800.0  # for the whole notebook, restarts included
    memory_gb: float = 4.0


@dataclasses.dataclass
class Outcome:
    verdicts: dict[str, dict] = dataclasses.field(default_factory=dict)  # exercise -> status, message
    errors: dict[int, str] = dataclasses.field(default_factory=dict)  # cell -> what it stopped with
    seconds: float = 0.0


def run(cells: list[Cell], limits: Limits, *, seed: int, variants: dict | None = None, stop=None) -> Outcome:
    """Run the cells in order and ask the checks. A cell that must be killed is left out, its exercise gets that
    verdict, and the others run again from the top: so nothing that was right is lost."""
    cells, out, began = [dataclasses.replace(c) for c in cells], Outcome(), time.monotonic()
    while True:
        left = limits.seconds - (time.monotonic() - began)
        reason, at = _once(cells, limits, left, {"seed": seed, "variants": variants}, out, stop)
        if reason and at < 0 and not out.seconds:
            raise UserError(
                f"a notebook could not be started ({reason}): does `python -m rlhf_edu reproduce --scale smoke` work?"
            )
        out.seconds = round(time.monotonic() - began, 1)
        if reason is None or at < 0 or out.seconds >= limits.seconds:
            break
        out.errors[at] = reason
        if name := cells[at].exercise:
            out.verdicts.setdefault(name, {"status": "stopped", "message": reason})
        for cell in [c for c in cells if name and c.exercise == name] or [cells[at]]:
            cell.source, cell.expression = cell.stub, None
    for cell in cells:
        if cell.expression is not None:
            late = f"not reached: the notebook took longer than {limits.seconds:g} s"
            out.verdicts.setdefault(cell.exercise, {"status": "stopped", "message": late})
    return out


def _once(cells, limits, seconds, job, out, stop) -> tuple[str | None, int]:
    """One process from the first cell on: (None, ...) if it reached the end, else (why not, in which cell)."""
    import matplotlib
    import psutil

    key, messages, at = secrets.token_hex(16), queue.SimpleQueue(), -1
    with tempfile.TemporaryDirectory(prefix="rlhf_edu_", ignore_cleanup_errors=True) as folder:
        env = {k: v for k, v in os.environ.items() if k in KEPT} | {
            "RLHF_EDU_SCALE": "smoke", "RLHF_EDU_CHECK_SEED": str(job["seed"]), "RLHF_EDU_SANDBOX": key[:8],
            "PYTHONPATH": str(PACKAGE.parent), "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg",
            "MPLCONFIGDIR": matplotlib.get_cachedir(), "IPYTHONDIR": folder, "HOME": folder, "TMPDIR": folder,
            "TEMP": folder, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        job |= {"key": key, "memory_gb": limits.memory_gb, "cells": [dataclasses.asdict(c) for c in cells]}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlhf_edu.sandbox"], cwd=folder, env=env, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        threading.Thread(target=_listen, args=(process, json.dumps(job), key, messages), daemon=True).start()
        began = started = time.monotonic()
        patience, cpu, reason = STARTING, 0.0, None
        try:
            while reason is None:
                try:
                    message = messages.get(timeout=0.3)
                except queue.Empty:
                    message = {}
                if "start" in message:
                    at, started, patience = message["start"], time.monotonic(), PATIENCE * limits.cell_seconds
                    cpu = message["cpu"]
                elif "verdict" in message and cells[at].expression is not None:
                    out.verdicts.setdefault(cells[at].exercise, message["verdict"])
                elif "error" in message:
                    out.errors[at] = message["error"]
                elif "end" in message:
                    return None, at
                elif "closed" in message:
                    reason = _death(process)
                elif at >= 0:
                    reason = _excess(psutil, process.pid, limits, cpu)
                if stop and stop.is_set():
                    raise KeyboardInterrupt
                if time.monotonic() - began > seconds:
                    reason = f"stopped: the whole notebook took longer than {limits.seconds:g} s"
                elif time.monotonic() - started > patience:
                    reason = f"stopped after {patience:g} s: an endless loop, or a wait?"
        finally:
            _kill(psutil, process, key[:8])
    return reason, at


def _listen(process, job: str, key: str, messages) -> None:
    """Hand over the job; then pass on each line that has the key, whatever else is written into the pipe."""
    try:
        process.stdin.write(job.encode())
        process.stdin.close()
        while line := process.stdout.readline(1 << 16):
            if line.startswith(key.encode()) and line.endswith(b"\n"):
                messages.put(json.loads(line[len(key) :]))
    except (OSError, ValueError):
        pass
    messages.put({"closed": True})


def _death(process) -> str:
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        return "this cell closed what the grader listens to"
    if code >= 0:
        return f"Python was ended in this cell (exit code {code})"
    return f"Python crashed in this cell ({signal.Signals(-code).name})"


def _excess(psutil, pid: int, limits: Limits, cpu_before: float) -> str | None:
    """What is too much: processor time of the cell, memory or processes of the whole tree."""
    used = forks = 0
    try:
        process = psutil.Process(pid)
        cpu = sum(process.cpu_times()[:2]) - cpu_before
        for p in [process, *process.children(recursive=True)]:
            used, forks = used + p.memory_info().rss, forks + 1
    except psutil.Error:
        return None  # one of them has just ended
    if cpu > limits.cell_seconds:
        return f"stopped after {limits.cell_seconds:g} s of computing: an endless loop?"
    if forks > FORKS:
        return f"stopped: it had started {forks} processes"
    if used > limits.memory_gb * 2**30:
        return f"stopped: it took more than {limits.memory_gb:g} GB of memory"
    return None


def _kill(psutil, process, mark: str) -> None:
    """The process and whatever it left behind, in its session or out of it."""
    if os.name == "posix":
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.kill()
    for _ in range(20):  # again, if one of them had just started another
        found = 0
        for other in psutil.process_iter():
            try:
                if other.pid != process.pid and other.environ().get("RLHF_EDU_SANDBOX") == mark:
                    other.kill()
                    found += 1
            except (psutil.Error, OSError):
                continue  # not ours to look into
        if not found:
            break
    process.wait()


# --- the student's side ---


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    key, me, pipe = job["key"].encode(), os.getpid(), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)

    def say(**message):
        if os.getpid() != me:  # a fork that has come this far
            os._exit(0)
        os.write(pipe, b"\n" + key + json.dumps(message).encode() + b"\n")  # whatever stood there before

    checks, tasks = _own_checks(job)
    job["variants"] = None  # the secret
    fence(Path.cwd())
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    if any("lesson" in cell["source"] for cell in job["cells"]):
        importlib.import_module("rlhf_edu.lesson")  # and transformers: the first cell is not charged for them

    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    _limit(job["memory_gb"])
    broken = {}
    for number, cell in enumerate(job["cells"]):
        say(start=number, cpu=sum(os.times()[:2]))
        if cell["expression"] is None:
            result = shell.run_cell(cell["source"], store_history=True)
            if error := result.error_before_exec or result.error_in_exec:
                broken[cell["exercise"]] = described(error)
                say(error=broken[cell["exercise"]])
        else:
            name = cell["exercise"]
            asked = cell["expression"]
            say(verdict=_verdict(checks, tasks[name], asked, shell, job["seed"], broken.get(name)))
    say(end=True)
    os._exit(0)


def _own_checks(job):
    """The checks under a name that no notebook knows, and the exercises this notebook asks."""
    name = f"checks_{secrets.token_hex(8)}"
    where = PACKAGE / "checks"
    spec = importlib.util.spec_from_file_location(
        f"rlhf_edu.{name}", where / "__init__.py", submodule_search_locations=[str(where)]
    )
    checks = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checks)
    own = {}
    if job["variants"]:
        from . import variants

        own = {v.exercise.name: v.exercise for v in variants.load(**job["variants"])}
    names = [c["exercise"] for c in job["cells"] if c["expression"] is not None]
    return checks, {n: own[n] if n in own else checks.exercise(n) for n in names}


def _verdict(checks, task, expression: str, shell, seed: int, broken: str | None) -> dict:
    try:
        passed, message = checks.judge(task, eval(expression, shell.user_ns), seed)
        if passed:
            for mistake in task.mistakes[:2]:
                wrong = mistake.answer if task.inputs else checks.value_of(mistake.answer)
                if checks.judge(task, wrong, seed)[0] is not False:
                    return {
                        "status": "look",
                        "message": "this notebook made the check accept wrong answers too",
                    }
    except BaseException as error:  # noqa: BLE001  the student's code may raise SystemExit as well
        passed, message = False, described(error)
        message += f" (the cell of this exercise stopped with {broken})" if broken else ""
    return {
        "status": {True: "right", False: "wrong", None: "not attempted"}[passed],
        "message": str(message)[:600],
    }


READ, WRITE = 0b1101, 0b10  # run, read files, read folders; write into a file (linux/landlock.h)
READ_FOLDER = 0b1000


def landlock() -> int:
    """The version of Landlock that this kernel offers; 0 for none (older Linux, other systems)."""
    if sys.platform != "linux":
        return 0
    import ctypes

    return max(0, ctypes.CDLL(None).syscall(444, None, 0, 1))


def fence(folder: Path) -> bool:
    """Let this process, and what it starts, write in `folder` alone and read the course, Python and the system alone.

    Also no TCP (from version 4 on) and no signal to processes outside (6). It cannot be undone. False: no Landlock.
    """
    version = landlock()
    if not version:
        return False
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    every = (1 << {1: 13, 2: 14}.get(version, 15)) - 1
    rules = struct.pack("=QQQ", every, 0b11 if version >= 4 else 0, 0b10 if version >= 6 else 0)
    rules = rules[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = libc.syscall(444, rules, len(rules), 0)

    def allow(path, access):
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return  # not on this machine
        access = access if os.path.isdir(path) else access & ~READ_FOLDER
        if libc.syscall(445, ruleset, 1, struct.pack("=Qi", access, place), 0):
            raise OSError(ctypes.get_errno(), f"Landlock does not take {path}")
        os.close(place)

    course = PACKAGE.parent
    system = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/opt", "/nix", "/proc", "/sys", "/dev")
    python = [sys.prefix, sys.base_prefix, *sys.path, *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    for path in (*system, *python, PACKAGE, course / "data", course / "outputs", os.environ["MPLCONFIGDIR"]):
        if str(path) not in ("", str(course)):
            allow(path, READ)
    allow(course, READ_FOLDER)  # its names, or nothing could be imported; not what stands in dist/
    for path in ("/dev/null", *glob.glob("/dev/nvidia*")):
        allow(path, READ | WRITE)
    allow(folder, every)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges: Landlock asks for it
    libc.capset(struct.pack("=II", 0x20080522, 0), bytes(24))  # in a container one is root: give that up
    if libc.syscall(446, ruleset, 0):
        raise OSError(ctypes.get_errno(), "Landlock could not be switched on")
    os.close(ruleset)
    return True


def _limit(memory_gb: float) -> None:
    try:
        import resource
    except ImportError:  # Windows: the grader's look at the memory is all there is
        return
    # Data, not address space: torch maps far more than it uses. The grader looks at what is used, forks included.
    for what, most in (("RLIMIT_DATA", int(memory_gb * 2**30)), ("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 2**30)):
        try:
            resource.setrlimit(getattr(resource, what), (most, most))
        except (ValueError, OSError):
            continue


if __name__ == "__main__":
    main()
