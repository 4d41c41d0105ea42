"""Notebook 12 where TRL is missing, or is another version: it says so and goes on to its end."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import json, sys
space = {"__name__": "__main__"}
for source in json.load(open(sys.argv[1], encoding="utf-8")):
    exec(compile(source, "cell", "exec"), space)
print("the last cell ran")
"""


def code_cells():
    book = json.loads((ROOT / "notebooks" / "12_scaling_up.ipynb").read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code"]


def run(folder, cells, trl):
    """Run cells where `import trl` finds a module of this text."""
    (folder / "trl.py").write_text(trl, encoding="utf-8")
    (folder / "run.py").write_text(RUN, encoding="utf-8")
    (folder / "cells.json").write_text(json.dumps(cells), encoding="utf-8")
    env = os.environ | {"RLHF_EDU_SCALE": "smoke", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    command = [sys.executable, "-W", "ignore", folder / "run.py", folder / "cells.json"]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)


def test_the_notebook_goes_on_without_trl(tmp_path):
    done = run(tmp_path, code_cells(), "raise ModuleNotFoundError(\"No module named 'trl'\", name='trl')")
    assert done.returncode == 0 and "the last cell ran" in done.stdout, done.stderr[-2000:]
    assert done.stdout.count("trl is not installed") >= 4  # one sentence for each cell that needs it
    assert "in TRL" not in done.stdout


def test_another_version_of_trl_is_not_used(tmp_path):
    version = next(source for source in code_cells() if source.startswith("VERSION = "))
    done = run(tmp_path, [version, "assert not TRL"], '__version__ = "0.1"')
    assert done.returncode == 0 and "trl 0.1 is installed" in done.stdout, done.stderr
