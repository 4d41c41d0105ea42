"""Answers to the exercises of notebook 07 as students write them."""

import math

import numpy as np
import torch
import torch.nn.functional as F

WRONG, RIGHT = {}, {}

# --- 07.1 three rewards, two pairs ---


def signs(sum_short, sum_long, mean_short, mean_long, dpo_short, dpo_long):
    return {
        "sum_short": sum_short,
        "sum_long": sum_long,
        "mean_short": mean_short,
        "mean_long": mean_long,
        "dpo_short": dpo_short,
        "dpo_long": dpo_long,
    }


RIGHT["07.1"] = [signs("+", "-", "-", "+", "-", "+"), signs(" +", "- ", "-", "+", "-", "+")]
WRONG["07.1"] = [
    (signs("-", "+", "-", "+", "-", "+"), "each further token costs"),
    (signs("+", "-", "+", "-", "-", "+"), "the length is gone"),
    (signs("+", "-", "-", "+", "+", "-"), "pays for length"),
    (signs("-", "+", "+", "-", "-", "+"), "exchanged"),
    (signs("-", "+", "+", "-", "+", "-"), "turned over"),
    (signs("+", "+", "+", "+", "+", "+"), "who should win"),
    (signs("+", "−", "−", "+", "−", "+"), "of the keyboard"),
    (signs("-", "-", "-", "+", "-", "+"), "is not it"),
    (signs("+", "-", "-", "-", "-", "+"), "is not it"),
    ({"sum_short": "+"}, "dict"),
    ("+--+-+", "dict"),
    (signs(1, -1, -1, 1, -1, 1), "a text"),
]

# --- 07.2 what a margin of sums is made of ---


def split(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths):
    a_w, a_l = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    average_length = (chosen_lengths + rejected_lengths) / 2
    average_logp = (a_w + a_l) / 2
    return average_length * (a_w - a_l), average_logp * (chosen_lengths - rejected_lengths)


def split_the_rest(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths):
    a_w, a_l = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    tokens = 0.5 * (chosen_lengths + rejected_lengths) * (a_w - a_l)
    return [tokens, (chosen_logps - rejected_logps) - tokens]


def split_numpy(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths):
    w, l, n, m = (x.numpy() for x in (chosen_logps, rejected_logps, chosen_lengths, rejected_lengths))
    return np.mean([n, m], 0) * (w / n - l / m), np.mean([w / n, l / m], 0) * (n - m)


def split_with(of):
    def answer(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths):
        return of(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)

    return answer


def split_winner(w, l, n, m):
    return n * (w / n - l / m), (l / m) * (n - m)


def split_loser(w, l, n, m):
    return m * (w / n - l / m), (w / n) * (n - m)


RIGHT["07.2"] = [split, split_the_rest, split_numpy]
WRONG["07.2"] = [
    (lambda **given: split(**given)[::-1], "wrong order"),
    (split_with(split_winner), "winner's length was taken for both"),
    (split_with(split_loser), "loser's length was taken for both"),
    (split_with(lambda w, l, n, m: ((n + m) / 2 * (w / n - l / m), w / n * (n - m))), "do not add up"),
    (split_with(lambda w, l, n, m: ((n + m) * (w / n - l / m), (w / n + l / m) * (n - m))), "a 2 is missing"),
    (split_with(lambda w, l, n, m: ((n + m) / 2 * (l / m - w / n), (w / n + l / m) / 2 * (m - n))), "the signs"),
    (split_with(lambda w, l, n, m: ((n + m) / 2 * (w / n - l / m), (w / n + l / m) / 2 * (m - n))),
     "length difference is turned over"),
    (split_with(lambda w, l, n, m: (w / n - l / m, (w / n + l / m) / 2 * (n - m))), "multiplied by a length"),
    (split_with(lambda w, l, n, m: ((n + m) / 2 * (w / n - l / m), (n - m).double())), "counts tokens"),
    (split_with(lambda w, l, n, m: ((n + m) / 2 * (w - l), (w + l) / 2 * (n - m))), "whole responses"),
    (split_with(lambda w, l, n, m: ((w - l) / 2, (w - l) / 2)), "should be"),
    (split_with(lambda w, l, n, m: ((n + m) / 2 * (w / n - l / m) + (w / n + l / m) / 2 * (n - m))), "2 things"),
    (split_with(lambda w, l, n, m: [x.mean() for x in split(w, l, n, m)]), "shape"),
]  # fmt: skip

# --- 07.3 the SimPO loss ---


def simpo(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    reward_w = beta * chosen_logps / chosen_lengths
    reward_l = beta * rejected_logps / rejected_lengths
    return -F.logsigmoid(reward_w - reward_l - gamma)


def simpo_ratio(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    gamma_beta_ratio = gamma / beta
    logits = chosen_logps / chosen_lengths - rejected_logps / rejected_lengths - gamma_beta_ratio
    return F.softplus(-beta * logits)


def simpo_rows(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    losses = []
    for w, l, n, m in zip(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, strict=True):
        margin = beta * (w / n.item() - l / m.item()) - gamma
        losses.append(torch.logaddexp(torch.zeros_like(margin), -margin))
    return torch.stack(losses)


def simpo_of(margin, loss=lambda m: -F.logsigmoid(m)):
    """margin(s_w, s_l, n_w, n_l, beta, gamma)."""

    def answer(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
        return loss(margin(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma))

    return answer


def simpo_naive(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    margin = beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths) - gamma
    return -torch.log(torch.sigmoid(margin))


def simpo_naive_exp(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    margin = beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths) - gamma
    return torch.log(1 + torch.exp(-margin))


def simpo_outside(sign):
    def answer(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
        margin = beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths)
        return -F.logsigmoid(margin) + sign * gamma

    return answer


def simpo_beta_outside(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    return -beta * F.logsigmoid(chosen_logps / chosen_lengths - rejected_logps / rejected_lengths - gamma)


def simpo_batch_mean(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    tokens = (chosen_lengths.sum() + rejected_lengths.sum()) / (2 * len(chosen_lengths))
    return -F.logsigmoid(beta * (chosen_logps - rejected_logps) / tokens - gamma)


def simpo_detached(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    return simpo(chosen_logps, rejected_logps.detach(), chosen_lengths, rejected_lengths, beta, gamma)


def simpo_all_detached(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    return simpo(
        chosen_logps.detach(), rejected_logps.detach(), chosen_lengths, rejected_lengths, beta, gamma
    )


RIGHT["07.3"] = [simpo, simpo_ratio, simpo_rows]
WRONG["07.3"] = [
    (simpo_naive, "far from 0"),
    (simpo_naive_exp, "far from 0"),
    (simpo_of(lambda w, l, n, m, b, g: b * (w - l) - g), "these are sums"),
    (simpo_of(lambda w, l, n, m, b, g: b * (w / n - l / m - g)), "authors' ratio"),
    (simpo_of(lambda w, l, n, m, b, g: b * (w / n - l / m) + g), "wrong sign"),
    (simpo_of(lambda w, l, n, m, b, g: b * (w / n - l / m)), "gamma is missing"),
    (simpo_outside(1), "added to the loss"),
    (simpo_outside(-1), "subtracted from the loss"),
    (simpo_of(lambda w, l, n, m, b, g: b * (w / m - l / n) - g), "crossed"),
    (simpo_of(lambda w, l, n, m, b, g: b * (w * n - l * m) - g), "multiply"),
    (simpo_of(lambda w, l, n, m, b, g: 2 * b * (w - l) / (n + m) - g), "one common length"),
    (simpo_of(lambda w, l, n, m, b, g: b * (w - l) / torch.max(n, m) - g), "padding"),
    (simpo_batch_mean, "mean length of the batch"),
    (simpo_of(lambda w, l, n, m, b, g: b * (w / (n - 1) - l / (m - 1)) - g), "EOS"),
    (simpo_of(lambda w, l, n, m, b, g: w / n - l / m - g), "beta is missing"),
    (simpo_of(lambda w, l, n, m, b, g: (w / n - l / m) / b - g), "beta divides"),
    (simpo_beta_outside, "beta stands outside"),
    (simpo_of(lambda w, l, n, m, b, g: b * (l / m - w / n) - g), "exchanged"),
    (simpo_of(lambda w, l, n, m, b, g: b * (w / n - l / m) - g, F.logsigmoid), "the sign"),
    (simpo_of(lambda w, l, n, m, b, g: b * (w / n - l / m) - g, lambda m: -torch.sigmoid(m)), "logarithm"),
    (simpo_of(lambda w, l, n, m, b, g: b * (w / n - l / m) - g, lambda m: torch.relu(-m)), "hinge"),
    (simpo_of(lambda w, l, n, m, b, g: b * (torch.exp(w / n) - torch.exp(l / m)) - g), "a probability"),
    (simpo_of(lambda w, l, n, m, b, g: b * (w / n - l / m) - g, lambda m: -F.logsigmoid(m).mean()), "their mean"),
    (simpo_detached, "detached"),
    (simpo_all_detached, "detached"),
    (simpo_of(lambda w, l, n, m, b, g: b * (w / n - l) - g), "should be"),
    (simpo_of(lambda w, l, n, m, b, g: b * (w / n - l / m) - g / n), "should be"),
]  # fmt: skip

# --- 07.4 the push on one token ---


def push(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    margin = beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths)
    weight = torch.sigmoid(gamma - margin)
    return -beta * weight / chosen_lengths, beta * weight / rejected_lengths


def push_autograd(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    w, l = (x.detach().clone().requires_grad_() for x in (chosen_logps, rejected_logps))
    return torch.autograd.grad(simpo(w, l, chosen_lengths, rejected_lengths, beta, gamma).sum(), (w, l))


def push_exp(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    margin = beta * chosen_logps / chosen_lengths - beta * rejected_logps / rejected_lengths - gamma
    weight = beta / (1 + margin.exp())
    return -(weight / chosen_lengths), weight / rejected_lengths


def push_of(of):
    """of(weight with a margin and gamma, s_w, s_l, n_w, n_l, beta, gamma)."""

    def answer(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
        margin = beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths)
        return of(torch.sigmoid(gamma - margin), margin, chosen_lengths, rejected_lengths, beta, gamma)

    return answer


def push_of_sums(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    weight = torch.sigmoid(gamma - beta * (chosen_logps - rejected_logps))
    return -beta * weight / chosen_lengths, beta * weight / rejected_lengths


def pushing(weight):
    return push_of(lambda w, d, n, m, b, g: (-b * weight(d, b, g) / n, b * weight(d, b, g) / m))


RIGHT["07.4"] = [push, push_autograd, push_exp]
WRONG["07.4"] = [
    (push_of(lambda w, d, n, m, b, g: (-b * w, b * w)), "lengths are missing"),
    (push_of(lambda w, d, n, m, b, g: (-b * w / m, b * w / n)), "crossed"),
    (push_of(lambda w, d, n, m, b, g: (-w / n, w / m)), "beta is missing in front"),
    (pushing(lambda d, b, g: torch.sigmoid(-d)), "gamma is missing"),
    (pushing(lambda d, b, g: torch.sigmoid(-g - d)), "gamma has the wrong sign"),
    (pushing(lambda d, b, g: torch.sigmoid(b * g - d)), "not multiplied by beta"),
    (pushing(lambda d, b, g: torch.sigmoid(g - d / b)), "beta is missing in the weight"),
    (pushing(lambda d, b, g: torch.sigmoid(d - g)), "turned over"),
    (pushing(lambda d, b, g: 1 - torch.sigmoid(g - d)), "turned over"),
    (push_of_sums, "that of sums"),
    (push_of(lambda w, d, n, m, b, g: (b * w / n, -b * w / m)), "other sign"),
    (push_of(lambda w, d, n, m, b, g: (-b * w / n, -b * w / m)), "the rejected goes down"),
    (push_of(lambda w, d, n, m, b, g: (-b * w / n / len(n), b * w / m / len(n))), "number of pairs"),
    (push_of(lambda w, d, n, m, b, g: (-b / n, b / m)), "weight is missing"),
    (lambda **given: push(**given)[0], "2 things"),
    (lambda **given: push(**given)[::-1], "should be"),
]

# --- 07.5 gamma, or gamma / beta ---


def numbers(ratio=0.56, gamma_used=3.5, factor=1.751):
    return {"ratio": ratio, "gamma_used": gamma_used, "factor": factor}


RIGHT["07.5"] = [
    numbers(),
    {"factor": math.exp(1.4 / 2.5), "ratio": 1.4 / 2.5, "gamma_used": torch.tensor(3.5)},
]
WRONG["07.5"] = [
    (numbers(ratio=2.5 / 1.4), "upside down"),
    (numbers(ratio=3.5), "this is the product"),
    (numbers(gamma_used=1.4), "multiplies what it is given"),
    (numbers(gamma_used=0.56), "it does not divide"),
    (numbers(factor=math.exp(1.4)), "a reward is beta times"),
    (numbers(factor=math.exp(3.5)), "differ by less"),
    (numbers(factor=0.56), "logarithm of a quotient"),
    (numbers(ratio=0.5), "should be"),
    (numbers(factor=1.7), "should be"),
    ({"ratio": 0.56}, "dict"),
    (0.56, "dict"),
]

# --- 07.7 five broken losses ---


def which(letters):
    return dict(zip(range(1, 6), letters, strict=True))


RIGHT["07.7"] = [which("CEADB"), which(["c", "e", "a", "d ", "b"])]
WRONG["07.7"] = [
    (which("CEBDA"), "A and B are exchanged"),
    (which("AECDB"), "A and C are exchanged"),
    (which("CEDAB"), "A and D are exchanged"),
    (which("CAEDB"), "A and E are exchanged"),
    (which("BEADC"), "B and C are exchanged"),
    (which("CEABD"), "B and D are exchanged"),
    (which("CBADE"), "B and E are exchanged"),
    (which("DEACB"), "C and D are exchanged"),
    (which("ECADB"), "C and E are exchanged"),
    (which("CDAEB"), "D and E are exchanged"),
    (which("ABCDE"), "is not it"),
    ({"A": 3, "B": 5, "C": 1, "D": 4, "E": 2}, "dict"),
    ("CEADB", "dict"),
]
