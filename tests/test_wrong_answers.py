"""Every known mistake, written as a student writes it, is refused with the hint that fits; right answers pass."""

import importlib.util
from pathlib import Path

import pytest

from rlhf_edu import checks

WRONG, RIGHT, SEEDS = {}, {}, (0, 1, 2)
for _path in sorted((Path(__file__).parent / "wrong_answers").glob("nb*.py")):
    _spec = importlib.util.spec_from_file_location(f"wrong_answers_{_path.stem}", _path)
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    WRONG |= _module.WRONG
    RIGHT |= _module.RIGHT
MODULES = sorted(p.stem for p in Path(checks.__file__).parent.glob("nb*.py"))
EXERCISES = {e.name: e for m in MODULES for e in importlib.import_module(f"rlhf_edu.checks.{m}").EXERCISES}


def test_every_exercise_has_wrong_and_right_answers_here():
    for name in EXERCISES:
        assert WRONG.get(name), f"no wrong answer to {name} in tests/wrong_answers"
        assert RIGHT.get(name), f"no right answer to {name} in tests/wrong_answers"
    assert set(WRONG) | set(RIGHT) <= set(EXERCISES), "answers to exercises that do not exist"


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_refused_with_the_hint_that_fits(name):
    task, heard = checks.exercise(name), set()
    for number, (answer, hint) in enumerate(WRONG[name]):
        if task.inputs is None and hint.startswith("should be"):
            hint = "is not it"  # what it should be is the answer itself
        for seed in SEEDS:
            passed, message = checks.judge(task, answer, seed)
            which = f"{name}, wrong answer {number} ({getattr(answer, '__name__', answer)}), seed {seed}"
            assert passed is False, f"{which}: accepted"
            assert hint.lower() in message.lower(), f"{which}: {message!r} is not {hint!r}"
            told = task.inputs is None and " should be " in message
            assert not told or message in [m.hint for m in task.mistakes], (
                f"{which}: {message!r} tells the answer"
            )
            heard.add(message)
    missing = [m.hint for m in task.mistakes if m.hint not in heard]
    assert not missing, f"{name}: no wrong answer here makes these mistakes: {missing}"


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_pass_however_they_are_written(name):
    for number, answer in enumerate(RIGHT[name]):
        for seed in SEEDS:
            passed, message = checks.judge(checks.exercise(name), answer, seed)
            which = f"{name}, right answer {number} ({getattr(answer, '__name__', answer)}), seed {seed}"
            assert passed is True, f"{which}: {message}"
