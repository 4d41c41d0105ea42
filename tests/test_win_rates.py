"""Raw and length-controlled win rates: a synthetic judge that likes length, invariances, and AlpacaEval itself."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import spearmanr

from rlhf_edu import evaluate
from rlhf_edu.evaluate import length_controlled_win_rate, win_rate
from rlhf_edu.win_rates import (
    bootstrap,
    fit_logistic,
    length_features,
    predicted_win_rate,
    prompt_difficulty,
)


def made_up(seed: int, padding: float, strength: float = -0.5, prompts: int = 4000):
    """A model judged by one who likes length: (preferences, model lengths, baseline lengths, difficulty)."""
    rng = np.random.default_rng(seed)
    baseline = rng.normal(1000, 200, prompts)
    model = baseline + padding + rng.normal(0, 300, prompts)
    difficulty = rng.normal(0, 1, prompts)
    p = expit(strength + 0.9 * difficulty + 1.5 * np.tanh((model - baseline) / 300))
    return (rng.random(prompts) < p).astype(float), model, baseline, difficulty


def test_padding_raises_the_raw_rate_but_not_the_controlled_one():
    rates = {padding: made_up(padding, padding) for padding in (0, 150, 300)}
    raw = [win_rate(columns[0]) for columns in rates.values()]
    controlled = [length_controlled_win_rate(*columns) for columns in rates.values()]
    truth = 100 * expit(-0.5 + 0.9 * np.random.default_rng(9).normal(size=100_000)).mean()
    assert raw[0] + 5 < raw[1] and raw[1] + 5 < raw[2]
    assert controlled == pytest.approx([truth] * 3, abs=4)


def test_the_design_names_are_in_evaluate():
    assert evaluate.win_rate is win_rate
    assert evaluate.length_controlled_win_rate is length_controlled_win_rate


@pytest.mark.parametrize("with_difficulty", [True, False])
def test_swapping_model_and_baseline_gives_the_rest_of_100(with_difficulty):
    p, model, baseline, difficulty = made_up(3, 200, prompts=300)
    difficulty = difficulty if with_difficulty else None
    there = length_controlled_win_rate(p, model, baseline, difficulty)
    back = length_controlled_win_rate(1 - p, baseline, model, difficulty)
    assert there + back == pytest.approx(100, abs=1e-8)
    assert win_rate(p) + win_rate(1 - p) == pytest.approx(100)


def test_units_of_length_and_order_of_prompts_do_not_matter():
    p, model, baseline, difficulty = made_up(4, 100, prompts=200)
    value = length_controlled_win_rate(p, model, baseline, difficulty)
    assert length_controlled_win_rate(p, 7 * model + 3, 7 * baseline + 3, difficulty) == pytest.approx(value)
    order = np.random.default_rng(0).permutation(200)
    shuffled = (c[order] for c in (p, model, baseline, difficulty))
    assert length_controlled_win_rate(*shuffled) == pytest.approx(value)


def test_the_baseline_against_itself_has_50():
    lengths = np.arange(20.0)
    assert length_controlled_win_rate(np.full(20, 0.5), lengths, lengths, lengths) == pytest.approx(50)


def test_winning_everything_stays_finite():
    value = length_controlled_win_rate(np.ones(50), np.arange(50.0), np.arange(50.0)[::-1])
    assert 90 < value < 100


def test_fit_against_a_general_minimizer():
    rng = np.random.default_rng(5)
    x, p = rng.normal(size=(60, 3)), rng.random(60)

    def loss(w):
        q = expit(x @ w)
        return -(p * np.log(q) + (1 - p) * np.log(1 - q)).sum() + 0.7 / 2 * (w**2).sum()

    assert fit_logistic(p, x, ridge=0.7) == pytest.approx(minimize(loss, np.zeros(3), tol=1e-12).x, abs=1e-5)


def test_features_by_hand():
    x = length_features([10, 20, 30], [30, 20, 10], [0.5, 0, -1])
    assert x[:, 0] == pytest.approx([np.tanh(1), 0, -np.tanh(1)])  # a long model: negative
    assert x[:, 1:].tolist() == [[0.5, 1], [0, 1], [-1, 1]]


def test_prediction_is_the_mean_after_the_sigmoid():
    assert predicted_win_rate([-9, 2, 0.5], [1, -1]) == pytest.approx(50 * (expit(2.5) + expit(-1.5)))


def test_prompt_difficulty_is_recovered():
    rng = np.random.default_rng(6)
    ease, strength = rng.normal(size=40), rng.normal(size=30)
    found = prompt_difficulty(expit(strength[:, None] + ease))
    assert np.corrcoef(found, ease)[0, 1] > 0.99
    assert abs(found.mean()) < 1e-9


def test_bootstrap_over_prompts():
    rng = np.random.default_rng(7)
    p = (rng.random(400) < 0.6).astype(float)
    value, low, high = bootstrap(win_rate, p)
    half = 100 * 1.96 * np.sqrt(0.6 * 0.4 / 400)
    assert value == win_rate(p) and low < value < high
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert bootstrap(win_rate, p) == (value, low, high)  # the seed fixes it
    twice = bootstrap(win_rate, np.stack([p, p], axis=1))  # asked twice, known no better
    assert twice == pytest.approx((value, low, high))


def test_bad_input_is_explained(one_sentence):
    with one_sentence("3 preferences and 2 lengths"):
        length_controlled_win_rate([1, 0, 1], [1, 2], [3, 5], [0, 0])
    with one_sentence("3 model lengths, 2 baseline lengths"):
        length_controlled_win_rate([1, 0, 1], [1, 2, 3], [3, 4], [0, 0, 0])
    with one_sentence("baseline lengths, entry 1"):
        length_controlled_win_rate([1, 0], [1, 2], [3, float("nan")], [0, 0])
    with one_sentence("by the same 5"):
        length_controlled_win_rate([1, 0], [1, 2], [6, 7], [0, 0])
    with one_sentence("from 0 (lost) to 1 (won)"):
        length_controlled_win_rate([2, 1], [1, 2], [6, 8], [0, 0])
    with one_sentence("two prompts"):
        length_controlled_win_rate([1], [1], [6], [0])
    with one_sentence("one row a model"):
        prompt_difficulty([1, 0])
    with one_sentence("one length"):
        bootstrap(win_rate, [1, 0], [1])


# --- AlpacaEval 2 itself, where it is at hand: the folder holds annotations.csv.gz, instructions.csv, leaderboard.csv


@pytest.fixture(scope="module")
def alpaca_eval():
    folder = os.environ.get("RLHF_EDU_ALPACA_EVAL")
    if not folder:
        pytest.skip("RLHF_EDU_ALPACA_EVAL names no folder")
    leaderboard = pd.read_csv(Path(folder) / "leaderboard.csv").set_index("model")
    difficulty = pd.read_csv(Path(folder) / "instructions.csv").set_index("index")["instruction_difficulty"]
    return leaderboard, difficulty, pd.read_csv(Path(folder) / "annotations.csv.gz")


def test_official_weights_give_the_official_rates(alpaca_eval):
    leaderboard, difficulty, _ = alpaca_eval
    fitted = leaderboard.dropna()  # one model's weights were never published
    found = [
        predicted_win_rate([m.glm_length, m.glm_difficulty, m.glm_bias], difficulty)
        for m in fitted.itertuples()
    ]
    errors = np.abs(np.array(found) - fitted["length_controlled_win_rate"])
    exact = errors < 1e-6
    print(f"\nfrom the weights: {exact.sum()} of {len(fitted)} exact; {errors[~exact].round(4).to_dict()}")
    # four models have answers to fewer than 805 prompts; a constant output is off by 0.13
    assert len(fitted) >= 30 and (~exact).sum() <= 5 and errors.max() < 0.2


def test_refitted_rates_are_close_to_the_official_ones(alpaca_eval):
    leaderboard, difficulty, annotations = alpaca_eval
    rows = []
    for model, part in annotations.groupby("model"):
        found = length_controlled_win_rate(
            part["p_model_wins"], part["model_len"], part["baseline_len"], difficulty[part["index"]]
        )
        official = leaderboard.loc[model]
        rows.append((official["length_controlled_win_rate"], found, win_rate(part["p_model_wins"])))
        assert rows[-1][2] == pytest.approx(official["win_rate"], abs=0.01)
    official, found, raw = np.array(rows).T
    errors, rho = np.abs(found - official), spearmanr(found, official).statistic
    print(
        f"\nrefitted: {len(rows)} models, median error {np.median(errors):.3f}, mean {errors.mean():.3f}, "
        f"largest {errors.max():.2f}, Spearman {rho:.4f} (raw rate: {spearmanr(raw, official).statistic:.4f})"
    )
    assert np.median(errors) <= 1.2 and rho >= 0.97


def test_estimated_difficulty_resembles_the_published_one(alpaca_eval):
    _, difficulty, annotations = alpaca_eval
    table = annotations.pivot(index="model", columns="index", values="p_model_wins").dropna(axis=1)
    found = prompt_difficulty(table)
    rho = spearmanr(found, difficulty[table.columns]).statistic
    print(f"\ndifficulty from {len(table)} models: Spearman {rho:.3f}")
    assert rho > 0.75
