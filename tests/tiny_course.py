"""A course of two small notebooks for the tests of editions and grading: it needs no model and no lesson."""

from pathlib import Path

from nbformat import v4

EXERCISES = """
import torch
from rlhf_edu.checks import Exercise, Mistake
from rlhf_edu.variants import Variant

def variants(rng):
    scale = rng.randint(2, 9)
    inputs = lambda draws: {"x": torch.tensor(draws.normal(size=4)).requires_grad_()}
    wrong = (Mistake("that is the plain x: multiply it.", lambda x: x * 1.0),)
    return [
        Variant(
            Exercise(f"90.{i}", f"number {i}", lambda x: x * scale, inputs, wrong),
            f"Write `f{i}(x)`: {scale} times x.",
            f"def f{i}(x):\\n    ### BEGIN SOLUTION\\n    return {scale} * x\\n    ### END SOLUTION",
            f"f{i}",
        )
        for i in (1, 2, 3)
    ]
"""
STARS = "★★☆☆☆"


def graded(cell, grade_id: str, **about):
    cell.metadata["nbgrader"] = {
        "schema_version": 3, "grade_id": grade_id, "solution": False, "grade": False, "locked": False, "task": False,
    } | about  # fmt: skip
    return cell


def notebook(*cells):
    return v4.new_notebook(
        cells=list(cells),
        metadata={
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
    )


def public_notebook():
    """A hand-graded answer, an output that tells it, and nothing that a check would ask."""
    outputs = [v4.new_output("stream", name="stdout", text="the answer is 42\n")]
    return notebook(
        v4.new_markdown_cell(f"# A small notebook\n\n### Exercise 91.1 · {STARS} · 5 min · explain"),
        graded(v4.new_markdown_cell("Because of 42."), "91-1-why", solution=True, grade=True, points=2.0),
        v4.new_code_cell("print('the answer is', 42)", outputs=outputs, execution_count=1),
    )


def write(folder: Path) -> tuple[Path, Path]:
    """(the folder of masters, the file of withheld exercises)."""
    import nbformat

    masters = folder / "masters"
    masters.mkdir(parents=True)
    nbformat.write(public_notebook(), masters / "91_tiny.ipynb")
    (folder / "own.py").write_text(EXERCISES, encoding="utf-8")
    return masters, folder / "own.py"
