"""Exercises of notebook 10, win rates and judges."""

import itertools

import numpy as np

from . import Exercise, Mistake
from .truths10 import (
    BROKEN,
    answers_inputs,
    bootstrap_inputs,
    favourites,
    found_by_symptoms,
    interval_by_sorting,
    length_inputs,
    needed_by_search,
    rates_by_loop,
    win_rate_by_counting,
)

# --- 10.1 ---


def _rate(tie=0.5, swap_back=True, keep_ties=True, of_policy=True, scale=100.0, places=False):
    def answer(answers, policy_is_first):
        answers, first = np.array(answers), np.asarray(policy_is_first)
        won = np.where(answers == "A", 1.0, 0.0)
        if swap_back:
            won = np.where(first, won, 1 - won)
        won = np.where(answers == "tie", tie, won)
        won = won if keep_ties else won[answers != "tie"]
        won = won if of_policy else 1 - won
        return scale * (won[first].mean() if places else won.mean())

    return answer


# --- 10.2 ---


def _interval(rows=lambda p, d: p[d].mean((1, 2)), ends=(0.025, 0.975), scale=100.0, of=None):
    def answer(preferences, draws):
        rates = scale * rows(preferences, draws)
        return of(rates) if of else tuple(np.quantile(rates, ends))

    return answer


# --- 10.3 ---


def _exchanged(first, second):
    other = {first: second, second: first}
    return {number: other.get(letter, letter) for number, letter in BROKEN.items()}


_TELLS = {
    "AB": "without any order drawn one still learns who is better; without swapping back nobody is ever better",
    "AC": "one of them gives good and bad the same; the other is right on average and never in a single run",
    "AD": "one of them loses the difference between good and bad, the other loses points on both sides",
    "BC": "a coin thrown once for all prompts makes results jump from seed to seed; a fixed order does not",
    "BD": "add the two games: points out of nothing come from the first place, points that vanish from answers that count as lost",
    "CD": "look at how much one result varies with the seed",
}

# --- 10.5 ---


def _glm(spread=lambda d: d.std(ddof=1), squash=np.tanh, sign=1.0, centre=False, ease=1.0, scale=100.0, inside=False,
         length_at=0.0, order=(0, 1)):  # fmt: skip
    def answer(weights, model_lengths, baseline_lengths, difficulty):
        length, by_ease, bias = weights
        d = sign * (baseline_lengths - model_lengths)
        d = d - d.mean() if centre else d
        x = squash(d / spread(d))
        rest = ease * by_ease * difficulty + bias
        level = lambda z: scale * (_sigmoid(z.mean()) if inside else _sigmoid(z).mean())
        at = x.mean() if length_at == "mean" else length_at
        both = level(length * x + rest), level(length * at + rest)
        return tuple(both[i] for i in order)

    return answer


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


# --- 10.4, 10.7 ---


def _judges(exact="A", simple="B", concise="A"):
    return {"exact": exact, "simple": simple, "concise": concise}


def _needed(error_805=1.76227, error_80=5.59017, prompts=2180.2):
    return {"error_805": error_805, "error_80": error_80, "prompts": prompts}


EXERCISES = [
    Exercise(
        "10.1",
        "a win rate with ties",
        truth=win_rate_by_counting,
        inputs=answers_inputs,
        mistakes=(
            Mistake("the answers were not swapped back: A is the policy's only where it stood first.", _rate(swap_back=False)),
            Mistake("ties were left out; here each is worth half a win.", _rate(keep_ties=False)),
            Mistake("a tie counts as lost here.", _rate(tie=0.0)),
            Mistake("a tie counts as won here.", _rate(tie=1.0)),
            Mistake("that is the baseline's win rate.", _rate(of_policy=False)),
            Mistake("a share between 0 and 1; percent are asked for.", _rate(scale=1.0)),
            Mistake("only pairs with the policy in the first place were counted.", _rate(places=True)),
        ),
        praise="Two models' win rates against each other sum to 100, which is a test worth keeping.",
    ),
    Exercise(
        "10.2",
        "an interval over prompts",
        truth=interval_by_sorting,
        inputs=bootstrap_inputs,
        mistakes=(
            Mistake("the draws name prompts, and this takes them for positions in the flattened judgments.", _interval(lambda p, d: p.ravel()[d].mean(1))),
            Mistake("only the first judgment of each prompt is used.", _interval(lambda p, d: p[d][:, :, 0].mean(1))),
            Mistake("5 % and 95 % leave out 10 % together; a 95 % interval leaves out 5.", _interval(ends=(0.05, 0.95))),
            Mistake("the smallest and the largest resample depend on how many there are.", _interval(ends=(0.0, 1.0))),
            Mistake("quantiles are asked for; this is 1.96 standard deviations about the mean.", _interval(of=lambda r: (r.mean() - 1.96 * r.std(), r.mean() + 1.96 * r.std()))),
            Mistake("shares between 0 and 1; percent are asked for.", _interval(scale=1.0)),
            Mistake("the two ends are exchanged.", _interval(ends=(0.975, 0.025))),
            Mistake("the spread of a resample was divided by the root of their number: more resamples make no shorter interval.", _interval(of=lambda r: (r.mean() - 1.96 * r.std() / len(r) ** 0.5, r.mean() + 1.96 * r.std() / len(r) ** 0.5))),
        ),
        praise="All judgments of a prompt are drawn together, so asking a judge twice buys no false certainty.",
    ),
    Exercise(
        "10.3",
        "four broken harnesses",
        truth=found_by_symptoms,
        mistakes=tuple(
            Mistake(f"{a} and {b} are exchanged: {_TELLS[a + b]}.", _exchanged(a, b))
            for a, b in itertools.combinations("ABCD", 2)
        ),
        praise="Three games that cost nothing: good against bad, the same in the other order, a policy against itself.",
    ),
    Exercise(
        "10.4",
        "who likes padding",
        truth=favourites,
        mistakes=(
            Mistake("exact: five asides of about six words, 0.01 a word, and no fact gained.", _judges(exact="C")),
            Mistake("exact: asides cost points there; nothing is won by them.", _judges(exact="B")),
            Mistake("simple: what are thirty-two words worth at 0.06 log-odds each? It does not see that they cost anything.", _judges(simple="A")),
            Mistake("simple: thirty-two words at 0.06 log-odds are nearly 2 log-odds; how likely is that to win?", _judges(simple="C")),
            Mistake("concise: this judge sees the whole score. Which is larger, 0.01 / 0.1 or 0.01?", _judges(concise="B")),
            Mistake("concise: its noise is not so large: thirty-two words cost 0.32, and its temperature is 0.1.", _judges(concise="C")),
        ),
        praise="One clause of the question turns the order of two summaries over.",
    ),
    Exercise(
        "10.5",
        "predicted at equal length",
        truth=rates_by_loop,
        inputs=length_inputs,
        mistakes=(
            Mistake("the difference has the wrong sign: baseline minus model goes with a negative weight.", _glm(sign=-1.0)),
            Mistake("the mean stands inside the sigmoid: take the sigmoid of each prompt first.", _glm(inside=True)),
            Mistake("the difficulty is missing.", _glm(ease=0.0)),
            Mistake("the difference was centred: then 0 no longer means equally long.", _glm(centre=True)),
            Mistake("the tanh is missing.", _glm(squash=lambda x: x)),
            Mistake("the length was not divided by its deviation before the tanh.", _glm(spread=lambda d: 1.0)),
            Mistake("divide by the deviation first, then take the tanh.", _glm(squash=lambda d: np.tanh(d) / max(np.tanh(d).std(ddof=1), 1e-300), spread=lambda d: 1.0)),
            Mistake("the deviation is that of the differences, and it is taken before the tanh.", _glm(squash=lambda d: np.tanh(d) / d.std(ddof=1), spread=lambda d: 1.0)),
            Mistake("the page asks for n - 1 in the deviation.", _glm(spread=lambda d: d.std())),
            Mistake("that controls for nothing: the length term is set to its mean, and should be 0.", _glm(length_at="mean")),
            Mistake("the two rates stand in the other order: first as the lengths are, then at equal length.", _glm(order=(1, 0))),
            Mistake("shares between 0 and 1; percent are asked for.", _glm(scale=1.0)),
        ),
        praise="The regression is fitted once; the controlled rate is only another question asked of it.",
    ),
    Exercise(
        "10.7",
        "how many prompts",
        truth=needed_by_search,
        tolerance=5e-3,
        mistakes=(
            Mistake("error: these are half the width of a 95 % interval; one standard error is asked for.", _needed(3.4540, 10.9567)),
            Mistake("error: a single verdict deviates by 50 points; the root of the number of prompts is missing.", _needed(50.0, 50.0)),
            Mistake("error: that is the variance of a verdict divided by n, in points; its root is asked for.", _needed(0.031056, 0.3125)),
            Mistake("error: these are shares; points of percent are asked for.", _needed(0.0176227, 0.0559017)),
            Mistake("prompts: with 1.96 standard errors alone the power is one half.", _needed(prompts=1067.1)),
            Mistake("prompts: 0.84 is the part for the power; the 1.96 of the test comes on top.", _needed(prompts=196.2)),
            Mistake("prompts: 1.64 is for a one-sided test.", _needed(prompts=1717.5)),
            Mistake("prompts: that is the other side of the margin: you solved for 6 points, or used a whole for a half.", _needed(prompts=545.1)),
            Mistake("prompts: the two parts are added before squaring, not after.", _needed(prompts=1263.6)),
        ),
        praise="And this is for one judgment without noise of its own.",
    ),
]  # fmt: skip
