"""Bradley-Terry scores with intervals and style control, grades and their variance, power against closed forms."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from scipy.stats import norm

from rlhf_edu.arena import (
    ELO,
    arena_scores,
    battles,
    bradley_terry,
    grade_variance,
    power,
    simulated_grades,
    smallest_difference,
)


def wins(rates, prompts=400, seed=0):
    return (np.random.default_rng(seed).random((len(rates), prompts)) < np.array(rates)[:, None]).astype(
        float
    )


def test_against_one_baseline_bradley_terry_is_the_win_rate():
    preferences = wins([0.3, 0.7])
    strengths = bradley_terry(battles(["a", "b"], preferences, "base"), "base", ridge=1e-9)
    assert strengths["a"] == pytest.approx(logit(preferences[0].mean()))
    assert strengths["b"] == pytest.approx(logit(preferences[1].mean()))


def test_strengths_of_a_tournament_are_recovered():
    rng = np.random.default_rng(1)
    truth = {"base": 0.0, "a": 0.8, "b": -0.5, "c": 1.4}
    names = list(truth)
    rows = []
    for prompt in range(6000):
        first, second = rng.choice(names, 2, replace=False)
        won = float(rng.random() < expit(truth[first] - truth[second]))
        rows.append({"prompt": prompt, "first": first, "second": second, "preference": won})
    found = bradley_terry(pd.DataFrame(rows), "base")
    for name in ("a", "b", "c"):
        assert found[name] == pytest.approx(truth[name], abs=0.15)
    other = bradley_terry(pd.DataFrame(rows), "a", ridge=1e-6)  # another anchor moves all strengths alike
    anchored = bradley_terry(pd.DataFrame(rows), "base", ridge=1e-6)
    assert other["c"] - other["base"] == pytest.approx(anchored["c"], abs=1e-4)


def test_scores_and_intervals():
    table = arena_scores(battles(["weak", "strong"], wins([0.4, 0.8]), "base"), "base", resamples=300)
    assert table.index.tolist() == ["strong", "base", "weak"]
    assert table.loc["base"].tolist() == [50, 50, 50, 0]
    assert (table["low"] <= table["score"]).all() and (table["score"] <= table["high"]).all()
    assert table.loc["strong", "elo"] == pytest.approx(ELO * logit(table.loc["strong", "score"] / 100))
    half = 100 * 1.96 * np.sqrt(0.8 * 0.2 / 400)
    assert (table["high"] - table["low"])["strong"] / 2 == pytest.approx(half, rel=0.25)


def test_a_weight_counts_a_verdict_again():
    preferences = np.array([[1.0, 0.0, 0.0]])
    table = battles(["a"], preferences, "base", weights=np.array([[3, 1, 1]]))
    assert arena_scores(table, "base", ridge=1e-9).loc["a", "score"] == pytest.approx(60)


def test_never_losing_stays_finite():
    assert 90 < arena_scores(battles(["a"], np.ones((1, 20)), "base"), "base").loc["a", "score"] < 100


def test_style_control_takes_what_length_explains():
    """Two models of equal strength; one is long, and the judge likes length."""
    rng = np.random.default_rng(2)
    base = rng.normal(1000, 100, 3000)
    lengths = np.stack([base * rng.normal(1.5, 0.3, 3000), base * rng.normal(1.0, 0.3, 3000), base])
    relative = (lengths[:2] - base) / (lengths[:2] + base)
    preferences = (rng.random((2, 3000)) < expit(6 * relative)).astype(float)
    table = battles(["long", "same"], preferences, "base", lengths)
    raw, controlled = (arena_scores(table, "base", style=style, resamples=20) for style in (False, True))
    assert raw.loc["long", "score"] > 65
    assert controlled.loc["long", "score"] == pytest.approx(50, abs=5)
    assert controlled.loc["same", "score"] == pytest.approx(50, abs=5)
    assert bradley_terry(table, "base", style=True)["length"] > 0


def test_swapping_first_and_second_changes_nothing():
    table = battles(["a", "b"], wins([0.3, 0.7]), "base", np.random.default_rng(3).uniform(5, 9, (3, 400)))
    names = {"first": "second", "second": "first", "first_length": "second_length"}
    names["second_length"] = "first_length"
    swapped = table.rename(columns=names).assign(preference=1 - table["preference"])
    for style in (False, True):
        there, back = (bradley_terry(t, "base", style=style) for t in (table, swapped))
        assert there.to_dict() == pytest.approx(back.to_dict(), abs=1e-8)


def test_grades():
    grades = simulated_grades([0, 0.5, 1], judgments=50, noise=0)
    assert grades.shape == (3, 50) and grades[:, 0].tolist() == [1, 6, 10]
    rng = np.random.default_rng(4)
    true = rng.normal(6, 2.0, 4000)[:, None]
    parts = grade_variance(true + rng.normal(0, 1.5, (4000, 3)))
    assert parts["prompts"] == pytest.approx(4, rel=0.1) and parts["judge"] == pytest.approx(2.25, rel=0.1)
    assert parts["error"] == pytest.approx(np.sqrt((4 + 2.25 / 3) / 4000), rel=0.05)
    assert parts["error_of_one"] == pytest.approx(np.sqrt((4 + 2.25) / 4000), rel=0.05)
    assert parts["error_without_noise"] < parts["error"] < parts["error_of_one"]


def test_power_against_the_normal_approximation():
    for prompts, rate in ((80, 60), (805, 54)):
        shift = (rate - 50) / 100 / np.sqrt(rate / 100 * (1 - rate / 100) / prompts)
        expected = norm.sf(1.96 - shift) + norm.cdf(-1.96 - shift)
        assert power(prompts, rate) == pytest.approx(expected, abs=0.04)
    assert power(500, 50) == pytest.approx(0.05, abs=0.02)  # nothing to find: 5 % false alarms
    assert power(500, 40, 40) == pytest.approx(0.05, abs=0.02)


def test_the_same_prompts_help():
    shared = power(500, 55, 50, spread=3.0, runs=1000)
    assert shared > power(500, 55, 50, spread=0.0, runs=1000) + 0.1


def test_smallest_difference():
    found = [smallest_difference(n, runs=500, paired=False) for n in (805, 500, 80)]
    assert found[0] < found[1] < found[2]
    assert found[0] == pytest.approx(100 * (1.96 + 0.84) * 0.5 / np.sqrt(805), rel=0.1)
    assert smallest_difference(500, runs=500) > found[1] * 0.9  # a second model adds noise of its own


def test_bad_input_is_explained(one_sentence):
    with one_sentence("one row each"):
        battles(["a", "b"], [[1, 0]], "base")
    with one_sentence("first_length"):
        bradley_terry(battles(["a"], [[1, 0]], "base"), "base", style=True)
    with one_sentence("'other'"):
        bradley_terry(battles(["a"], [[1, 0]], "base"), "other")
    with one_sentence("0 (second won)"):
        bradley_terry(battles(["a"], [[2, 0]], "base"), "base")
    with one_sentence("two of each"):
        grade_variance([[1], [2]])
    with one_sentence("two prompts or more"):
        power(80, 100)
