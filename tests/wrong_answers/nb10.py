"""Answers to the exercises of notebook 10 as students write them."""

import numpy as np
import pandas as pd

WRONG, RIGHT = {}, {}

# --- 10.1 a win rate with ties ---


def win_rate(answers, policy_is_first):
    points = [0.5 if a == "tie" else float((a == "A") == bool(f)) for a, f in zip(answers, policy_is_first)]
    return 100 * sum(points) / len(points)


def win_rate_numpy(answers, policy_is_first):
    answers = np.array(answers)
    mine = np.where(policy_is_first, "A", "B")
    return 100 * np.mean((answers == mine) + 0.5 * (answers == "tie"))


def points_of(rule, keep=lambda a, f: True):
    """rule(answer, policy is first) -> points, of the pairs that are kept."""

    def answer(answers, policy_is_first):
        pairs = [(a, f) for a, f in zip(answers, policy_is_first) if keep(a, f)]
        return 100 * sum(rule(a, f) for a, f in pairs) / len(pairs)

    return answer


won = lambda a, f: float(a == ("A" if f else "B"))
RIGHT["10.1"] = [win_rate, win_rate_numpy, points_of(lambda a, f: 0.5 if a == "tie" else won(a, f))]
WRONG["10.1"] = [
    (points_of(lambda a, f: 0.5 if a == "tie" else float(a == "A")), "swapped back"),
    (points_of(won, keep=lambda a, f: a != "tie"), "left out"),
    (points_of(won), "as lost"),
    (points_of(lambda a, f: 1.0 if a == "tie" else won(a, f)), "as won"),
    (points_of(lambda a, f: 0.5 if a == "tie" else 1 - won(a, f)), "baseline's"),
    (lambda **given: win_rate(**given) / 100, "share"),
    (points_of(lambda a, f: 0.5 if a == "tie" else won(a, f), keep=lambda a, f: f), "first place"),
    (points_of(lambda a, f: float(a == "A")), "should be"),
    (lambda **given: round(win_rate(**given)) + 0.5, "should be"),
    (lambda answers, policy_is_first: answers.mean(), "stopped with"),
]

# --- 10.2 an interval over prompts ---


def interval(preferences, draws):
    rates = [100 * preferences[rows].mean() for rows in draws]
    return np.quantile(rates, 0.025), np.quantile(rates, 0.975)


def interval_of_means(preferences, draws):
    means = 100 * preferences.mean(axis=1)
    return tuple(np.percentile(means[draws].mean(axis=1), [2.5, 97.5]))


def interval_pandas(preferences, draws):
    rates = pd.Series([preferences[rows].mean() * 100 for rows in draws])
    return [rates.quantile(0.025), rates.quantile(0.975)]


def interval_normal(preferences, draws):
    rates = np.array([100 * preferences[rows].mean() for rows in draws])
    return rates.mean() - 1.96 * rates.std(), rates.mean() + 1.96 * rates.std()


def interval_of_the_mean(preferences, draws):
    rates = np.array([100 * preferences[rows].mean() for rows in draws])
    half = 1.96 * rates.std() / np.sqrt(len(rates))
    return rates.mean() - half, rates.mean() + half


def ends(low, high, rates=lambda p, d: 100 * p[d].mean(axis=(1, 2))):
    return lambda preferences, draws: tuple(np.quantile(rates(preferences, draws), [low, high]))


RIGHT["10.2"] = [interval, interval_of_means, interval_pandas]
WRONG["10.2"] = [
    (ends(0.025, 0.975, lambda p, d: 100 * p.flatten()[d].mean(1)), "draws name prompts"),
    (ends(0.025, 0.975, lambda p, d: 100 * p[:, 0][d].mean(1)), "only the first judgment"),
    (ends(0.05, 0.95), "leave out 10"),
    (ends(0, 1), "smallest and the largest"),
    (interval_normal, "1.96 standard deviations"),
    (ends(0.025, 0.975, lambda p, d: p[d].mean(axis=(1, 2))), "percent"),
    (ends(0.975, 0.025), "exchanged"),
    (interval_of_the_mean, "more resamples"),
    (lambda preferences, draws: 100 * preferences.mean(), "2 things"),
    (lambda preferences, draws: tuple(np.quantile(100 * preferences, [0.025, 0.975])), "should be"),
]

# --- 10.3 four broken harnesses ---

RIGHT["10.3"] = [{1: "D", 2: "C", 3: "A", 4: "B"}, {4: "b", 3: "a ", 2: "c", 1: "d"}]
WRONG["10.3"] = [
    ({1: "D", 2: "C", 3: "B", 4: "A"}, "A and B"),
    ({1: "D", 2: "A", 3: "C", 4: "B"}, "A and C"),
    ({1: "A", 2: "C", 3: "D", 4: "B"}, "A and D"),
    ({1: "D", 2: "B", 3: "A", 4: "C"}, "B and C"),
    ({1: "B", 2: "C", 3: "A", 4: "D"}, "B and D"),
    ({1: "C", 2: "D", 3: "A", 4: "B"}, "C and D"),
    ({1: "A", 2: "B", 3: "C", 4: "D"}, "is not it"),
    ({"A": 3, "B": 4, "C": 2, "D": 1}, "dict"),
]

# --- 10.4 who likes padding ---


def favours(exact="A", simple="B", concise="A"):
    return {"exact": exact, "simple": simple, "concise": concise}


RIGHT["10.4"] = [favours(), favours("a", " b", "A")]
WRONG["10.4"] = [
    (favours(exact="C"), "no fact gained"),
    (favours(exact="B"), "nothing is won"),
    (favours(simple="A"), "thirty-two words worth"),
    (favours(simple="C"), "how likely is that"),
    (favours(concise="B"), "which is larger"),
    (favours(concise="C"), "not so large"),
    (favours("B", "A", "B"), "is not it"),
    ("B", "dict"),
]

# --- 10.5 predicted at equal length ---

sigmoid = lambda x: 1 / (1 + np.exp(-x))


def rates(weights, model_lengths, baseline_lengths, difficulty):
    difference = baseline_lengths - model_lengths
    length = np.tanh(difference / difference.std(ddof=1))
    logit = weights[1] * difficulty + weights[2]
    return 100 * sigmoid(weights[0] * length + logit).mean(), 100 * sigmoid(logit).mean()


def rates_by_matrix(weights, model_lengths, baseline_lengths, difficulty):
    d = pd.Series(baseline_lengths - model_lengths)
    x = np.stack([np.tanh(d / d.std()), difficulty, np.ones(len(d))], axis=1)
    y = x * [0, 1, 1]
    return [100 * np.mean(1 / (1 + np.exp(-(m @ np.array(weights))))) for m in (x, y)]


def changed(
    length=lambda m, b: np.tanh((b - m) / (b - m).std(ddof=1)),
    ease=lambda e: e,
    mean=lambda z: sigmoid(z).mean(),
):
    def answer(weights, model_lengths, baseline_lengths, difficulty):
        logit = weights[1] * ease(difficulty) + weights[2]
        x = length(model_lengths, baseline_lengths)
        return 100 * mean(weights[0] * x + logit), 100 * mean(logit)

    return answer  # fmt: skip


def at_the_mean_length(weights, model_lengths, baseline_lengths, difficulty):
    d = baseline_lengths - model_lengths
    x = np.tanh(d / d.std(ddof=1))
    logit = weights[1] * difficulty + weights[2]
    return tuple(100 * sigmoid(weights[0] * v + logit).mean() for v in (x, x.mean()))


RIGHT["10.5"] = [rates, rates_by_matrix]
WRONG["10.5"] = [
    (changed(lambda m, b: np.tanh(b - m) / max(np.tanh(b - m).std(ddof=1), 1e-300)), "then take the tanh"),
    (changed(lambda m, b: np.tanh(b - m) / (b - m).std(ddof=1)), "before the tanh"),
    (changed(lambda m, b: np.tanh((m - b) / (m - b).std(ddof=1))), "wrong sign"),
    (changed(mean=lambda z: sigmoid(z.mean())), "inside the sigmoid"),
    (changed(ease=lambda e: 0 * e), "difficulty is missing"),
    (changed(lambda m, b: np.tanh((b - m - (b - m).mean()) / (b - m).std(ddof=1))), "centred"),
    (changed(lambda m, b: (b - m) / (b - m).std(ddof=1)), "tanh is missing"),
    (changed(lambda m, b: np.tanh(b - m)), "not divided"),
    (changed(lambda m, b: np.tanh((b - m) / (b - m).std())), "n - 1"),
    (at_the_mean_length, "controls for nothing"),
    (lambda **given: rates(**given)[::-1], "other order"),
    (lambda **given: tuple(r / 100 for r in rates(**given)), "percent"),
    (lambda **given: rates(**given)[1], "2 things"),
    (changed(ease=lambda e: -e), "should be"),
]

# --- 10.7 how many prompts ---


def needed(error=lambda n: 50 / n**0.5, prompts=(1.96 + 0.8416) ** 2 * 0.25 / 0.03**2):
    return {"error_805": error(805), "error_80": error(80), "prompts": prompts}


RIGHT["10.7"] = [needed(), needed(prompts=2181), {"prompts": 2180, "error_80": 5.59, "error_805": 1.762}]
WRONG["10.7"] = [
    (needed(lambda n: 1.96 * 50 / n**0.5), "half the width"),
    (needed(lambda n: 50), "root of the number"),
    (needed(lambda n: 25 / n), "variance of a verdict"),
    (needed(lambda n: 0.5 / n**0.5), "shares"),
    (needed(prompts=1.96**2 * 0.25 / 0.03**2), "power is one half"),
    (needed(prompts=0.8416**2 * 0.25 / 0.03**2), "comes on top"),
    (needed(prompts=(1.6449 + 0.8416) ** 2 * 0.25 / 0.03**2), "one-sided"),
    (needed(prompts=(1.96 + 0.8416) ** 2 * 0.25 / 0.06**2), "6 points"),
    (needed(prompts=(1.96**2 + 0.8416**2) * 0.25 / 0.03**2), "before squaring"),
    (needed(prompts=805), "should be"),
    (2181, "dict"),
]
