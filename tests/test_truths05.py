"""The broken trainings of notebook 05 show the symptoms by which students are to tell them."""

import math

import pytest

from rlhf_edu.checks.truths05 import BUGS, mystery_runs, toy_run


def test_each_bug_has_the_symptom_that_its_hint_speaks_of():
    right = toy_run()
    runs = dict(zip(BUGS.values(), mystery_runs().values(), strict=True))
    for name, rows in runs.items():
        assert (abs(rows[0]["loss"] - math.log(2)) < 1e-6) == (name != "train mode")
        assert len(rows) == len(right)
    assert right[-1]["accuracy"] == 1 and right[-1]["loss"] < 0.1
    assert all(row["margin"] == 0 and row["loss"] == pytest.approx(math.log(2)) for row in runs["no copy"])
    assert runs["swapped"][-1]["accuracy"] < 0.1 and runs["swapped"][-1]["margin"] < -3
    assert runs["swapped"][-1]["loss"] < 0.1, "by its loss alone it looks excellent"
    assert runs["mean"][-1]["accuracy"] > 0.9 and 0 < runs["mean"][-1]["margin"] < 0.2 * right[-1]["margin"]
    assert runs["train mode"][-1]["accuracy"] > 0.9


def test_the_runs_are_the_same_each_time():
    assert toy_run("mean", steps=3) == toy_run("mean", steps=3)
