"""Exercises of notebook 05, DPO trained."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from . import Exercise, Mistake
from .truths05 import BUGS


def _log_probs(rng, pairs=6, grad=True):
    """Summed log-probs of policy and reference, float64; the policy's want gradients."""
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    values = {name: torch.tensor(rng.normal(-20, 4, pairs)) for name in names}
    for name in names[:2]:
        values[name].requires_grad_(grad)
    return values | {"beta": float(rng.uniform(0.05, 0.5))}


# --- 05.2: implicit rewards and their accuracy ---


def _rewards_inputs(rng):
    values = _log_probs(rng, pairs=9, grad=False)
    for name in ("chosen_logps", "ref_chosen_logps"):  # the last pair is a tie
        values[name] = torch.cat([values[name][:-1], values[name.replace("chosen", "rejected")][-1:]])
    return values


def _rewards_by_loop(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    sides = [(chosen_logps, ref_chosen_logps), (rejected_logps, ref_rejected_logps)]
    rewards = [[beta * (s - r) for s, r in zip(p.tolist(), q.tolist(), strict=True)] for p, q in sides]
    return (*map(np.array, rewards), np.mean([w > l for w, l in zip(*rewards, strict=True)]))


def _rewards(chosen, rejected, accuracy=lambda w, l: (w > l).double().mean()):
    """A wrong answer from two functions of (log-prob, its reference, the other reference, beta)."""

    def answer(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
        w = chosen(chosen_logps, ref_chosen_logps, ref_rejected_logps, beta)
        l = rejected(rejected_logps, ref_rejected_logps, ref_chosen_logps, beta)
        return w, l, accuracy(w, l)

    return answer


def _both(reward, **more):
    return _rewards(reward, reward, **more)


def _right(s, ref, other, beta):
    return beta * (s - ref)


def _accuracy_by_likelihood(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    w, l = beta * (chosen_logps - ref_chosen_logps), beta * (rejected_logps - ref_rejected_logps)
    return w, l, (chosen_logps > rejected_logps).double().mean()


def _swapped_rewards(**inputs):
    w, l, accuracy = _rewards_by_loop(**inputs)
    return l, w, accuracy


# --- 05.4: KL from samples ---


def _kl_inputs(rng):
    shape = (8, 11)
    lengths = rng.integers(2, 11, shape[0])
    draw = lambda shift: torch.tensor(rng.normal(-3 + shift, 1, shape))
    return {
        "policy_logps": draw(0.3),
        "reference_logps": draw(0.0),
        "response_mask": torch.tensor(np.arange(shape[1])[None] < lengths[:, None]),
    }


def _kl_by_loop(policy_logps, reference_logps, response_mask):
    sums = []
    for row in range(len(policy_logps)):
        tokens = [t for t in range(policy_logps.shape[1]) if response_mask[row, t]]
        sums.append(math.fsum((policy_logps[row, t] - reference_logps[row, t]).item() for t in tokens))
    mean = math.fsum(sums) / len(sums)
    variance = math.fsum((s - mean) ** 2 for s in sums) / (len(sums) - 1)
    return mean, math.sqrt(variance / len(sums))


def _kl(per_response, error=lambda k: k.std() / len(k) ** 0.5, reduce=torch.mean):
    """A wrong answer from what it takes for the log-ratio of each response, its error and its average."""

    def answer(policy_logps, reference_logps, response_mask):
        k = per_response(policy_logps, reference_logps, response_mask)
        return reduce(k), error(k)

    return answer


def _summed(p, q, m):
    return ((p - q) * m).sum(1)


def _without_last(p, q, m):
    return ((p - q) * (m & (m.cumsum(1) < m.sum(1, keepdim=True)))).sum(1)


# --- 05.5: win rate ---


def _win_inputs(rng):
    n = 40
    return {"ours": rng.integers(2, 11, n) / 10, "theirs": rng.integers(0, 9, n) / 10}  # with ties


def _win_by_counting(ours, theirs):
    points = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]
    mean = math.fsum(points) / len(points)
    spread = math.sqrt(math.fsum((p - mean) ** 2 for p in points) / (len(points) - 1) / len(points))
    return 100 * mean, 100 * (mean - 1.96 * spread), 100 * (mean + 1.96 * spread)


def _win(points, half=lambda p: 1.96 * p.std(ddof=1) / len(p) ** 0.5, scale=100):
    def answer(ours, theirs):
        p = points(np.asarray(ours), np.asarray(theirs))
        return scale * p.mean(), scale * (p.mean() - half(p)), scale * (p.mean() + half(p))

    return answer


def _points(a, b):
    return (a > b) + 0.5 * (a == b)


# --- 05.7: conservative DPO ---


def _cdpo_inputs(rng):
    return _log_probs(rng) | {"eps": float(rng.uniform(0.05, 0.4))}


def _cdpo_by_cross_entropy(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, eps):
    """Cross-entropy between the label's distribution (1 - eps, eps) and the softmax of the two rewards."""
    rewards = beta * torch.stack([chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps])
    return -(torch.tensor([[1 - eps], [eps]], dtype=rewards.dtype) * rewards.log_softmax(0)).sum(0)


def _cdpo(formula):
    """A wrong answer from a formula of (h, beta, eps)."""

    def answer(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, eps):
        h = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
        return formula(h, beta, eps)

    return answer


def _no_reference(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, eps):
    zeros = torch.zeros_like(ref_chosen_logps)
    return _cdpo_by_cross_entropy(chosen_logps, rejected_logps, zeros, zeros, beta, eps)


def _smoothed(h, beta, eps):
    return -(1 - eps) * F.logsigmoid(beta * h) - eps * F.logsigmoid(-beta * h)


# --- 05.8: four broken trainings; the runs themselves are in truths05 ---


def _letters(**numbers):
    """The bugs A to D of the page with the number of the run that has each."""
    return dict(zip("ABCD", (numbers[name] for name in ("train", "no", "mean", "swapped")), strict=True))


EXERCISES = [
    Exercise(
        "05.1",
        "the loss before anything is learned",
        truth=lambda: -math.log(1 / (1 + math.exp(5 * 0))),
        tolerance=2e-4,
        mistakes=(
            Mistake("beta stands inside the sigmoid, in front of a difference of 0: it changes nothing.", 3.466),
            Mistake("0.5 is the probability σ(0); the loss is minus its logarithm.", 0.5),
            Mistake("a loss of 0 would need a policy that is certain of every label; this one knows none.", 0.0),
            Mistake("that is in bits; the course takes natural logarithms.", 1.0),
            Mistake("the sign: minus the logarithm of a probability is positive.", -0.693),
        ),
        praise="Policy and reference agree, every h is 0: any other first loss is a bug (05.8).",
    ),
    Exercise(
        "05.2",
        "implicit rewards and their accuracy",
        truth=_rewards_by_loop,
        inputs=_rewards_inputs,
        mistakes=(
            Mistake("beta is missing: the reward is β times the log-ratio.", _both(lambda s, r, o, b: s - r)),
            Mistake("the reference is missing: a reward is a log-ratio, not a log-prob.", _both(lambda s, r, o, b: b * s)),
            Mistake("the ratio stands upside down: policy over reference.", _both(lambda s, r, o, b: b * (r - s))),
            Mistake("each response goes with its own reference log-prob, and here they are crossed.", _both(lambda s, r, o, b: b * (s - o))),
            Mistake("the two rewards are in the wrong order: chosen first.", _swapped_rewards),
            Mistake("beta divides here; in the reward it multiplies.", _both(lambda s, r, o, b: (s - r) / b)),
            Mistake("a tie counts as right here: the chosen reward must be greater.", _both(_right, accuracy=lambda w, l: (w >= l).double().mean())),
            Mistake("the accuracy compares log-probs; it has to compare the rewards.", _accuracy_by_likelihood),
            Mistake("the accuracy is a share from 0 to 1, and this is a count.", _both(_right, accuracy=lambda w, l: (w > l).double().sum())),
            Mistake("the accuracy is a share from 0 to 1, and this is in percent.", _both(_right, accuracy=lambda w, l: 100 * (w > l).double().mean())),
            Mistake("the accuracy counts the pairs that are ordered wrongly.", _both(_right, accuracy=lambda w, l: (w < l).double().mean())),
            Mistake("one yes or no for each pair; the accuracy is their mean.", _both(_right, accuracy=lambda w, l: (w > l).double())),
        ),
        praise="Z(x) was never needed: it is the same for both responses of a prompt.",
    ),
    Exercise(
        "05.4",
        "KL from samples",
        truth=_kl_by_loop,
        inputs=_kl_inputs,
        mistakes=(
            Mistake("this is a mean over tokens; the KL of a response is a sum over its tokens.", _kl(lambda p, q, m: _summed(p, q, m) / m.sum(1))),
            Mistake("the mask is not used: what stands behind a response was counted.", _kl(lambda p, q, m: (p - q).sum(1))),
            Mistake("the KL is the wrong way round: the samples are the policy's, so it is log π − log π_ref.", _kl(lambda p, q, m: _summed(q, p, m))),
            Mistake("the last token of each response is missing: EOS is sampled like any other, and counts.", _kl(_without_last)),
            Mistake("an absolute value was taken: negative terms belong to the average.", _kl(lambda p, q, m: ((p - q).abs() * m).sum(1))),
            Mistake("an absolute value of each response was taken: negative ones belong to the average.", _kl(lambda p, q, m: _summed(p, q, m).abs())),
            Mistake("responses below 0 were set to 0: that biases the estimate upwards.", _kl(lambda p, q, m: _summed(p, q, m).clamp(min=0))),
            Mistake("half of a square is another estimator, and a biased one.", _kl(lambda p, q, m: ((p - q) ** 2 / 2 * m).sum(1))),
            Mistake("weighted with the probabilities: that counts them twice, the samples carry them already.", _kl(lambda p, q, m: (p.exp() * (p - q) * m).sum(1))),
            Mistake("the responses were added up; the estimate is their mean.", _kl(_summed, reduce=torch.sum)),
            Mistake("the second number is the standard deviation of one response; the mean of n is surer, by √n.", _kl(_summed, error=lambda k: k.std())),
            Mistake("the standard error takes n − 1 for the deviation, as the page says.", _kl(_summed, error=lambda k: k.std(correction=0) / len(k) ** 0.5)),
            Mistake("the second number is a variance: take its root.", _kl(_summed, error=lambda k: k.var() / len(k))),
        ),
        praise="Unbiased, but noisy: a single response can be negative, a KL cannot.",
    ),
    Exercise(
        "05.5",
        "win rate, ties and interval",
        truth=_win_by_counting,
        inputs=_win_inputs,
        mistakes=(
            Mistake("a tie counts as lost here: it is worth half a point.", _win(lambda a, b: (a > b) * 1.0)),
            Mistake("a tie counts as won here: it is worth half a point.", _win(lambda a, b: (a >= b) * 1.0)),
            Mistake("ties were left out: they are comparisons too, half a point each.", _win(lambda a, b: (a > b)[a != b] * 1.0)),
            Mistake("these are shares from 0 to 1; percent are asked for.", _win(_points, scale=1)),
            Mistake("these are the wins of the other side.", _win(lambda a, b: _points(b, a))),
            Mistake("the interval is one standard error wide; 95 % need 1.96 of them on each side.", _win(_points, half=lambda p: p.std(ddof=1) / len(p) ** 0.5)),
            Mistake("the interval is that of a single comparison: √n is missing.", _win(_points, half=lambda p: 1.96 * p.std(ddof=1))),
            Mistake("the deviation divides by n; the page asks for n − 1.", _win(_points, half=lambda p: 1.96 * p.std() / len(p) ** 0.5)),
            Mistake("p(1 − p) is the variance without ties; half points spread less: use the points' own deviation.", _win(_points, half=lambda p: 1.96 * (p.mean() * (1 - p.mean()) / len(p)) ** 0.5)),
        ),
        praise="With n comparisons the half-width is at most about 98/√n points: few prompts, wide interval.",
    ),
    Exercise(
        "05.6",
        "where a pair stops pushing",
        truth=lambda: next(h / 1e4 for h in range(200_000) if 1 / (1 + math.exp(0.5 * h / 1e4)) <= 0.1),
        tolerance=1e-3,
        mistakes=(
            Mistake("beta multiplies h inside the sigmoid, so solving for h divides by it.", math.log(9) * 0.5),
            Mistake("beta is missing: 2.197 is β h, and h is asked for.", math.log(9)),
            Mistake("a sigmoid, not an exponential: 1/(1 + e^z) = 0.1 has e^z = 9.", math.log(10) / 0.5),
            Mistake("the sign: the policy already prefers the chosen response, so h is positive.", -math.log(9) / 0.5),
            Mistake("the sign of h, and beta is missing: there the weight is 0.75.", -math.log(9)),
            Mistake("that is the h of a weight of 0.5: policy and reference agree.", 0.0),
        ),
        praise="h is asked for in inverse proportion to β: log 9 / β.",
    ),
    Exercise(
        "05.7",
        "conservative DPO",
        truth=_cdpo_by_cross_entropy,
        inputs=_cdpo_inputs,
        mistakes=(
            Mistake("this is plain DPO: the term for a flipped label is missing or not flipped.", _cdpo(lambda h, b, e: -F.logsigmoid(b * h))),
            Mistake("the weights are exchanged, or chosen and rejected: 1 − eps belongs to the label as given.", _cdpo(lambda h, b, e: _smoothed(h, b, 1 - e))),
            Mistake("the term for a flipped label is missing.", _cdpo(lambda h, b, e: -(1 - e) * F.logsigmoid(b * h))),
            Mistake("the second sign: both terms are minus a log-probability.", _cdpo(lambda h, b, e: -(1 - e) * F.logsigmoid(b * h) + e * F.logsigmoid(-b * h))),
            Mistake("dividing by 1 − 2 eps makes another loss, the robust one: here it is a plain average.", _cdpo(lambda h, b, e: (-(1 - e) * F.logsigmoid(b * h) + e * F.logsigmoid(-b * h)) / (1 - 2 * e))),
            Mistake("the average is of the two losses, not of the two probabilities inside one logarithm.", _cdpo(lambda h, b, e: -torch.log((1 - e) * torch.sigmoid(b * h) + e * torch.sigmoid(-b * h)))),
            Mistake("beta stands outside the sigmoid: it scales h inside.", _cdpo(lambda h, b, e: b * _smoothed(h, 1.0, e))),
            Mistake("beta is missing.", _cdpo(lambda h, b, e: _smoothed(h, 1.0, e))),
            Mistake("the sign: a loss is minus a log-probability.", _cdpo(lambda h, b, e: -_smoothed(h, b, e))),
            Mistake("one value a pair is asked for, and this is their mean: the trainer takes it.", _cdpo(lambda h, b, e: _smoothed(h, b, e).mean())),
            Mistake("the reference is missing.", _no_reference),
            Mistake("σ alone is no loss: the logarithm is missing.", _cdpo(lambda h, b, e: -(1 - e) * torch.sigmoid(b * h) - e * torch.sigmoid(-b * h))),
        ),
        praise="It is least at σ(β h) = 1 − eps: there the pair has arrived, and stops.",
    ),
    Exercise(
        "05.8",
        "four broken trainings",
        truth=lambda: _letters(**{bug.split()[0]: number for number, bug in BUGS.items()}),
        mistakes=(
            Mistake("C and D are exchanged: which of the two bugs turns the accuracy over?", _letters(train=3, no=4, mean=2, swapped=1)),
            Mistake("A and B are exchanged: in which run does the margin never leave 0?", _letters(train=4, no=3, mean=1, swapped=2)),
            Mistake("A and C are exchanged: in which run is the first loss not log 2?", _letters(train=1, no=4, mean=3, swapped=2)),
            Mistake("B and C are exchanged: one of them learns, though slowly.", _letters(train=3, no=1, mean=4, swapped=2)),
            Mistake("A and D are exchanged: noise in the reference spoils no label.", _letters(train=2, no=4, mean=1, swapped=3)),
            Mistake("B and D are exchanged: a loss that falls has a gradient.", _letters(train=3, no=2, mean=1, swapped=4)),
        ),
        praise="First loss, sign of the margin, size of the margin: three looks find most bugs of preference training.",
    ),
]  # fmt: skip
