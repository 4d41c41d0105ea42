"""Answers as students write them: every wrong one is refused with the hint that fits, every right one passes.

`tests/wrong_answers/nbNN.py` holds, for the exercises of `rlhf_edu/checks/nbNN.py`,

    WRONG = {"04.1": [(function_or_value, "distinctive part of the hint expected"), ...]}
    RIGHT = {"04.1": [function_or_value, ...]}

written without looking at the check's own code.
"""

import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest

from rlhf_edu import checks

FOLDER = Path(__file__).parent / "wrong_answers"
SEEDS = range(4)


def load(path: Path):
    """A module from its path: the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"wrong_answers_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = [m.name for m in pkgutil.iter_modules(checks.__path__) if m.name.startswith("nb")]
ANSWERS = {path.stem: load(path) for path in sorted(FOLDER.glob("nb*.py"))}
WRONG = [
    pytest.param(name, answer, hint, id=f"{name}-{number}")
    for module in ANSWERS.values()
    for name, wrong in module.WRONG.items()
    for number, (answer, hint) in enumerate(wrong)
]
RIGHT = [
    pytest.param(name, answer, id=f"{name}-{number}")
    for module in ANSWERS.values()
    for name, right in module.RIGHT.items()
    for number, answer in enumerate(right)
]


@pytest.mark.parametrize("module", sorted({*MODULES, *ANSWERS}))
def test_every_exercise_has_wrong_and_right_answers(module):
    assert module in MODULES, (
        f"tests/wrong_answers/{module}.py has no checks: write rlhf_edu/checks/{module}.py"
    )
    assert module in ANSWERS, (
        f"rlhf_edu/checks/{module}.py has no answers: write tests/wrong_answers/{module}.py"
    )
    names = {task.name for task in importlib.import_module(f"rlhf_edu.checks.{module}").EXERCISES}
    for kind in ("WRONG", "RIGHT"):
        answers = getattr(ANSWERS[module], kind)
        assert not names ^ set(answers), (
            f"{kind} of tests/wrong_answers/{module}.py does not fit the checks in {sorted(names ^ set(answers))}"
        )
        assert all(answers.values()), f"{kind} of tests/wrong_answers/{module}.py has an empty list"


@pytest.mark.parametrize("name, answer, hint", WRONG)
def test_a_wrong_answer_is_refused_with_the_hint_that_fits(name, answer, hint):
    assert hint.strip(), f"{name}: the part of the hint that is expected is empty"
    for seed in SEEDS:
        result = checks.check(name, answer, seed=seed)
        assert result.passed is False, f"{name}, seed {seed}: a wrong answer passes; expected: {hint}"
        assert hint.lower() in result.message.lower(), (
            f"{name}, seed {seed}: expected {hint!r}, said {result.message!r}"
        )


@pytest.mark.parametrize("name, answer", RIGHT)
def test_a_right_answer_passes(name, answer):
    for seed in SEEDS:
        result = checks.check(name, answer, seed=seed)
        assert result.passed is True, f"{name}, seed {seed}: a right answer is refused: {result.message}"
