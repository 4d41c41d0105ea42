"""Arena-Hard's scores (Bradley-Terry, bootstrap, style control), MT-Bench's grades and their variance, and power:
what a benchmark of so many prompts can tell apart."""

from numbers import Integral, Real

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit

from .errors import UserError, numbers
from .training import rng
from .win_rates import fit_logistic

ELO = 400 / np.log(10)  # points of an Elo scale a unit of log-odds


def battles(names, preferences, baseline: str, lengths=None, *, weights=None) -> pd.DataFrame:
    """The table `arena_scores` takes, from preferences (models, prompts) of each of `names` against `baseline`.

    lengths: (models + 1, prompts), the baseline's last. weights: (models, prompts) whole numbers, how often a verdict
    counts: Arena-Hard v0.1 takes 3 for "much better" and 1 otherwise.
    """
    preferences = numbers("preferences", preferences)
    if preferences.ndim != 2 or len(preferences) != len(names):
        raise UserError(f"{len(names)} names need preferences (models, prompts), one row each")
    weights = np.ones_like(preferences) if weights is None else numbers("weights", weights)
    if weights.shape != preferences.shape:
        raise UserError(
            f"weights have shape {weights.shape}, preferences {preferences.shape}: give one for each"
        )
    if (weights < 0).any() or (weights % 1).any():
        raise UserError("weights say how often a verdict counts: give whole numbers, 0 or more")
    if lengths is not None and (lengths := numbers("lengths", lengths)).shape != (
        len(names) + 1,
        preferences.shape[1],
    ):
        raise UserError(
            f"lengths have shape {lengths.shape}: give one row for each of {len(names)} models and one for the baseline, "
            f"{preferences.shape[1]} prompts each"
        )
    parts = []
    for row, name in enumerate(names):
        part = pd.DataFrame({"prompt": np.arange(preferences.shape[1]), "first": name, "second": baseline})
        part["preference"] = preferences[row]
        part["weight"] = weights[row]
        if lengths is not None:
            part["first_length"], part["second_length"] = lengths[row], lengths[-1]
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def bradley_terry(
    table: pd.DataFrame, baseline: str, *, style: bool = False, ridge: float = 1e-2
) -> pd.Series:
    """Strength of each model in log-odds, the baseline's 0: P(first wins) = sigmoid(strength first - second).

    table: rows first, second, preference of first (0, 0.5, 1), weight if any. style: one more coefficient ("length",
    given back with the others) takes what the length difference explains, measured as Chatbot Arena's style
    control does: (first - second) / (first + second), standardized. A small ridge keeps a model that never loses
    finite.
    """
    models, x, p, repeats = _design(table, baseline, style)
    rows = np.repeat(np.arange(len(p)), repeats)
    return pd.Series(fit_logistic(p[rows], x[rows], ridge=ridge), index=models)


def arena_scores(
    table: pd.DataFrame,
    baseline: str,
    *,
    style: bool = False,
    resamples: int = 100,
    seed: int = 0,
    ridge=1e-2,
) -> pd.DataFrame:
    """Arena-Hard's table: for each model the percent of wins against `baseline` that its strength stands for, the 95 %
    interval over resampled prompts (100 resamples, as there), and Elo points relative to the baseline."""
    models, x, p, repeats = _design(table, baseline, style)
    groups = list(table.reset_index(drop=True).groupby("prompt").indices.values())
    draws = rng(seed, 47).integers(len(groups), size=(resamples, len(groups)))
    strengths = []
    for drawn in [np.arange(len(groups)), *draws]:
        rows = np.concatenate([groups[g] for g in drawn])
        rows = np.repeat(rows, repeats[rows])
        strengths.append(fit_logistic(p[rows], x[rows], ridge=ridge))
    strengths = np.array(strengths)
    rates = 100 * expit(strengths)
    low, high = np.quantile(rates[1:], [0.025, 0.975], axis=0)
    result = pd.DataFrame(
        {"score": rates[0], "low": low, "high": high, "elo": ELO * strengths[0]}, index=models
    )
    result.loc[baseline] = [50.0, 50.0, 50.0, 0.0]
    return result.drop(index="length", errors="ignore").sort_values("score", ascending=False)


def _design(table: pd.DataFrame, baseline: str, style: bool):
    """(names of the columns, design matrix, preferences, how often each row counts)."""
    needed = ["prompt", "first", "second", "preference"] + ["first_length", "second_length"] * style
    if missing := [c for c in needed if c not in table]:
        raise UserError(f"the table of battles lacks the column {missing[0]!r}: it needs {', '.join(needed)}")
    names = sorted(set(table["first"]) | set(table["second"]))
    if baseline not in names:
        raise UserError(f"no battle has {baseline!r}: the baseline must be one of {', '.join(names)}")
    names.remove(baseline)
    preferences = table["preference"].to_numpy(float)
    if not ((preferences >= 0) & (preferences <= 1)).all():
        raise UserError("preferences must be numbers from 0 (second won) to 1 (first won), none missing")
    columns = [(table["first"] == n).to_numpy(float) - (table["second"] == n).to_numpy(float) for n in names]
    if style:
        first, second = table["first_length"].to_numpy(float), table["second_length"].to_numpy(float)
        difference = (first - second) / np.maximum(first + second, 1)
        columns.append(difference / (difference.std() or 1.0))
        names.append("length")
    repeats = table["weight"].to_numpy(int) if "weight" in table else np.ones(len(table), dtype=int)
    return names, np.stack(columns, axis=1), preferences, repeats


# --- single-answer grading ---------------------------------------------------------------------------------------


def simulated_grades(scores, *, judgments: int = 1, noise: float = 1.0, seed: int = 0) -> np.ndarray:
    """(prompts, judgments) whole grades 1 to 10 of scores (prompts,) in [0, 1], as an MT-Bench judge gives them.

    noise: standard deviation of one judgment before it is rounded, in grades.
    """
    scores = numbers("scores", scores)[:, None]
    if judgments < 1 or not noise >= 0:
        raise UserError(f"judgments is {judgments} and noise {noise}: take 1 or more, and 0 or more")
    draw = rng(seed, 53).normal(size=(len(scores), judgments))
    return np.clip(np.round(1 + 9 * scores + noise * draw), 1, 10)


def grade_variance(grades) -> dict:
    """Where the uncertainty of a mean grade comes from; grades (prompts, judgments), two judgments or more.

    {"mean", "error": its standard error over prompts, "prompts": variance between prompts, "judge": variance between
    judgments of one answer, "error_of_one": the standard error with a single judgment a prompt,
    "error_without_noise": with a judge who always gives an answer the same grade}. More judgments remove the
    judge's part only; the prompts' part needs more prompts. One-way analysis of variance.
    """
    grades = numbers("grades", grades)
    if grades.ndim != 2 or min(grades.shape) < 2:
        raise UserError("grade_variance needs grades (prompts, judgments), two of each or more")
    prompts, judgments = grades.shape
    judge = grades.var(axis=1, ddof=1).mean()
    of_means = grades.mean(axis=1).var(ddof=1)
    between = max(0.0, of_means - judge / judgments)
    return {
        "mean": float(grades.mean()),
        "error": float(np.sqrt(of_means / prompts)),
        "prompts": float(between),
        "judge": float(judge),
        "error_of_one": float(np.sqrt((between + judge) / prompts)),
        "error_without_noise": float(np.sqrt(between / prompts)),
    }


# --- power -------------------------------------------------------------------------------------------------------


def power(
    prompts: int,
    rate: float,
    other: float | None = None,
    *,
    spread: float = 1.5,
    runs: int = 2000,
    seed: int = 0,
) -> float:
    """Share of simulated benchmarks that tell a model of true win rate `rate` (percent) from another, at 5 %.

    other: the second model's win rate against the same baseline on the same prompts (a paired comparison); None: is
    the model better or worse than the baseline itself? spread: standard deviation of the prompts' ease in log-odds,
    which both models share.
    """
    whole = all(isinstance(x, Integral) for x in (prompts, runs))
    real = all(isinstance(x, Real) for x in (rate, spread, 50 if other is None else other))
    fine = whole and real and prompts >= 2 and runs >= 1 and 0 <= spread <= 20
    if not fine or not 0 < rate < 100 or not (other is None or 0 < other < 100):
        raise UserError(
            "power needs two prompts or more, one run or more, win rates above 0 and below 100 percent, and a spread "
            "from 0 to 20"
        )
    generator = rng(seed, 59, prompts)
    ease = spread * generator.normal(size=(runs, prompts))
    wins = (generator.random(ease.shape) < expit(_strength(rate, spread) + ease)).astype(float)
    if other is None:
        difference = wins - 0.5
    else:
        difference = wins - (generator.random(ease.shape) < expit(_strength(other, spread) + ease))
    error = difference.std(axis=1, ddof=1) / np.sqrt(prompts)
    return float(np.mean(np.abs(difference.mean(axis=1)) > 1.96 * error))


def smallest_difference(prompts: int, *, wanted: float = 0.8, paired: bool = True, **settings) -> float:
    """Points above 50 % that a model needs to be told apart with power `wanted`, found by halving an interval.

    paired: from another model that wins 50 % against the same baseline; otherwise from the baseline itself.
    """
    low, high = 0.0, 49.9
    for _ in range(12):
        middle = (low + high) / 2
        enough = power(prompts, 50 + middle, 50.0 if paired else None, **settings) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return high


def _strength(rate: float, spread: float) -> float:
    """The log-odds whose win rate, averaged over prompts of normal ease, is `rate` percent."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    weights = weights / weights.sum()
    return brentq(lambda s: weights @ expit(s + spread * nodes) - rate / 100, -60, 60)
