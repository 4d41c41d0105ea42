"""What is right in notebook 10, computed in other ways than on its pages, and the four broken harnesses of its bug hunt."""

import fractions
import functools
import math
import statistics

import numpy as np

from .. import tldr

# --- 10.1: a win rate with ties ---


def answers_inputs(rng, pairs=30):
    """Answers of a judge who likes the first place, in an order drawn for each pair."""
    answers = rng.choice(["A", "B", "tie"], pairs, p=[0.55, 0.25, 0.2]).tolist()
    return {"answers": answers, "policy_is_first": rng.random(pairs) < 0.35}


def win_rate_by_counting(answers, policy_is_first):
    won = fractions.Fraction(0)
    for answer, first in zip(answers, policy_is_first.tolist(), strict=True):
        if answer == "tie":
            won += fractions.Fraction(1, 2)
        elif (answer == "A") == first:
            won += 1
    return float(100 * won / len(answers))


# --- 10.2: an interval over prompts ---


def bootstrap_inputs(rng, prompts=12, judgments=4, resamples=60):
    ease = rng.random(prompts)[:, None]
    return {
        "preferences": (rng.random((prompts, judgments)) < ease).astype(float),
        "draws": rng.integers(prompts, size=(resamples, prompts)),
    }


def interval_by_sorting(preferences, draws):
    rates = []
    for drawn in draws.tolist():
        judged = [p for row in drawn for p in preferences[row].tolist()]
        rates.append(100 * math.fsum(judged) / len(judged))
    rates.sort()

    def quantile(q):  # between two neighbours, linearly
        place = q * (len(rates) - 1)
        low = math.floor(place)
        return rates[low] + (place - low) * (rates[min(low + 1, len(rates) - 1)] - rates[low])

    return quantile(0.025), quantile(0.975)


# --- 10.3: four broken harnesses ---

BROKEN = {1: "D", 2: "C", 3: "A", 4: "B"}  # number on the page's table: letter of the fragment


def measured_by(number: int | None, policy: float, baseline: float, seed: int, prompts: int = 400) -> float:
    """The win rate that harness 1 to 4, or the right one, finds for a policy of this strength (log-odds).

    The judge likes the first place (0.8 log-odds), and one answer in eight names no winner.
    """
    bug, rng = BROKEN.get(number), np.random.default_rng([seed, 10])
    swap = rng.random(prompts) < 0.5
    if bug == "B":
        swap[:] = False
    if bug == "C":
        swap[:] = swap[0]
    lead = np.where(swap, baseline - policy, policy - baseline) + rng.normal(0, 1, prompts)
    answer = (rng.random(prompts) < 1 / (1 + np.exp(-(lead + 0.8)))).astype(float)
    answer[rng.random(prompts) < 0.125] = np.nan
    won = answer if bug == "A" else np.where(swap, 1 - answer, answer)
    return 100 * float(np.mean(np.nan_to_num(won, nan=0.0 if bug == "D" else 0.5)))


def symptoms(number: int | None, seeds: int = 60) -> dict:
    """What three tests say of a harness: means over seeds, and how much one result varies with the seed."""
    game = {
        "good against bad": (0.7, -0.7),
        "bad against good": (-0.7, 0.7),
        "a policy against itself": (0.0, 0.0),
    }
    found = {name: [measured_by(number, *pair, s) for s in range(seeds)] for name, pair in game.items()}
    row = {name: float(np.mean(rates)) for name, rates in found.items()}
    return row | {"± of one result": float(np.std(found["a policy against itself"]))}


@functools.cache
def found_by_symptoms() -> dict[int, str]:
    found = {}
    for number in BROKEN:
        row = symptoms(number)
        both = row["good against bad"] + row["bad against good"]
        if abs(row["good against bad"] - row["bad against good"]) < 5:
            found[number] = "A"
        elif row["± of one result"] > 5:
            found[number] = "C"
        elif both > 105:
            found[number] = "B"
        else:
            found[number] = "D"
    return found


# --- 10.4: who wins before which judge ---


@functools.cache
def favourites() -> dict[str, str]:
    """Expected share of posts on which the padded summary beats the full one: A under 25 %, B over 75 %, C between.

    From each judge's definition, without a draw: exact sides with the score; simple adds 0.06 log-odds a word to what
    the facts are worth, concise 0.01 a word to the whole score.
    """
    some, rng = tldr.posts(200, seed=77), np.random.default_rng(77)
    shares = {"exact": [], "simple": [], "concise": []}
    for post in some:
        keys = [slot for slot in tldr.KEY if slot in post.facts]
        texts = [tldr.write_summary(post, keys, rng, asides=n) for n in (5, 0)]
        padded, full = (tldr.judge_summary(post, t) for t in texts)
        longer = padded["words"] - full["words"]
        lead = padded["score"] - full["score"]
        shares["exact"].append(float(lead > 0))
        shares["simple"].append(_sigmoid((lead + 0.01 * longer) / 0.1 + 0.06 * longer))
        shares["concise"].append(_sigmoid(lead / 0.1 + 0.01 * longer))
    means = {judge: math.fsum(s) / len(s) for judge, s in shares.items()}
    return {judge: "A" if m < 0.25 else "B" if m > 0.75 else "C" for judge, m in means.items()}


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- 10.5: predicted with and without the length ---


def length_inputs(rng, prompts=15):
    baseline = rng.normal(1500, 400, prompts)
    return {
        "weights": (float(rng.uniform(-2.5, -0.8)), float(rng.uniform(0.8, 2.0)), float(rng.uniform(-1.5, -0.3))),
        "model_lengths": baseline + rng.normal(350, 300, prompts),
        "baseline_lengths": baseline,
        "difficulty": rng.normal(0, 1.5, prompts),
    }  # fmt: skip


def rates_by_loop(weights, model_lengths, baseline_lengths, difficulty):
    differences = [b - m for m, b in zip(model_lengths.tolist(), baseline_lengths.tolist(), strict=True)]
    spread = statistics.stdev(differences)
    raw, controlled = [], []
    for difference, ease in zip(differences, difficulty.tolist(), strict=True):
        rest = weights[1] * ease + weights[2]
        raw.append(_sigmoid(weights[0] * math.tanh(difference / spread) + rest))
        controlled.append(_sigmoid(rest))
    return 100 * math.fsum(raw) / len(raw), 100 * math.fsum(controlled) / len(controlled)


# --- 10.7: how many prompts ---


def needed_by_search() -> dict[str, float]:
    """Standard errors from the binomial itself; the number of prompts by doubling and halving, from the power."""
    normal = statistics.NormalDist()

    def error(n):
        middle = n / 2
        logs = [
            math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
            for k in range(n + 1)
        ]
        return 100 * math.sqrt(math.fsum(math.exp(p) * ((k - middle) / n) ** 2 for k, p in enumerate(logs)))  # fmt: skip

    def power(n):  # of telling 53 % from 50 %
        one = 0.5 / math.sqrt(n)
        return 1 - normal.cdf((normal.inv_cdf(0.975) * one - 0.03) / one)

    low, high = 1.0, 1.0
    while power(high) < 0.8:
        low, high = high, 2 * high
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= 0.8 else (middle, high)
    return {"error_805": error(805), "error_80": error(80), "prompts": high}
