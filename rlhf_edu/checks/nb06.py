"""Exercises of notebook 06, the IMDb frontier."""

import itertools
import math

import numpy as np
import torch

from . import Exercise, Mistake
from .truths06 import BROKEN, best_within, found_by_symptoms

# --- 06.1: the tilted policy ---


def _tilt_inputs(rng, responses=7):
    return {
        "logps": torch.tensor(np.log(rng.dirichlet(np.ones(responses)))),
        "rewards": torch.tensor(rng.random(responses)),
        "beta": float(rng.uniform(0.2, 0.7)),
    }


def _tilt_by_loop(logps, rewards, beta):
    weights = [
        math.exp(l) * math.exp(r / beta) for l, r in zip(logps.tolist(), rewards.tolist(), strict=True)
    ]
    p = [w / math.fsum(weights) for w in weights]
    reward = math.fsum(a * r for a, r in zip(p, rewards.tolist(), strict=True))
    kl = math.fsum(a * (math.log(a) - l) for a, l in zip(p, logps.tolist(), strict=True))
    return np.array(p), reward, kl


def _tilt(logits=lambda s, r, b: s + r / b, normalise=True, reward=None, kl=None):
    """A wrong tilt: its logits of (logps, rewards, beta), and what it takes for reward and KL of (p, logps, r, beta)."""

    def answer(logps, rewards, beta):
        z = logits(logps, rewards, beta)
        p = z.softmax(0) if normalise else z.exp()
        value = reward(p, logps, rewards, beta) if reward else (p * rewards).sum()
        distance = kl(p, logps, rewards, beta) if kl else (p * (p.log() - logps)).sum()
        return p, value, distance

    return answer


# --- 06.2: the KL of a response ---


def _kl_inputs(rng, batch=4, time=6, vocabulary=5):
    lengths = rng.integers(1, time + 1, batch)
    lengths[0], lengths[1] = time, time - 3
    return {
        "policy_logits": torch.tensor(rng.normal(0, 1.5, (batch, time, vocabulary))),
        "ref_logits": torch.tensor(rng.normal(0, 1.5, (batch, time, vocabulary))),
        "mask": torch.tensor(np.arange(time) < lengths[:, None]),
    }


def _kl_by_loop(policy_logits, ref_logits, mask):
    out = []
    for p_row, q_row, m_row in zip(policy_logits.tolist(), ref_logits.tolist(), mask.tolist(), strict=True):
        total = 0.0
        for p, q, counts in zip(p_row, q_row, m_row, strict=True):
            if counts:
                norm_p, norm_q = (math.log(math.fsum(map(math.exp, z))) for z in (p, q))
                total += math.fsum(
                    math.exp(a - norm_p) * (a - norm_p - b + norm_q) for a, b in zip(p, q, strict=True)
                )
        out.append(total)
    return np.array(out)


def _kl(a=lambda x: x.log_softmax(-1), reverse=False, masked=True, finish=lambda kl, mask: kl.sum(1)):
    """A wrong sequence KL: how logits become log-probs, the direction, the mask, and how steps are put together."""

    def answer(policy_logits, ref_logits, mask):
        p, q = a(policy_logits), a(ref_logits)
        p, q = (q, p) if reverse else (p, q)
        each = (p.exp() * (p - q)).sum(-1)
        return finish(each * mask if masked else each, mask)

    return answer


def _without_last(kl, mask):
    kl = kl.clone()
    kl[torch.arange(len(kl)), mask.sum(1) - 1] = 0
    return kl.sum(1)


# --- 06.3: Best-of-N ---


def _choice_inputs(rng, responses=5):
    p = rng.dirichlet(2 * np.ones(responses))
    rewards = np.round(rng.random(responses), 3)
    rewards[1] = rewards[0]  # a tie; the others almost surely differ
    return {"probabilities": p, "rewards": rewards, "n": int(rng.integers(2, 5))}


def _kl_by_all_draws(probabilities, rewards, n):
    chance = [0.0] * len(probabilities)
    for draws in itertools.product(range(len(probabilities)), repeat=n):
        best = max(draws, key=lambda i: rewards[i])  # the first draw of the highest reward
        chance[best] += math.prod(probabilities[i] for i in draws)
    return math.fsum(c * math.log(c / p) for c, p in zip(chance, probabilities, strict=True) if c > 0)


def _choice(share="reference", power=lambda n: n, worst=False, of=lambda c, p: (c * np.log(c / p)).sum()):
    """A wrong Best-of-N: how a tie is shared, the power, best or worst, and what is made of the distribution."""

    def answer(probabilities, rewards, n):
        p, r = np.asarray(probabilities), np.asarray(rewards) * (-1 if worst else 1)
        if share == "index":  # responses of one reward are ranked by their place
            order = np.argsort(r, kind="stable")
            up_to = np.empty(len(p))
            up_to[order] = p[order].cumsum()
            c = up_to ** power(n) - np.maximum(up_to - p, 0) ** power(n)
        else:
            up_to, here = (np.array([p[test(r, x)].sum() for x in r]) for test in (np.less_equal, np.equal))
            part = p / here if share == "reference" else 1 / np.array([(r == x).sum() for x in r])
            c = part * (up_to ** power(n) - np.maximum(up_to - here, 0) ** power(n))
        return of(c, p)

    return answer


def _continuous(probabilities, rewards, n):
    p, r = np.asarray(probabilities), np.asarray(rewards)
    up_to = np.array([p[r <= x].sum() for x in r])
    return (p * n * up_to ** (n - 1) * np.log(n * up_to ** (n - 1))).sum()


# --- 06.5: reward at equal KL ---


def _curve_inputs(rng, points=6):
    kl = rng.permutation(np.cumsum(rng.uniform(0.5, 2.0, points)))
    kl[0], kl[1] = sorted(kl[:2], reverse=True)  # never in order
    x = np.sort(kl)
    inside = x[:-1] + rng.uniform(0.2, 0.8, points - 1) * np.diff(x)
    return {
        "kl": kl,
        "reward": rng.uniform(0.4, 0.95, points),
        "xs": np.array([x[0] - 0.3, *inside, x[2], x[-1] + 0.4]),
    }


def _curve_by_loop(kl, reward, xs):
    points = sorted(zip(kl.tolist(), reward.tolist(), strict=True))
    out = []
    for x in xs.tolist():
        found = math.nan
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if x0 <= x <= x1:
                found = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        out.append(found)
    return np.array(out)


def _curve(at, outside=True):
    """A wrong reading: at(sorted kl, rewards, x) for each x; NaN outside if `outside`."""

    def answer(kl, reward, xs):
        order = np.argsort(kl)
        k, r = kl[order], reward[order]
        return np.array([at(k, r, x) if k[0] <= x <= k[-1] or not outside else math.nan for x in xs])

    return answer


def _unsorted(kl, reward, xs):
    return np.interp(xs, kl, reward, left=math.nan, right=math.nan)


def _line(k, r, x):
    i = int(np.clip(np.searchsorted(k, x) - 1, 0, len(k) - 2))
    return r[i] + (r[i + 1] - r[i]) * (x - k[i]) / (k[i + 1] - k[i])


# --- 06.6: broken scripts ---


def _exchanged(first, second):
    other = {first: second, second: first}
    return {number: other.get(letter, letter) for number, letter in BROKEN.items()}


_TELLS = {
    "AB": "one of them leaves the rewards as they are",
    "AC": "one of them leaves the KL as it is",
    "AD": "one of them is right as long as there is one checkpoint",
    "BC": "one of them even reports a KL below 0, the other the right KL",
    "BD": "one of them knows a single response",
    "CD": "only one of them asked another judge",
}

EXERCISES = [
    Exercise(
        "06.1",
        "the tilted policy",
        truth=_tilt_by_loop,
        inputs=_tilt_inputs,
        mistakes=(
            Mistake("the reward is multiplied by β here: a small β should tilt more, not less.", _tilt(lambda s, r, b: s + b * r)),
            Mistake("this tilts away from the reward: check the sign of the exponent.", _tilt(lambda s, r, b: s - r / b)),
            Mistake("the reference is missing: only the rewards decide here.", _tilt(lambda s, r, b: r / b)),
            Mistake("β divides the reference as well; it belongs to the reward alone.", _tilt(lambda s, r, b: (s + r) / b)),
            Mistake("β is missing in the exponent.", _tilt(lambda s, r, b: s + r)),
            Mistake("these are weights; divided by their sum they are probabilities.", _tilt(normalise=False)),
            Mistake("the KL stands the wrong way round: the expectation is under the tilted policy.", _tilt(kl=lambda p, s, r, b: (s.exp() * (s - p.log())).sum())),
            Mistake("the KL has the wrong sign.", _tilt(kl=lambda p, s, r, b: (p * (s - p.log())).sum())),
            Mistake("the second value is the mean reward of the reference.", _tilt(reward=lambda p, s, r, b: (s.exp() * r).sum())),
            Mistake("the second value is the whole objective; the page asks for the reward alone.", _tilt(reward=lambda p, s, r, b: (p * r).sum() - b * (p * (p.log() - s)).sum())),
            Mistake("the third value is β times the KL; the page asks for nats.", _tilt(kl=lambda p, s, r, b: b * (p * (p.log() - s)).sum())),
        ),
        praise="Every method of this page tries to reach this curve without ever listing the responses.",
    ),
    Exercise(
        "06.2",
        "the KL of a response",
        truth=_kl_by_loop,
        inputs=_kl_inputs,
        mistakes=(
            Mistake("this is the mean over the tokens of a response: nats a token, and the axis has nats a response.", _kl(finish=lambda kl, m: kl.sum(1) / m.sum(1))),
            Mistake("this is the mean over all columns, padding included.", _kl(finish=lambda kl, m: kl.mean(1))),
            Mistake("padding is counted: multiply by the mask.", _kl(masked=False)),
            Mistake("the KL stands the wrong way round: the policy's probabilities weigh.", _kl(reverse=True)),
            Mistake("logits are not yet log-probs.", _kl(a=lambda x: x)),
            Mistake("the softmax runs over time instead of the vocabulary.", _kl(a=lambda x: x.log_softmax(1))),
            Mistake("one number a response is asked for: the mean over the batch is the caller's.", _kl(finish=lambda kl, m: kl.sum(1).mean())),
            Mistake("the last token of the mask, EOS, is left out.", _kl(finish=_without_last)),
            Mistake("the sign is turned around: policy minus reference.", _kl(finish=lambda kl, m: -kl.sum(1))),
        ),
        praise="Sum over time, then mean over responses: the paper's sequence-level KL.",
    ),
    Exercise(
        "06.3",
        "the exact KL of Best-of-N",
        truth=_kl_by_all_draws,
        inputs=_choice_inputs,
        mistakes=(
            Mistake("this is the bound log N − (N − 1)/N; it does not look at the responses at all.", lambda probabilities, rewards, n: math.log(n) - (n - 1) / n),
            Mistake("log N alone is a bound as well, and a loose one.", lambda probabilities, rewards, n: math.log(n)),
            Mistake("the tie is broken by the place in the list; here the first draw of the highest reward wins.", _choice(share="index")),
            Mistake("a tie is not shared half and half: what the reference writes more often is drawn first more often.", _choice(share="equal")),
            Mistake("this is the worst of N.", _choice(worst=True)),
            Mistake("the KL stands the wrong way round.", _choice(of=lambda c, p: (p * np.log(p / np.maximum(c, 1e-300))).sum())),
            Mistake("the KL has the wrong sign.", _choice(of=lambda c, p: (c * np.log(p / c)).sum())),
            Mistake("the power is one too small: all N draws must be at most as good.", _choice(power=lambda n: n - 1)),
            Mistake("N F^(N−1) is a density for rewards without atoms; here each response has a probability of its own.", _continuous),
            Mistake("these are bits; natural logarithms give nats.", _choice(of=lambda c, p: (c * np.log2(c / p)).sum())),
        ),
        praise="It never exceeds the bound, and with few responses it stays far below.",
    ),
    Exercise(
        "06.4",
        "the best within 5 nats",
        truth=lambda: best_within(5.0),
        mistakes=(
            Mistake("DPO has to learn from labels, in its weights, what another one looks up text by text.", "A"),
            Mistake("PPO spends its nats on more than the choice of a good text. Who only chooses?", "B"),
            Mistake("the true reward is at hand, but training is a longer way to use it than choosing.", "C"),
            Mistake("Preferred-FT imitates winners of pairs: that is no more than the better of two.", "E"),
        ),
        praise="It pays in samples, not in nats: the KL axis does not show what an answer costs.",
    ),
    Exercise(
        "06.5",
        "reward at equal KL",
        truth=_curve_by_loop,
        inputs=_curve_inputs,
        mistakes=(
            Mistake("the points are not in order of KL: np.interp needs them sorted, and says nothing if they are not.", _unsorted),
            Mistake("outside the curve nothing was measured: NaN, not the end point's reward.", _curve(lambda k, r, x: np.interp(x, k, r), outside=False)),
            Mistake("outside the curve nothing was measured: NaN, not a line drawn on.", _curve(_line, outside=False)),
            Mistake("this is the best point up to x, a staircase; between two points a line is asked for.", _curve(lambda k, r, x: r[k <= x].max())),
            Mistake("this takes the nearest point's reward; between two points a line is asked for.", _curve(lambda k, r, x: r[np.abs(k - x).argmin()])),
            Mistake("this takes the last point before x; between two points a line is asked for.", _curve(lambda k, r, x: r[k <= x][-1])),
            Mistake("this takes the middle of the two neighbours, wherever x lies between them.", _curve(lambda k, r, x: r[k == x][0] if (k == x).any() else (r[k <= x][-1] + r[k >= x][0]) / 2)),
        ),
        praise="NaN is an honest answer: there is no comparison where a method has not been.",
    ),
    Exercise(
        "06.6",
        "four broken frontier scripts",
        truth=found_by_symptoms,
        mistakes=tuple(
            Mistake(f"{a} and {b} are exchanged: {_TELLS[a + b]}.", _exchanged(a, b))
            for a, b in itertools.combinations("ABCD", 2)
        ),
        praise="Each of them would have drawn a smooth curve.",
    ),
]  # fmt: skip
