"""Answers to the exercises of notebook 05 as students write them."""

import math

import numpy as np
import torch
import torch.nn.functional as F

WRONG, RIGHT = {}, {}

# --- 05.1 the loss before anything is learned ---

RIGHT["05.1"] = [
    0.693,
    math.log(2),
    0.6931471805599453,
    -math.log(0.5),
    torch.tensor(2.0).log(),
    np.log(2),
    0.6931,
]
WRONG["05.1"] = [
    (5 * math.log(2), "in front of a difference of 0"),
    (3.466, "in front of a difference of 0"),
    (0.5, "minus its logarithm"),
    (0, "certain of every label"),
    (1.0, "in bits"),
    (-math.log(2), "the sign"),
    (0.69, "should be 0.693"),
    (0.7, "should be 0.693"),
    (5, "should be 0.693"),
    ("log 2", "numbers are asked for"),
    ([0.693], "shape"),
]

# --- 05.2 implicit rewards and their accuracy ---


def rewards_right(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    return chosen, rejected, (chosen > rejected).float().mean()


def rewards_stacked(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    policy, reference = (
        torch.stack([chosen_logps, rejected_logps]),
        torch.stack([ref_chosen_logps, ref_rejected_logps]),
    )
    rewards = (policy - reference).mul(beta)
    return [rewards[0], rewards[1], sum(rewards[0] - rewards[1] > 0).item() / rewards.shape[1]]


def rewards_no_beta(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    w, l = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    return w, l, (w > l).float().mean()


def rewards_no_reference(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    w, l = beta * chosen_logps, beta * rejected_logps
    return w, l, (w > l).float().mean()


def rewards_upside_down(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    w, l = beta * (ref_chosen_logps - chosen_logps), beta * (ref_rejected_logps - rejected_logps)
    return w, l, (w > l).float().mean()


def rewards_crossed(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    w, l = beta * (chosen_logps - ref_rejected_logps), beta * (rejected_logps - ref_chosen_logps)
    return w, l, (w > l).float().mean()


def rewards_divided(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    w, l = (chosen_logps - ref_chosen_logps) / beta, (rejected_logps - ref_rejected_logps) / beta
    return w, l, (w > l).float().mean()


def rewards_wrong_order(**inputs):
    w, l, accuracy = rewards_right(**inputs)
    return l, w, accuracy


def rewards_tie_is_right(**inputs):
    w, l, _ = rewards_right(**inputs)
    return w, l, (w >= l).float().mean()


def rewards_accuracy_of_likelihood(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    w, l, _ = rewards_right(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return w, l, (chosen_logps > rejected_logps).float().mean()


def rewards_count(**inputs):
    w, l, _ = rewards_right(**inputs)
    return w, l, (w > l).sum()


def rewards_percent(**inputs):
    w, l, accuracy = rewards_right(**inputs)
    return w, l, 100 * accuracy


def rewards_errors(**inputs):
    w, l, _ = rewards_right(**inputs)
    return w, l, (w < l).float().mean()


def rewards_each(**inputs):
    w, l, _ = rewards_right(**inputs)
    return w, l, (w > l).float()


def rewards_no_accuracy(**inputs):
    return rewards_right(**inputs)[:2]


def rewards_margin(**inputs):
    w, l, accuracy = rewards_right(**inputs)
    return w - l, accuracy


def rewards_of_means(**inputs):
    w, l, _ = rewards_right(**inputs)
    return w, l, (w.mean() > l.mean()).float()


RIGHT["05.2"] = [rewards_right, rewards_stacked]
WRONG["05.2"] = [
    (rewards_no_beta, "beta is missing"),
    (rewards_no_reference, "the reference is missing"),
    (rewards_upside_down, "upside down"),
    (rewards_crossed, "crossed"),
    (rewards_divided, "beta divides"),
    (rewards_wrong_order, "wrong order"),
    (rewards_tie_is_right, "a tie counts as right"),
    (rewards_accuracy_of_likelihood, "compares log-probs"),
    (rewards_count, "this is a count"),
    (rewards_percent, "in percent"),
    (rewards_errors, "ordered wrongly"),
    (rewards_each, "their mean"),
    (rewards_no_accuracy, "3 things"),
    (rewards_margin, "3 things"),
    (rewards_of_means, "part 3"),
]

# --- 05.4 KL from samples ---


def kl_right(policy_logps, reference_logps, response_mask):
    per_response = torch.where(response_mask, policy_logps - reference_logps, 0.0).sum(-1)
    return per_response.mean(), per_response.std() / math.sqrt(len(per_response))


def kl_sum_first(policy_logps, reference_logps, response_mask):
    mask = response_mask.double()
    k = np.array(
        [
            (p * m).sum().item() - (q * m).sum().item()
            for p, q, m in zip(policy_logps, reference_logps, mask, strict=True)
        ]
    )
    return k.mean(), k.std(ddof=1) / len(k) ** 0.5


def kl_filled(policy_logps, reference_logps, response_mask):
    ratio = (policy_logps - reference_logps).masked_fill(~response_mask, 0).sum(1)
    return ratio.sum() / len(ratio), torch.sqrt(ratio.var() / ratio.numel())


def kl_variant(per_response, mean=torch.mean, error=lambda k: k.std() / len(k) ** 0.5):
    def answer(policy_logps, reference_logps, response_mask):
        k = per_response(policy_logps, reference_logps, response_mask)
        return mean(k), error(k)

    return answer


def log_ratio(p, q, m):
    return torch.where(m, p - q, 0.0).sum(-1)


def kl_over_tokens(policy_logps, reference_logps, response_mask):
    k = (policy_logps - reference_logps)[response_mask]
    return k.mean(), k.std() / len(k) ** 0.5


def kl_drop_last(p, q, m):
    keep = m.clone()
    keep[torch.arange(len(m)), m.sum(1) - 1] = False
    return log_ratio(p, q, keep)


def kl_drop_first(p, q, m):
    keep = m.clone()
    keep[:, 0] = False
    return log_ratio(p, q, keep)


def kl_k3(p, q, m):
    return torch.where(m, (q - p).exp() - 1 + (p - q), 0.0).sum(-1)


RIGHT["05.4"] = [kl_right, kl_sum_first, kl_filled]
WRONG["05.4"] = [
    (kl_variant(lambda p, q, m: log_ratio(p, q, m) / m.sum(-1)), "mean over tokens"),
    (kl_variant(lambda p, q, m: (p - q).sum(-1)), "mask is not used"),
    (kl_variant(lambda p, q, m: log_ratio(q, p, m)), "wrong way round"),
    (kl_variant(kl_drop_last), "EOS is sampled like any other"),
    (kl_variant(lambda p, q, m: log_ratio(p, q, m).abs()), "absolute value of each response"),
    (kl_variant(lambda p, q, m: torch.where(m, (p - q).abs(), 0.0).sum(-1)), "absolute value was taken"),
    (kl_variant(lambda p, q, m: log_ratio(p, q, m).clamp(min=0)), "set to 0"),
    (kl_variant(lambda p, q, m: torch.where(m, 0.5 * (p - q).square(), 0.0).sum(-1)), "half of a square"),
    (kl_variant(lambda p, q, m: torch.where(m, p.exp() * (p - q), 0.0).sum(-1)), "counts them twice"),
    (kl_variant(log_ratio, mean=torch.sum), "added up"),
    (kl_variant(log_ratio, error=torch.std), "by √n"),
    (kl_variant(log_ratio, error=lambda k: k.std(unbiased=False) / len(k) ** 0.5), "n − 1"),
    (kl_variant(log_ratio, error=lambda k: k.var() / len(k)), "variance"),
    (kl_over_tokens, "part 1"),
    (kl_variant(kl_drop_first), "part 1"),
    (kl_variant(kl_k3), "part 1"),
    (lambda policy_logps, reference_logps, response_mask: log_ratio(policy_logps, reference_logps, response_mask).mean(), "2 things"),
]  # fmt: skip

# --- 05.5 win rate, ties and interval ---


def win_right(ours, theirs):
    points = 100 * ((ours > theirs) + 0.5 * (ours == theirs))
    half = 1.96 * points.std(ddof=1) / np.sqrt(len(points))
    return points.mean(), points.mean() - half, points.mean() + half


def win_by_sign(ours, theirs):
    points = torch.tensor((np.sign(ours - theirs) + 1) / 2)
    error = points.std() / len(points) ** 0.5
    rate = 100 * points.mean()
    return [float(rate), float(rate - 196 * error), float(rate + 196 * error)]


def win_variant(points, half=lambda p: 1.96 * p.std(ddof=1) / len(p) ** 0.5, scale=100):
    def answer(ours, theirs):
        p = np.asarray(points(ours, theirs), dtype=float)
        return scale * p.mean(), scale * (p.mean() - half(p)), scale * (p.mean() + half(p))

    return answer


def half_points(a, b):
    return np.where(a > b, 1, np.where(a == b, 0.5, 0))


RIGHT["05.5"] = [win_right, win_by_sign]
WRONG["05.5"] = [
    (win_variant(lambda a, b: a > b), "counts as lost"),
    (win_variant(lambda a, b: a >= b), "counts as won"),
    (win_variant(lambda a, b: (a > b)[a != b]), "left out"),
    (win_variant(half_points, scale=1), "from 0 to 1"),
    (win_variant(lambda a, b: half_points(b, a)), "other side"),
    (win_variant(half_points, half=lambda p: p.std(ddof=1) / len(p) ** 0.5), "one standard error"),
    (win_variant(half_points, half=lambda p: 1.96 * p.std(ddof=1)), "single comparison"),
    (win_variant(half_points, half=lambda p: 1.96 * np.std(p) / len(p) ** 0.5), "divides by n"),
    (win_variant(half_points, half=lambda p: 1.96 * (p.mean() * (1 - p.mean()) / len(p)) ** 0.5), "half points spread less"),
    (win_variant(half_points, half=lambda p: 2 * p.std(ddof=1) / len(p) ** 0.5), "part 2"),
    (lambda ours, theirs: win_right(ours, theirs)[0], "3 things"),
    (lambda ours, theirs: tuple(win_right(ours, theirs)[i] for i in (1, 0, 2)), "part 1"),
    (lambda ours, theirs: tuple(win_right(ours, theirs)[i] for i in (0, 2, 1)), "part 2"),
    (win_variant(lambda a, b: (np.sign(a - b))), "part 1"),
]  # fmt: skip

# --- 05.6 where a pair stops pushing ---

RIGHT["05.6"] = [math.log(9) / 0.5, 4.394, 4.39, 2 * np.log(9), torch.tensor(4.3944)]
WRONG["05.6"] = [
    (0.5 * math.log(9), "solving for h divides"),
    (math.log(9), "beta is missing"),
    (2 * math.log(10), "not an exponential"),
    (-2 * math.log(9), "the sign"),
    (-math.log(9), "the weight is 0.75"),
    (0, "weight of 0.5"),
    (4.4, "should be 4.39"),
    (4.5, "should be 4.39"),
    (9, "should be 4.39"),
]

# --- 05.7 conservative DPO ---


def cdpo_right(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, eps):
    h = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return (1 - eps) * -F.logsigmoid(beta * h) + eps * -F.logsigmoid(-beta * h)


def cdpo_softplus(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, eps):
    h = (chosen_logps - rejected_logps) - (ref_chosen_logps - ref_rejected_logps)
    return F.softplus(-beta * h) + eps * beta * h


def cdpo_by_entropy(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, eps):
    z = beta * (chosen_logps - ref_chosen_logps - rejected_logps + ref_rejected_logps)
    return F.binary_cross_entropy_with_logits(z, torch.full_like(z, 1 - eps), reduction="none")


def cdpo_variant(formula, reference=1.0, sign=1.0):
    def answer(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, eps):
        h = chosen_logps - rejected_logps - reference * (ref_chosen_logps - ref_rejected_logps)
        return formula(sign * h, beta, eps)

    return answer


def smoothed(h, b, e):
    return (1 - e) * F.softplus(-b * h) + e * F.softplus(b * h)


WRONG["05.7"] = [
    (cdpo_variant(lambda h, b, e: F.softplus(-b * h)), "plain DPO"),
    (cdpo_variant(lambda h, b, e: (1 - e) * F.softplus(-b * h) + e * F.softplus(-b * h)), "plain DPO"),
    (cdpo_variant(lambda h, b, e: e * F.softplus(-b * h) + (1 - e) * F.softplus(b * h)), "the weights are exchanged"),
    (cdpo_variant(smoothed, sign=-1.0), "or chosen and rejected"),
    (cdpo_variant(lambda h, b, e: (1 - e) * F.softplus(-b * h)), "flipped label is missing"),
    (cdpo_variant(lambda h, b, e: (1 - e) * F.softplus(-b * h) - e * F.softplus(b * h)), "the second sign"),
    (cdpo_variant(lambda h, b, e: ((1 - e) * F.softplus(-b * h) - e * F.softplus(b * h)) / (1 - 2 * e)), "robust"),
    (cdpo_variant(lambda h, b, e: -((1 - e) * (b * h).sigmoid() + e * (-b * h).sigmoid()).log()), "inside one logarithm"),
    (cdpo_variant(lambda h, b, e: b * smoothed(h, 1, e)), "outside the sigmoid"),
    (cdpo_variant(lambda h, b, e: smoothed(h, 1, e)), "beta is missing"),
    (cdpo_variant(lambda h, b, e: -smoothed(h, b, e)), "a loss is minus"),
    (cdpo_variant(lambda h, b, e: smoothed(h, b, e).mean()), "their mean"),
    (cdpo_variant(smoothed, reference=0.0), "the reference is missing"),
    (cdpo_variant(lambda h, b, e: -(1 - e) * (b * h).sigmoid() - e * (-b * h).sigmoid()), "the logarithm is missing"),
    (cdpo_variant(smoothed, reference=-1.0), "should be"),
    (cdpo_variant(lambda h, b, e: smoothed(h.detach(), b, e)), "no gradient reaches"),
    (cdpo_variant(lambda h, b, e: smoothed(h, b, e).detach()), "no gradient reaches"),
    (cdpo_variant(lambda h, b, e: smoothed(h, b, e).sum()), "shape"),
    (cdpo_variant(lambda h, b, e: smoothed(h / 2, b, e)), "should be"),
]  # fmt: skip
RIGHT["05.7"] = [cdpo_right, cdpo_softplus, cdpo_by_entropy]

# --- 05.8 four broken trainings ---

RIGHT["05.8"] = [{"A": 3, "B": 4, "C": 1, "D": 2}, {"D": 2.0, "C": 1.0, "B": 4.0, "A": 3.0}]
WRONG["05.8"] = [
    ({"A": 3, "B": 4, "C": 2, "D": 1}, "C and D"),
    ({"A": 4, "B": 3, "C": 1, "D": 2}, "A and B"),
    ({"A": 1, "B": 4, "C": 3, "D": 2}, "A and C"),
    ({"A": 3, "B": 1, "C": 4, "D": 2}, "B and C"),
    ({"A": 2, "B": 4, "C": 1, "D": 3}, "A and D"),
    ({"A": 3, "B": 2, "C": 1, "D": 4}, "B and D"),
    ({"A": 1, "B": 2, "C": 3, "D": 4}, "A:"),
    ({"A": 3, "B": 4, "C": 1}, "a dict with A, B, C, D"),
    ([3, 4, 1, 2], "a dict with A, B, C, D"),
    ("3412", "a dict with A, B, C, D"),
]
