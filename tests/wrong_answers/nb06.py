"""Answers to the exercises of notebook 06 as students write them."""

import math

import numpy as np
import torch

WRONG, RIGHT = {}, {}

# --- 06.1 the tilted policy ---


def tilt(logps, rewards, beta):
    p = (logps + rewards / beta).softmax(0)
    return p, (p * rewards).sum(), (p * (p.log() - logps)).sum()


def tilt_by_partition_sum(logps, rewards, beta):
    z = (logps.exp() * torch.exp(rewards / beta)).sum()
    p = logps.exp() * torch.exp(rewards / beta) / z
    reward = p @ rewards
    return [p, reward, reward / beta - z.log()]


def tilt_numpy(logps, rewards, beta):
    w = np.exp(logps.numpy() + rewards.numpy() / beta)
    w /= w.sum()
    return w, (w * rewards.numpy()).sum(), (w * np.log(w / np.exp(logps.numpy()))).sum()


def tilted_by(exponent):
    def answer(logps, rewards, beta):
        w = torch.exp(exponent(logps, rewards, beta))
        p = w / w.sum()
        return p, (p * rewards).sum(), (p * (p.log() - logps)).sum()

    return answer


def weights_alone(logps, rewards, beta):
    w = logps.exp() * (rewards / beta).exp()
    return w, (w * rewards).sum(), (w * (w.log() - logps)).sum()


def with_values(reward=None, kl=None):
    def answer(logps, rewards, beta):
        p, r, k = tilt(logps, rewards, beta)
        return p, reward(p, logps, rewards, beta) if reward else r, kl(p, logps, beta) if kl else k

    return answer


kl_of = lambda p, logps: (p * (p.log() - logps)).sum()
RIGHT["06.1"] = [tilt, tilt_by_partition_sum, tilt_numpy]
WRONG["06.1"] = [
    (tilted_by(lambda s, r, b: s + r * b), "multiplied by β"),
    (tilted_by(lambda s, r, b: s - r / b), "away from the reward"),
    (tilted_by(lambda s, r, b: r / b), "reference is missing"),
    (tilted_by(lambda s, r, b: (s + r) / b), "divides the reference"),
    (tilted_by(lambda s, r, b: s + r), "β is missing"),
    (weights_alone, "divided by their sum"),
    (with_values(kl=lambda p, s, b: (s.exp() * (s - p.log())).sum()), "wrong way round"),
    (with_values(kl=lambda p, s, b: -kl_of(p, s)), "wrong sign"),
    (with_values(reward=lambda p, s, r, b: (s.exp() * r).sum()), "of the reference"),
    (with_values(reward=lambda p, s, r, b: (p * r).sum() - b * kl_of(p, s)), "whole objective"),
    (with_values(kl=lambda p, s, b: b * kl_of(p, s)), "β times the KL"),
    (with_values(kl=lambda p, s, b: kl_of(p, s) / math.log(2)), "part 3"),
    (lambda logps, rewards, beta: tilt(logps, rewards, beta)[0], "3 things"),
    (lambda logps, rewards, beta: tilt(logps, rewards, beta)[::-1], "part 1"),
]

# --- 06.2 the KL of a response ---


def sequence_kl(policy_logits, ref_logits, mask):
    p, q = policy_logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * mask).sum(-1)


def sequence_kl_library(policy_logits, ref_logits, mask):
    p, q = policy_logits.log_softmax(-1), ref_logits.log_softmax(-1)
    each = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    return each.masked_fill(~mask, 0).sum(1)


def sequence_kl_rows(policy_logits, ref_logits, mask):
    kl = torch.distributions.kl_divergence
    categorical = torch.distributions.Categorical
    return torch.stack(
        [kl(categorical(logits=p[m]), categorical(logits=q[m])).sum()
         for p, q, m in zip(policy_logits, ref_logits, mask, strict=True)]
    )  # fmt: skip


def steps(policy_logits, ref_logits):
    p, q = policy_logits.softmax(-1), ref_logits.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def exchanged(policy_logits, ref_logits, mask):
    return (steps(ref_logits, policy_logits) * mask).sum(1)


def kl_div_as_it_reads(policy_logits, ref_logits, mask):
    p, q = policy_logits.log_softmax(-1), ref_logits.log_softmax(-1)
    each = torch.nn.functional.kl_div(p, q, log_target=True, reduction="none").sum(-1)
    return (each * mask).sum(1)


def raw(policy_logits, ref_logits, mask):
    return ((policy_logits.exp() * (policy_logits - ref_logits)).sum(-1) * mask).sum(1)


def over_time(policy_logits, ref_logits, mask):
    p, q = policy_logits.log_softmax(1), ref_logits.log_softmax(1)
    return ((p.exp() * (p - q)).sum(-1) * mask).sum(1)


def no_last(policy_logits, ref_logits, mask):
    shorter = mask & torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return sequence_kl(policy_logits, ref_logits, shorter)


RIGHT["06.2"] = [sequence_kl, sequence_kl_library, sequence_kl_rows]
WRONG["06.2"] = [
    (lambda policy_logits, ref_logits, mask: sequence_kl(policy_logits, ref_logits, mask) / mask.sum(1), "nats a token"),
    (lambda policy_logits, ref_logits, mask: (steps(policy_logits, ref_logits) * mask).mean(1), "padding included"),
    (lambda policy_logits, ref_logits, mask: steps(policy_logits, ref_logits).sum(1), "padding is counted"),
    (exchanged, "wrong way round"),
    (kl_div_as_it_reads, "wrong way round"),
    (raw, "not yet log-probs"),
    (over_time, "over time"),
    (lambda policy_logits, ref_logits, mask: sequence_kl(policy_logits, ref_logits, mask).mean(), "one number a response"),
    (lambda policy_logits, ref_logits, mask: steps(policy_logits, ref_logits) * mask, "shape"),
    (no_last, "EOS"),
    (lambda policy_logits, ref_logits, mask: -sequence_kl(policy_logits, ref_logits, mask), "turned around"),
    (lambda policy_logits, ref_logits, mask: sequence_kl(policy_logits.detach(), ref_logits, mask.roll(1, 1)), "should be"),
]  # fmt: skip

# --- 06.3 the exact KL of Best-of-N ---


def chances(probabilities, rewards, n):
    out = np.zeros(len(rewards))
    for reward in np.unique(rewards):
        tied = rewards == reward
        below = probabilities[rewards < reward].sum()
        here = probabilities[tied].sum()
        out[tied] = ((below + here) ** n - below**n) * probabilities[tied] / here
    return out


def best_of_n_kl(probabilities, rewards, n):
    c = chances(probabilities, rewards, n)
    return (c * np.log(c / probabilities)).sum()


def best_of_n_kl_by_first_draw(probabilities, rewards, n):
    """The winner is draw k: the k draws before it are worse, those after it no better."""
    c = np.zeros(len(rewards))
    for i, (p, r) in enumerate(zip(probabilities, rewards, strict=True)):
        worse, no_better = probabilities[rewards < r].sum(), probabilities[rewards <= r].sum()
        c[i] = p * sum(worse**k * no_better ** (n - 1 - k) for k in range(n))
    return float(np.sum(c * (np.log(c) - np.log(probabilities))))


def by_place(probabilities, rewards, n):
    c = np.zeros(len(rewards))
    total = 0.0
    for i in sorted(range(len(rewards)), key=lambda i: rewards[i]):
        c[i] = (total + probabilities[i]) ** n - total**n
        total += probabilities[i]
    return (c * np.log(c / probabilities)).sum()


def half_and_half(probabilities, rewards, n):
    c = chances(probabilities, rewards, n)
    for reward in np.unique(rewards):
        c[rewards == reward] = c[rewards == reward].mean()
    return (c * np.log(c / probabilities)).sum()


def of_chances(change):
    return lambda probabilities, rewards, n: change(chances(probabilities, rewards, n), probabilities)


def density(probabilities, rewards, n):
    ratio = np.array([n * probabilities[rewards <= r].sum() ** (n - 1) for r in rewards])
    return (probabilities * ratio * np.log(ratio)).sum()


RIGHT["06.3"] = [best_of_n_kl, best_of_n_kl_by_first_draw]
WRONG["06.3"] = [
    (lambda probabilities, rewards, n: np.log(n) - (n - 1) / n, "this is the bound"),
    (lambda probabilities, rewards, n: np.log(n), "log N alone"),
    (by_place, "place in the list"),
    (half_and_half, "half and half"),
    (lambda probabilities, rewards, n: best_of_n_kl(probabilities, -rewards, n), "worst of N"),
    (of_chances(lambda c, p: (p * np.log(p / c)).sum()), "wrong way round"),
    (of_chances(lambda c, p: -(c * np.log(c / p)).sum()), "wrong sign"),
    (lambda probabilities, rewards, n: best_of_n_kl(probabilities, rewards, n - 1), "one too small"),
    (density, "density"),
    (of_chances(lambda c, p: (c * np.log2(c / p)).sum()), "bits"),
    (of_chances(lambda c, p: c), "shape"),
    (lambda probabilities, rewards, n: best_of_n_kl(probabilities, rewards, n + 1), "should be"),
]

# --- 06.4 the best within 5 nats ---

RIGHT["06.4"] = ["D", " d"]
WRONG["06.4"] = [
    ("A", "learn from labels"),
    ("B", "only chooses"),
    ("c", "longer way"),
    ("E", "better of two"),
    ("F", "is not it"),
    (4, "a text"),
]

# --- 06.5 reward at equal KL ---


def reward_at(kl, reward, xs):
    order = np.argsort(kl)
    return np.interp(xs, kl[order], reward[order], left=np.nan, right=np.nan)


def reward_at_by_weights(kl, reward, xs):
    points = sorted(zip(kl, reward, strict=True))
    out = []
    for x in xs:
        before, after = [p for p in points if p[0] <= x], [p for p in points if p[0] >= x]
        if not before or not after:
            out.append(float("nan"))
        elif before[-1][0] == after[0][0]:
            out.append(before[-1][1])
        else:
            share = (x - before[-1][0]) / (after[0][0] - before[-1][0])
            out.append((1 - share) * before[-1][1] + share * after[0][1])
    return torch.tensor(out)


def read(at, nan_outside=True):
    def answer(kl, reward, xs):
        points = sorted(zip(kl, reward, strict=True))
        k, r = (np.array(column) for column in zip(*points, strict=True))
        inside = lambda x: k.min() <= x <= k.max()
        return np.array([at(k, r, x) if inside(x) or not nan_outside else np.nan for x in xs])

    return answer


def line_drawn_on(k, r, x):
    i = min(max(int((k < x).sum()) - 1, 0), len(k) - 2)
    slope = (r[i + 1] - r[i]) / (k[i + 1] - k[i])
    return r[i] + slope * (x - k[i])


def middle(k, r, x):
    left, right = r[k <= x][-1], r[k >= x][0]
    return (left + right) / 2


RIGHT["06.5"] = [reward_at, reward_at_by_weights]
WRONG["06.5"] = [
    (lambda kl, reward, xs: np.interp(xs, kl, reward, left=np.nan, right=np.nan), "sorted"),
    (read(lambda k, r, x: np.interp(x, k, r), nan_outside=False), "end point"),
    (read(line_drawn_on, nan_outside=False), "drawn on"),
    (read(lambda k, r, x: max(b for a, b in zip(k, r, strict=True) if a <= x)), "staircase"),
    (read(lambda k, r, x: min(zip(k, r, strict=True), key=lambda p: abs(p[0] - x))[1]), "nearest"),
    (read(lambda k, r, x: r[(k <= x).sum() - 1]), "last point before"),
    (read(middle), "middle"),
    (lambda kl, reward, xs: reward_at(kl, reward, xs)[1:-1], "shape"),
    (lambda kl, reward, xs: reward_at(reward, kl, xs), "NaN"),
    (lambda kl, reward, xs: np.nan_to_num(reward_at(kl, reward, xs)), "should be"),
]

# --- 06.6 four broken frontier scripts ---

RIGHT["06.6"] = [{1: "D", 2: "B", 3: "A", 4: "C"}, {4: "c", 3: " a", 2: "b", 1: "d"}]
WRONG["06.6"] = [
    ({1: "D", 2: "A", 3: "B", 4: "C"}, "A and B"),
    ({1: "D", 2: "B", 3: "C", 4: "A"}, "A and C"),
    ({1: "A", 2: "B", 3: "D", 4: "C"}, "A and D"),
    ({1: "D", 2: "C", 3: "A", 4: "B"}, "B and C"),
    ({1: "B", 2: "D", 3: "A", 4: "C"}, "B and D"),
    ({1: "C", 2: "B", 3: "A", 4: "D"}, "C and D"),
    ({1: "A", 2: "B", 3: "C", 4: "D"}, "is not it"),
    ({"D": 1}, "dict"),
]
