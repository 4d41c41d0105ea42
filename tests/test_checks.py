"""The exercise checks: what is true passes, every known wrong answer is refused with the hint that fits."""

import importlib
import pkgutil

import pytest
import torch

from rlhf_edu import checks
from rlhf_edu.errors import UserError

MODULES = [m.name for m in pkgutil.iter_modules(checks.__path__) if m.name.startswith("nb")]
EXERCISES = [e for m in MODULES for e in importlib.import_module(f"rlhf_edu.checks.{m}").EXERCISES]
NAMES = [e.name for e in EXERCISES]


def test_every_exercise_has_one_name_and_known_mistakes():
    assert len(set(NAMES)) == len(NAMES)
    for task in EXERCISES:
        assert task.mistakes or task.examine, f"{task.name} knows no mistake"
        assert len({m.hint for m in task.mistakes}) == len(task.mistakes), f"{task.name}: a hint stands twice"


@pytest.mark.parametrize("task", EXERCISES, ids=NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_the_truth_passes_and_each_mistake_is_named(task, seed):
    answer = task.truth if task.inputs else task.truth()
    assert checks.judge(task, answer, seed)[0] is True
    for mistake in task.mistakes:
        wrong = mistake.answer if task.inputs else checks.value_of(mistake.answer)
        passed, message = checks.judge(task, wrong, seed)
        assert passed is False and message == mistake.hint, f"{task.name}: {message!r} for {mistake.hint!r}"


@pytest.mark.parametrize("task", EXERCISES, ids=NAMES)
def test_what_was_not_attempted_is_called_so(task):
    for nothing in (None, ...):
        assert checks.judge(task, nothing)[0] is None
    if task.inputs:
        assert checks.judge(task, lambda **_: None)[0] is None
        assert checks.judge(task, lambda **_: ...)[0] is None

        def stub(**_):
            raise NotImplementedError

        assert checks.judge(task, stub)[0] is None


@pytest.mark.parametrize(
    "task", [e for e in EXERCISES if e.inputs], ids=[e.name for e in EXERCISES if e.inputs]
)
def test_a_function_that_fails_or_returns_the_wrong_kind_gets_a_sentence(task):
    for wrong in (lambda **_: 1 / 0, lambda: 3, lambda **_: "text", lambda **_: torch.zeros(17, 3), 3.0):
        passed, message = checks.judge(task, wrong)
        assert passed is False and message and "\n" not in message


def test_unknown_exercises_are_named(one_sentence):
    with one_sentence("99.1"):
        checks.check("99.1", 1)
    with one_sentence("04.99"):
        checks.check("04.99", 1)
    with pytest.raises(checks.NotPassed):
        checks.require("04.1", None)
    assert issubclass(UserError, Exception)
