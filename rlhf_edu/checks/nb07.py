"""Exercises of notebook 07, SimPO and length: the known wrong answers; what is right is in `truths07`."""

import itertools
import math

import torch
import torch.nn.functional as F

from . import Exercise, Mistake, truths07

# --- 07.1 ---


def _signs(sum_short="+", sum_long="-", mean_short="-", mean_long="+", dpo_short="-", dpo_long="+"):
    return {"sum_short": sum_short, "sum_long": sum_long, "mean_short": mean_short, "mean_long": mean_long,
            "dpo_short": dpo_short, "dpo_long": dpo_long}  # fmt: skip


# --- 07.2 ---


def _parts(of):
    """A wrong answer from of(winner's mean, loser's mean, winner's length, loser's length)."""

    def answer(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths):
        means = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
        return of(*means, chosen_lengths, rejected_lengths)

    return answer


# --- 07.3 ---


def _loss(
    score=lambda s, n, other: s / n,
    inside=lambda d, b, g: b * d - g,
    outside=lambda m, b, g: -F.logsigmoid(m),
):
    """A wrong loss from (sum, length, the other's length), (difference, beta, gamma), (margin, beta, gamma)."""

    def answer(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
        w = score(chosen_logps, chosen_lengths, rejected_lengths)
        l = score(rejected_logps, rejected_lengths, chosen_lengths)
        return outside(inside(w - l, beta, gamma), beta, gamma)

    return answer


def _loss_overflows(answer):
    far = {"chosen_logps": -9000.0, "rejected_logps": -10.0, "chosen_lengths": 3.0, "rejected_lengths": 5.0}
    value = answer(**{k: torch.tensor([v], dtype=torch.float64) for k, v in far.items()}, beta=2.0, gamma=1.0)
    if not torch.isfinite(torch.as_tensor(value).detach()).all():
        return "right, until the margin is far from 0: log(sigmoid(-6000)) is -inf. One function does both."
    return None


# --- 07.4 ---


def _push(weight=lambda m, b, g: torch.sigmoid(g - b * m), scale=lambda b: b, chosen=lambda n, o: 1 / n,
          rejected=lambda n, o: 1 / n, signs=(-1, 1), margin=None, average=False):  # fmt: skip
    def answer(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
        n_w, n_l = chosen_lengths, rejected_lengths
        m = (margin or (lambda w, l, n, o: w / n - l / o))(chosen_logps, rejected_logps, n_w, n_l)
        push = scale(beta) * weight(m, beta, gamma) / (len(n_w) if average else 1)
        return signs[0] * push * chosen(n_w, n_l), signs[1] * push * rejected(n_l, n_w)

    return answer


# --- 07.5 ---


def _numbers(ratio=None, gamma_used=None, factor=None):
    right = {"ratio": 1.4 / 2.5, "gamma_used": 1.4 * 2.5, "factor": math.exp(1.4 / 2.5)}
    given = {"ratio": ratio, "gamma_used": gamma_used, "factor": factor}
    return {k: right[k] if v is None else v for k, v in given.items()}


def _numbers_by_search():
    """Each number as the place where a loss crosses log 2, by bisection."""

    def crossing(margin, low=0.0, high=10.0):
        while high - low > 1e-10:
            middle = (low + high) / 2
            low, high = (middle, high) if margin(middle) < 0 else (low, middle)
        return low

    ratio = crossing(lambda d: 2.5 * d - 1.4)  # the difference of mean log-probs that reaches gamma
    return {
        "ratio": ratio,
        "gamma_used": crossing(
            lambda reward: reward - 2.5 * 1.4
        ),  # 2.5 (d - 1.4) = 0 at this reward difference
        "factor": crossing(lambda q: 2.5 * math.log(max(q, 1e-9)) - 1.4),
    }


# --- 07.7 ---

_RIGHT = {1: "C", 2: "E", 3: "A", 4: "D", 5: "B"}


def _exchanged(first, second):
    other = {first: second, second: first}
    return {number: other.get(bug, bug) for number, bug in _RIGHT.items()}


_TELLS = {  # what tells two bugs apart
    "AB": "one of the two changes when a longer pair joins the batch",
    "AC": "one of the two is unmoved when every token stands twice",
    "AD": "only one of the two reads the reference",
    "AE": "only one of the two depends on who else is in the batch",
    "BC": "one has a gradient that does not know γ",
    "BD": "only one of the two reads the reference",
    "BE": "at γ = 1 one of the two has the gradient that it has at γ = 0",
    "CD": "only one of the two reads the reference",
    "CE": "only one of the two changes when every token stands twice",
    "DE": "only one of the two reads the reference",
}

EXERCISES = [
    Exercise(
        "07.1",
        "three rewards, two pairs",
        truth=truths07.signs_by_tokens,
        mistakes=(
            Mistake("the sums: each further token costs log-prob, so the shorter response starts with an advantage.", _signs(sum_short="-", sum_long="+")),
            Mistake("the means: compare the log-prob of one token with that of one token; the length is gone.", _signs(mean_short="+", mean_long="-")),
            Mistake("DPO: the reference pays for length as well. Take 0.7 per token off both sides first.", _signs(dpo_short="+", dpo_long="-")),
            Mistake("sums and means are exchanged: adding up four numbers of -0.9 gives -3.6.", _signs("-", "+", "+", "-", "-", "+")),
            Mistake("all signs are turned over: a margin is winner minus loser.", _signs("-", "+", "+", "-", "+", "-")),
            Mistake("right, but for the minus sign: take the one of the keyboard.", _signs(*"+−−+−+")),
            Mistake("a label says who should win; the margin says whom this policy prefers. Work out the sums.", _signs(*"++++++")),
        ),
        praise="Two of the three agree here, and they agree about the tokens, not about the length.",
    ),
    Exercise(
        "07.2",
        "what a margin of sums is made of",
        truth=truths07.parts_by_steps,
        inputs=truths07.lengths_and_sums,
        mistakes=(
            Mistake("the two parts are in the wrong order: first what the tokens are worth.", _parts(lambda a, b, n, m: ((a + b) / 2 * (n - m), (n + m) / 2 * (a - b)))),
            Mistake("the winner's length was taken for both; the page takes the average length.", _parts(lambda a, b, n, m: (n * (a - b), b * (n - m)))),
            Mistake("the loser's length was taken for both; the page takes the average length.", _parts(lambda a, b, n, m: (m * (a - b), a * (n - m)))),
            Mistake("the average length goes with the winner's mean alone: the two parts do not add up.", _parts(lambda a, b, n, m: ((n + m) / 2 * (a - b), a * (n - m)))),
            Mistake("averages are halves of sums: a 2 is missing.", _parts(lambda a, b, n, m: ((n + m) * (a - b), (a + b) * (n - m)))),
            Mistake("the signs: both differences are winner minus loser.", _parts(lambda a, b, n, m: ((n + m) / 2 * (b - a), (a + b) / 2 * (m - n)))),
            Mistake("the length difference is turned over: winner minus loser.", _parts(lambda a, b, n, m: ((n + m) / 2 * (a - b), (a + b) / 2 * (m - n)))),
            Mistake("the first part is the difference of the means alone; it is multiplied by a length.", _parts(lambda a, b, n, m: (a - b, (a + b) / 2 * (n - m)))),
            Mistake("the second part counts tokens; each of them costs its mean log-prob.", _parts(lambda a, b, n, m: ((n + m) / 2 * (a - b), (n - m).double()))),
            Mistake("log-probs of whole responses were averaged where means per token belong.", _parts(lambda a, b, n, m: ((n + m) / 2 * (a * n - b * m), (a * n + b * m) / 2 * (n - m)))),
        ),
        praise="An identity: the parts add up to the margin of sums, whatever the policy.",
    ),
    Exercise(
        "07.3",
        "the SimPO loss",
        truth=truths07.simpo_by_probabilities,
        inputs=truths07.pairs_with_lengths,
        mistakes=(
            Mistake("these are sums: SimPO divides each by its length (this is the ablation, with SimPO's beta).", _loss(lambda s, n, o: s)),
            Mistake("gamma is subtracted before beta multiplies: so it is the authors' ratio, and here it is absolute.", _loss(inside=lambda d, b, g: b * (d - g))),
            Mistake("gamma has the wrong sign: it makes the task harder, so it is taken off the margin.", _loss(inside=lambda d, b, g: b * d + g)),
            Mistake("gamma is missing.", _loss(inside=lambda d, b, g: b * d)),
            Mistake("gamma stands outside of the sigmoid: added to the loss it has no gradient.", _loss(inside=lambda d, b, g: b * d, outside=lambda m, b, g: -F.logsigmoid(m) + g)),
            Mistake("gamma stands outside of the sigmoid, subtracted from the loss: it has no gradient there.", _loss(inside=lambda d, b, g: b * d, outside=lambda m, b, g: -F.logsigmoid(m) - g)),
            Mistake("each sum goes with its own length, and here they are crossed.", _loss(lambda s, n, o: s / o)),
            Mistake("the lengths multiply here; the mean divides.", _loss(lambda s, n, o: s * n)),
            Mistake("one common length divides both sides; each has its own.", _loss(lambda s, n, o: s / ((n + o) / 2))),
            Mistake("the length of the longer one divides both sides, as if padding counted.", _loss(lambda s, n, o: s / torch.maximum(n, o))),
            Mistake("the mean length of the batch divides; each response has its own length.", _loss(lambda s, n, o: s / torch.cat([n, o]).double().mean())),
            Mistake("the last token is not counted: EOS is part of the response and of its length.", _loss(lambda s, n, o: s / (n - 1))),
            Mistake("beta is missing.", _loss(inside=lambda d, b, g: d - g)),
            Mistake("beta divides here; it multiplies.", _loss(inside=lambda d, b, g: d / b - g)),
            Mistake("beta stands outside of the sigmoid.", _loss(inside=lambda d, b, g: d - g, outside=lambda m, b, g: -b * F.logsigmoid(m))),
            Mistake("chosen and rejected are exchanged.", _loss(inside=lambda d, b, g: -b * d - g)),
            Mistake("the sign: a loss is minus a log-probability.", _loss(outside=lambda m, b, g: F.logsigmoid(m))),
            Mistake("the logarithm is missing.", _loss(outside=lambda m, b, g: -torch.sigmoid(m))),
            Mistake("that is a hinge: right in its limits, but SimPO takes the logistic loss.", _loss(outside=lambda m, b, g: F.relu(-m))),
            Mistake("the reward is a mean log-prob; here it is a probability.", _loss(lambda s, n, o: (s / n).exp())),
            Mistake("one value a pair is asked for, and this is their mean: the trainer takes it.", _loss(outside=lambda m, b, g: -F.logsigmoid(m).mean())),
        ),
        praise="No reference in the signature: nothing to keep in memory, and nothing that holds the policy.",
        examine=_loss_overflows,
    ),
    Exercise(
        "07.4",
        "the push on one token",
        truth=truths07.push_by_differences,
        inputs=truths07.push_inputs,
        tolerance=1e-6,
        mistakes=(
            Mistake("the lengths are missing: a token is one of |y|, and moves the mean by 1/|y|.", _push(chosen=lambda n, o: 1, rejected=lambda n, o: 1)),
            Mistake("each token carries one over the length of its own response, and here they are crossed.", _push(chosen=lambda n, o: 1 / o, rejected=lambda n, o: 1 / o)),
            Mistake("beta is missing in front.", _push(scale=lambda b: 1)),
            Mistake("gamma is missing in the weight.", _push(weight=lambda m, b, g: torch.sigmoid(-b * m))),
            Mistake("gamma has the wrong sign in the weight: a larger gamma pushes more.", _push(weight=lambda m, b, g: torch.sigmoid(-g - b * m))),
            Mistake("in the weight gamma is not multiplied by beta: it is absolute here.", _push(weight=lambda m, b, g: torch.sigmoid(b * (g - m)))),
            Mistake("beta is missing in the weight.", _push(weight=lambda m, b, g: torch.sigmoid(g - m))),
            Mistake("the weight is turned over: a pair that is wrong pushes more, not less.", _push(weight=lambda m, b, g: torch.sigmoid(b * m - g))),
            Mistake("the weight is that of sums: its margin is a difference of means.", _push(margin=lambda w, l, n, o: w - l)),
            Mistake("that is the step which an optimiser takes; the derivative has the other sign.", _push(signs=(1, -1))),
            Mistake("both sides are pushed the same way; the rejected goes down.", _push(signs=(-1, -1))),
            Mistake("divided by the number of pairs: the derivative of each pair's own loss is asked for.", _push(average=True)),
            Mistake("the weight is missing: how much a pair pushes depends on its margin.", _push(weight=lambda m, b, g: 1)),
        ),
        praise="Every token of a response is pushed alike, those of a short one harder: 1/|y|.",
    ),
    Exercise(
        "07.5",
        "γ, or γ/β?",
        truth=_numbers_by_search,
        tolerance=2e-3,
        mistakes=(
            Mistake("the ratio is upside down: gamma over beta.", _numbers(ratio=2.5 / 1.4)),
            Mistake("the ratio is a quotient; this is the product.", _numbers(ratio=3.5)),
            Mistake("gamma_used: the code multiplies what it is given by beta.", _numbers(gamma_used=1.4)),
            Mistake("gamma_used: the code multiplies by beta, it does not divide.", _numbers(gamma_used=1.4 / 2.5)),
            Mistake("factor: gamma is a difference of rewards, and a reward is beta times a log-prob.", _numbers(factor=math.exp(1.4))),
            Mistake("factor: beta divides gamma there; the log-probs differ by less than gamma.", _numbers(factor=math.exp(3.5))),
            Mistake("factor: a difference of log-probs is the logarithm of a quotient of probabilities.", _numbers(factor=1.4 / 2.5)),
        ),
        praise="The paper's Table 8 and the README of its code say the same thing in two units, up to rounding.",
    ),
    Exercise(
        "07.7",
        "five broken losses",
        truth=truths07.broken_by_hand,
        mistakes=tuple(
            Mistake(f"{a} and {b} are exchanged: {_TELLS[a + b]}.", _exchanged(a, b))
            for a, b in itertools.combinations("ABCDE", 2)
        ),
        praise="One pair by hand finds them all; the invariances say which is which.",
    ),
]  # fmt: skip
