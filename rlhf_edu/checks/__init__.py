"""Instant checks of the exercises: first the truth, by an independent computation on random inputs, then the
likely mistake, by name.

A notebook says `check("04.2", my_function)` or `check("04.3", my_number)`. What is asked is compared with the
exercise's `truth`; where it differs, with each known mistake, whose hint is shown. A `truth` is never the code of
the package: it computes the same thing in another way (a loop, a limit, an enumeration, numpy).
"""

import dataclasses
import importlib
import math
import os
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..errors import UserError, described


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A known wrong answer: what it gives on the same inputs, and the hint that names it."""

    hint: str
    answer: Callable | Any  # a function for a function exercise, else a value or a function without arguments


@dataclasses.dataclass(frozen=True)
class Exercise:
    """One exercise: a function to write (`inputs` given) or a value to find (`inputs` is None).

    inputs(rng) -> dict of keyword arguments, fresh for each of `trials`; tensors that require grad have their
    gradients compared too, so that a wrong `detach` is found.
    truth(**inputs) -> the right answer: tensor, array, number, string, bool, or a tuple, list or dict of these.
    setup: for a prediction, `truth` takes no arguments and computes what is right.
    """

    name: str  # notebook.number, as in "04.2"
    title: str
    truth: Callable
    inputs: Callable[[np.random.Generator], dict] | None = None
    mistakes: tuple[Mistake, ...] = ()
    praise: str = ""  # one more sentence when it is right: why it matters
    trials: int = 5
    tolerance: float = 1e-5
    examine: Callable[[Any], str | None] | None = None  # more to ask of an answer; returns a hint or None


@dataclasses.dataclass(frozen=True)
class Result:
    """What a check found: passed is True, False, or None where nothing was attempted."""

    name: str
    title: str
    passed: bool | None
    message: str

    def __repr__(self) -> str:
        mark = {True: "✓ right", False: "✗ not yet", None: "… not attempted yet"}[self.passed]
        return f"Exercise {self.name}, {self.title}: {mark}" + (f". {self.message}" if self.message else "")

    def __bool__(self) -> bool:
        return self.passed is True


class NotPassed(AssertionError):
    """Raised by `require`, which graders call."""


def exercise(name: str) -> Exercise:
    """The exercise of that name, from the module of its notebook."""
    try:
        module = importlib.import_module(f"{__name__}.nb{name.split('.')[0]}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"there is no exercise {name!r}: names look like '04.2', notebook and number"
        ) from error
    found = {e.name: e for e in module.EXERCISES}
    if name not in found:
        raise UserError(f"there is no exercise {name!r}: this notebook has {', '.join(found)}")
    return found[name]


def check(name: str, answer, *, seed: int | None = None) -> Result:
    """Compare an answer with the truth; say what is likely wrong. Never raises for what the answer does."""
    task = exercise(name)
    if seed is None:
        seed = int(os.environ.get("RLHF_EDU_CHECK_SEED", "0"))
    passed, message = judge(task, answer, seed)
    return Result(task.name, task.title, passed, message)


def require(name: str, answer) -> None:
    """For graders: raise unless the exercise is solved; the message is the student's feedback."""
    result = check(name, answer)
    if not result:
        raise NotPassed(repr(result))


def judge(task: Exercise, answer, seed: int = 0) -> tuple[bool | None, str]:
    if not attempted(answer):
        return None, ""
    if task.inputs is None:
        truth = task.truth()
        if difference := compare(answer, truth, task.tolerance, tell=False):
            return False, mistake_of(
                task, lambda m: compare(answer, value_of(m.answer), task.tolerance)
            ) or difference
    else:
        if not callable(answer):
            return False, f"this exercise asks for a function, and this is {describe(answer)}."
        trials = []
        for trial in range(task.trials):
            arguments = lambda t=trial: task.inputs(
                np.random.default_rng([seed, zlib.crc32(task.name.encode()), t])
            )
            try:
                given = run(answer, arguments())
            except NotImplementedError:  # raised by the stub that the student edition has for a solution
                return None, ""
            except Exception as error:  # noqa: BLE001  the student's own code: any error is an answer to speak about
                return False, f"your function stopped with {described(error)}"
            if trial == 0 and not attempted(given[0]):
                return None, ""
            trials.append((arguments, given))
        differences = [
            different(given, run(task.truth, arguments()), task.tolerance) for arguments, given in trials
        ]
        if first := next((d for d in differences if d), None):

            def unlike(mistake):
                return any(
                    different(given, run(mistake.answer, arguments()), task.tolerance)
                    for arguments, given in trials
                )

            return False, mistake_of(task, unlike) or first
    if task.examine and (hint := task.examine(answer)):
        return False, hint
    return True, task.praise


def attempted(answer) -> bool:
    return not (answer is None or answer is Ellipsis or isinstance(answer, str) and not answer.strip())


def value_of(answer):
    return answer() if callable(answer) else answer


def run(function: Callable, arguments: dict) -> tuple[Any, dict]:
    """(what it returns, the gradients of its sum with respect to the inputs that require one)."""
    wanted = {k: v for k, v in arguments.items() if torch.is_tensor(v) and v.requires_grad}
    out = function(**arguments)
    gradients = {}
    if wanted and attempted(out):
        parts = [o for o in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(o)]
        total = sum((p.double().sum() for p in parts if p.requires_grad), torch.zeros(()))
        if total.requires_grad:
            found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
            gradients = {k: g for k, g in zip(wanted, found, strict=True) if g is not None}
        gradients = {k: gradients.get(k, torch.zeros_like(v)) for k, v in wanted.items()}
    return out, gradients


def mistake_of(task: Exercise, unlike: Callable[[Mistake], Any]) -> str | None:
    for mistake in task.mistakes:
        try:
            if not unlike(mistake):
                return mistake.hint
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue  # a mistake that cannot be computed on these inputs is not this one
    return None


def different(given, expected, tolerance: float) -> str | None:
    (value, gradients), (true_value, true_gradients) = given, expected
    if text := compare(value, true_value, tolerance):
        return text
    for name, gradient in true_gradients.items():
        if compare(gradients[name], gradient, max(tolerance, 1e-5)):
            if not gradients[name].any():
                return f"the values are right, but no gradient reaches {name}: something is detached."
            return f"the values are right, but the gradient with respect to {name} is not."
    return None


def compare(value, truth, tolerance: float, tell: bool = True) -> str | None:
    """None where they agree, else one sentence about the first difference; `tell` says the true number in it."""
    if isinstance(truth, dict):
        if not isinstance(value, dict) or set(value) != set(truth):
            return f"a dict with {', '.join(map(str, truth))} is asked for, and this is {describe(value)}."
        return next(
            (f"{k}: {text}" for k in truth if (text := compare(value[k], truth[k], tolerance, tell))), None
        )
    if isinstance(truth, tuple | list):
        if (torch.is_tensor(value) or isinstance(value, np.ndarray)) and value.ndim:
            value = tuple(value)  # of np.quantile, for instance
        if not isinstance(value, tuple | list) or len(value) != len(truth):
            return f"{len(truth)} things are asked for in this order, and this is {describe(value)}."
        return next(
            (f"part {i + 1}: {text}" for i, (v, t) in enumerate(zip(value, truth, strict=True))
             if (text := compare(v, t, tolerance, tell))), None,
        )  # fmt: skip
    if isinstance(truth, str):
        if not isinstance(value, str):
            return f"a text is asked for, and this is {describe(value)}."
        same = letters(value) == letters(truth)  # "(a)" is a, "R, F" is RF
        return None if same else f"{value.strip()!r} is not it."
    try:
        v = np.asarray(value.detach().cpu() if torch.is_tensor(value) else value, dtype=float)
    except (TypeError, ValueError):
        return f"numbers are asked for, and this is {describe(value)}."
    t = np.asarray(truth.detach().cpu() if torch.is_tensor(truth) else truth, dtype=float)
    if v.shape != t.shape:
        return f"the shape is {v.shape}, and {t.shape} is asked for."
    if np.isnan(v).any() and not np.isnan(t).any():
        return "some of the values are NaN."
    if np.allclose(v, t, rtol=tolerance, atol=tolerance, equal_nan=True):
        return None
    where = np.unravel_index(int(np.nanargmax(np.abs(np.where(np.isfinite(v), v, 1e30) - t))), t.shape)
    place = f" at {tuple(map(int, where))}" if t.shape else ""
    return f"{short(v[where])}{place} " + (f"should be {short(t[where])}." if tell else "is not it.")


def letters(text: str) -> str:
    return "".join(c for c in text.lower() if c not in "()[]., \n")


def short(number: float) -> str:
    return f"{number:.6g}" if math.isfinite(number) else str(number)


def describe(value) -> str:
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        return f"{'a tensor' if torch.is_tensor(value) else 'an array'} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (
        " of length " + str(len(value)) if isinstance(value, tuple | list) else ""
    )
