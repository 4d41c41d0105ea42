"""What the bad-input tests share: drawn cases that are counted, and what counts as a sentence of ours.

"Of ours" means that the error was raised by a `raise` in this package: not by torch, numpy, json or Python, whose words
speak of our code and not of what the caller did.
"""

import inspect
import linecache
import math
import traceback
from pathlib import Path

import numpy as np
import pytest

hypothesis = pytest.importorskip("hypothesis", reason="draws the inputs: pip install -e '.[dev]'")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlhf_edu
from rlhf_edu.errors import UserError

PACKAGE = str(Path(rlhf_edu.__file__).parent)
NAN, INF = math.nan, math.inf
REFUSED = object()

text = st.text(max_size=30)
number = st.sampled_from([0.0, 1.0, -1.0, 0.1, 2.5, 1e-8, 1e30, NAN, INF, -INF])
junk = st.sampled_from([None, "x", "", [], [1.0], {}, b"\xff", 3, -1, NAN, np.zeros(2), (), object()])


class Cases:
    """`@cases(count, name=strategy, ...)`: `count` drawn cases of a test, the same on every run; they are counted."""

    def __init__(self):
        self.run, self.done, self.tests = 0, set(), set()

    def __call__(self, count: int, /, **drawn):
        def decorate(function):
            def counted(*args, **kwargs):
                self.run += 1
                self.done.add(function.__name__)
                return function(*args, **kwargs)

            counted.__signature__ = inspect.signature(function)
            counted.__name__ = function.__name__
            self.tests.add(function.__name__)
            quiet = [
                HealthCheck.function_scoped_fixture,
                HealthCheck.too_slow,
                HealthCheck.data_too_large,
            ]
            options = settings(
                max_examples=count,
                derandomize=True,
                deadline=None,
                database=None,
                suppress_health_check=quiet,
            )
            return options(given(**drawn)(counted))

        return decorate

    def at_least(self, count: int) -> None:
        if self.done != self.tests:
            pytest.skip("only some of this file's tests were run")
        print(self.run, "cases")
        assert self.run >= count


def result(function, *args, **kwargs):
    """What the function returns, or REFUSED where it raised one sentence of ours."""
    try:
        return function(*args, **kwargs)
    except (UserError, ValueError, TypeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        line = linecache.getline(last.filename, last.lineno).strip()
        said = f"{type(error).__name__} from {last.filename}:{last.lineno}: {error}"
        assert last.filename.startswith(PACKAGE) and line.startswith("raise"), f"not of ours: {said}"
        message = str(error)
        assert "\n" not in message and 20 < len(message) < 700, said
        assert any(mark in message for mark in ":;,"), f"what to do is not said: {said}"
        return REFUSED
