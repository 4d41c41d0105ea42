"""Answers to the exercises of notebook 03 as students write them."""

import numpy as np
import torch
import torch.nn.functional as F

WRONG, RIGHT = {}, {}

# --- 03.1 ---


def clipped(logps, old_logps, advantages, clip):
    ratio = torch.exp(logps - old_logps)
    return -torch.min(ratio * advantages, torch.clip(ratio, 1 - clip, 1 + clip) * advantages)


def clipped_by_sign(logps, old_logps, advantages, clip):
    """PPO's own other form: (1 + clip) A where A > 0, (1 - clip) A where A < 0 (spinningup)."""
    ratio = torch.exp(logps) / torch.exp(old_logps)
    bound = torch.where(advantages > 0, (1 + clip) * advantages, (1 - clip) * advantages)
    return torch.maximum(-ratio * advantages, -bound)


def objective(logps, old_logps, advantages, clip):
    return -clipped(logps, old_logps, advantages, clip)


def hopeful(logps, old_logps, advantages, clip):
    ratio = (logps - old_logps).exp()
    return torch.minimum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def min_forgotten(logps, old_logps, advantages, clip):
    return -torch.exp(logps - old_logps).clamp(1 - clip, 1 + clip) * advantages


def clip_forgotten(logps, old_logps, advantages, clip):
    return -torch.exp(logps - old_logps) * advantages


def upside_down(logps, old_logps, advantages, clip):
    return clipped(old_logps, logps, advantages, clip)


def log_ratio_clipped(logps, old_logps, advantages, clip):
    log_ratio = logps - old_logps
    held = torch.exp(torch.clamp(log_ratio, -clip, clip))
    return -torch.min(torch.exp(log_ratio) * advantages, held * advantages)


def product_clipped(logps, old_logps, advantages, clip):
    gain = torch.exp(logps - old_logps) * advantages
    return -torch.min(gain, gain.clamp(1 - clip, 1 + clip))


def averaged(logps, old_logps, advantages, clip):
    return clipped(logps, old_logps, advantages, clip).mean()


def summed(logps, old_logps, advantages, clip):
    return clipped(logps, old_logps, advantages, clip).sum()


def no_exponential(logps, old_logps, advantages, clip):
    ratio = logps - old_logps
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def plain_policy_gradient(logps, old_logps, advantages, clip):
    return -(logps * advantages)


def detached_ratio(logps, old_logps, advantages, clip):
    return clipped(logps.detach(), old_logps, advantages, clip)


def divided_log_probs(logps, old_logps, advantages, clip):
    ratio = logps / old_logps
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def per_row(logps, old_logps, advantages, clip):
    return clipped(logps, old_logps, advantages, clip).mean(-1)


WRONG["03.1"] = [
    (objective, "a loss is minimised"),
    (hopeful, "takes the smaller"),
    (min_forgotten, "always clipped"),
    (clip_forgotten, "nothing is clipped"),
    (upside_down, "upside down"),
    (log_ratio_clipped, "log-ratio itself"),
    (product_clipped, "product with the advantage"),
    (averaged, "the mean is taken"),
    (summed, "the sum is taken"),
    (no_exponential, "exponential"),
    (plain_policy_gradient, "without the ratio"),
    (detached_ratio, "detached"),
    (divided_log_probs, "should be"),
    (per_row, "shape"),
]
RIGHT["03.1"] = [clipped, clipped_by_sign]

# --- 03.2 ---


@torch.no_grad()
def gae(rewards, values, gamma, lam):
    following = F.pad(values[:, 1:], (0, 1))
    delta = rewards + gamma * following - values
    out, last = [], torch.zeros(len(rewards), dtype=rewards.dtype)
    for t in range(rewards.shape[1] - 1, -1, -1):
        last = delta[:, t] + gamma * lam * last
        out.insert(0, last)
    out = torch.stack(out, dim=1)
    return out, out + values


def gae_by_matrix(rewards, values, gamma, lam):
    values = values.detach()
    time = values.shape[1]
    delta = rewards + gamma * torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1) - values
    gap = torch.arange(time)[:, None] - torch.arange(time)[None]
    weights = torch.where(gap >= 0, (gamma * lam) ** gap.clamp(min=0).to(values.dtype), 0.0)
    advantages = delta @ weights
    return advantages, advantages + values


def gae_numpy(rewards, values, gamma, lam):
    r, v = rewards.numpy(), values.detach().numpy()
    out = np.zeros_like(v)
    for i in range(len(v)):
        running = 0
        for t in reversed(range(v.shape[1])):
            ahead = v[i, t + 1] if t + 1 < v.shape[1] else 0
            running = r[i, t] + gamma * ahead - v[i, t] + gamma * lam * running
            out[i, t] = running
    return out, out + v


def _variant(rewards, values, gamma, lam, *, ahead="next", carry="both", flip=True, sign=1):
    values = values.detach()
    out, last, time = torch.zeros_like(values), 0, values.shape[1]
    for t in range(time - 1, -1, -1) if flip else range(time):
        following = values[:, t + 1] if t + 1 < time else torch.zeros_like(values[:, 0])
        if ahead == "here":
            following = values[:, t]
        if ahead == "bootstrap" and t == time - 1:
            following = values[:, -1]
        if ahead == "nothing":
            following = 0
        delta = sign * (rewards[:, t] + gamma * following - values[:, t])
        last = delta + {"both": gamma * lam, "gamma": gamma, "lam": lam, "": 0}[carry] * last
        out[:, t] = last
    return out, out + values


def variant(**kind):
    return lambda rewards, values, gamma, lam: _variant(rewards, values, gamma, lam, **kind)


def returns_to_come(rewards, values, gamma, lam):
    result, total = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1])):
        total = rewards[:, t] + gamma * total
        result[:, t] = total
    return gae(rewards, values, gamma, lam)[0], result


def attached(rewards, values, gamma, lam):
    out, last = [], 0
    for t in reversed(range(values.shape[1])):
        ahead = values[:, t + 1] if t + 1 < values.shape[1] else 0
        last = rewards[:, t] + gamma * ahead - values[:, t] + gamma * lam * last
        out.insert(0, last)
    out = torch.stack(out, 1)
    return out, out + values


def value_detached_in_the_return_only(rewards, values, gamma, lam):
    advantages = attached(rewards, values, gamma, lam)[0]
    return advantages, advantages.detach() + values.detach()


def normalised(rewards, values, gamma, lam):
    advantages, returns = gae(rewards, values, gamma, lam)
    return (advantages - advantages.mean()) / advantages.std(), returns


WRONG["03.2"] = [
    (variant(ahead="here"), "off by one"),
    (variant(ahead="bootstrap"), "bootstraps"),
    (variant(ahead="nothing"), "no next value"),
    (variant(carry="gamma"), "lambda is missing"),
    (variant(carry="lam"), "gamma is missing"),
    (variant(carry=""), "one-step"),
    (variant(flip=False), "forwards"),
    (variant(sign=-1), "wrong sign"),
    (returns_to_come, "the returns are not"),
    (lambda rewards, values, gamma, lam: (gae(rewards, values, gamma, lam)[0],) * 2, "lack the values"),
    (
        lambda rewards, values, gamma, lam: (
            gae(rewards, values, gamma, lam)[0],
            gae(rewards, values, gamma, lam)[0] + rewards,
        ),
        "add the rewards",
    ),
    (attached, "flows through the targets"),
    (value_detached_in_the_return_only, "gradient"),
    (normalised, "part 1"),
    (lambda rewards, values, gamma, lam: gae(rewards, values, gamma, lam)[0], "2 things"),
    (lambda rewards, values, gamma, lam: gae(rewards, values, gamma, lam)[::-1], "part 1"),
]
RIGHT["03.2"] = [gae, gae_by_matrix, gae_numpy]

# --- 03.3 ---


def token_rewards(logps, ref_logps, mask, scores, kl_coefficient):
    kl = (logps - ref_logps).detach()
    rewards = torch.where(mask, -kl_coefficient * kl, 0.0)
    for i, n in enumerate(mask.sum(1)):
        rewards[i, n - 1] += scores[i]
    return rewards


@torch.no_grad()
def token_rewards_by_shift(logps, ref_logps, mask, scores, kl_coefficient):
    is_last = mask & ~F.pad(mask[:, 1:], (0, 1))
    return (kl_coefficient * (ref_logps - logps)) * mask + is_last * scores.unsqueeze(1)


def _reward_variant(kind):
    def answer(logps, ref_logps, mask, scores, kl_coefficient):
        kl = logps.detach() - ref_logps
        rewards, last, rows = -kl_coefficient * kl * mask, mask.sum(1) - 1, torch.arange(len(mask))
        if kind == "sign":
            rewards = -rewards
        if kind == "padding":
            rewards = -kl_coefficient * kl
        if kind == "sum":
            total, rewards = rewards.sum(1), torch.zeros_like(rewards)
            rewards[rows, last] = total
        if kind == "k3":
            rewards = -kl_coefficient * (torch.exp(-kl) - 1 + kl) * mask
        if kind == "column":
            rewards[:, -1] += scores
        elif kind == "past":
            rewards[rows, last + 1] += scores
        elif kind == "before":
            rewards[rows, last - 1] += scores
        elif kind == "first":
            rewards[:, 0] += scores
        elif kind == "every":
            rewards = rewards + scores[:, None] * mask
        elif kind == "spread":
            rewards = rewards + (scores / mask.sum(1))[:, None] * mask
        elif kind == "overwrite":
            rewards[rows, last] = scores
        elif kind == "charged score":
            rewards[rows, last] += kl_coefficient * scores
        elif kind != "no score":
            rewards[rows, last] += scores
        return rewards

    return answer


def rewards_attached(logps, ref_logps, mask, scores, kl_coefficient):
    rewards = -kl_coefficient * (logps - ref_logps) * mask
    last = torch.zeros_like(rewards)
    last[torch.arange(len(mask)), mask.sum(1) - 1] = scores
    return rewards + last


WRONG["03.3"] = [
    (_reward_variant("sign"), "wrong sign"),
    (lambda logps, ref_logps, **rest: token_rewards(ref_logps, logps, **rest), "swapped"),
    (_reward_variant("column"), "last column"),
    (_reward_variant("past"), "off by one"),
    (_reward_variant("before"), "should be"),
    (_reward_variant("first"), "first token"),
    (_reward_variant("every"), "every token"),
    (_reward_variant("spread"), "spread"),
    (_reward_variant("overwrite"), "lost its KL"),
    (_reward_variant("padding"), "outside the mask"),
    (_reward_variant("sum"), "one sum"),
    (_reward_variant("k3"), "k3"),
    (_reward_variant("charged score"), "should be"),
    (_reward_variant("no score"), "score is missing"),
    (rewards_attached, "gradient flows"),
]
RIGHT["03.3"] = [token_rewards, token_rewards_by_shift]

# --- 03.4, 03.7: predictions ---

WRONG["03.4"] = [
    ("RRR", "equal gradients"),
    ("ZFR", "other way round"),
    ("RRF", "k1 again"),
    ("ZRR", "k3 again"),
    ("zzf", "k2 again"),
    ("FRZ", "is not it"),
    ("Z", "is not it"),
]
RIGHT["03.4"] = ["ZRF", " zrf "]

WRONG["03.7"] = [
    ((0, 0, 0), "ratio of two equal"),
    ((1, 0.2, 0), "not the share"),
    ((0.0, 0.0, 1.0), "order"),
    ((0.2, 0, 0), "should be"),
    ((1, 0, 0.05), "should be"),
    (1.0, "3 things"),
]
RIGHT["03.7"] = [(1, 0, 0), [1.0, 0.0, 0.0]]

# --- 03.5 ---


def whiten(values, mask):
    n = mask.sum()
    mean = (values * mask).sum() / n
    variance = (((values - mean) * mask) ** 2).sum() / n
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def whiten_in_place(values, mask):
    result = torch.zeros_like(values)
    kept = values[mask]
    result[mask] = (kept - kept.mean()) / (kept.var(unbiased=False) + 1e-8) ** 0.5
    return result


def untouched(values, mask):
    return (values - values.mean()) / (values.var() + 1e-8)


def _whitened(mean, variance, values, mask):
    return ((values - mean) / (variance + 1e-8).sqrt()).masked_fill(~mask, 0)


def zeros_counted(values, mask):
    values = values * mask
    return _whitened(values.mean(), values.var(correction=0), values, mask)


def by_columns(values, mask):
    n = mask.sum(0).clamp(min=1)
    mean = (values * mask).sum(0) / n
    return _whitened(mean, (((values - mean) * mask) ** 2).sum(0) / n, values, mask)


def by_rows(values, mask):
    return torch.stack([whiten(v[None], m[None])[0] for v, m in zip(values, mask, strict=True)])


def _by(values, mask, spread):
    return (values - values[mask].mean()) / spread * mask


WRONG["03.5"] = [
    (untouched, "nothing is repaired"),
    (lambda values, mask: _whitened(values.mean(), values.var(correction=0), values, mask), "padding still"),
    (zeros_counted, "as zeros"),
    (lambda values, mask: _whitened(values[mask].mean(), values[mask].var(), values, mask), "n - 1"),
    (
        lambda values, mask: (values - values[mask].mean()) / (values[mask].var(correction=0) + 1e-8) * mask,
        "square root",
    ),
    (lambda values, mask: whiten(values, mask) + values[mask].mean() * mask, "mean is still there"),
    (
        lambda values, mask: (values - values[mask].mean()) / (values[mask].var(correction=0) + 1e-8).sqrt(),
        "padding is not 0",
    ),
    (lambda values, mask: _by(values, mask, values[mask].std(correction=0)), "1e-8 is missing"),
    (lambda values, mask: _by(values, mask, values[mask].std(correction=0) + 1e-8), "under the root"),
    (by_rows, "row is whitened alone"),
    (by_columns, "should be"),
    (lambda values, mask: whiten(values, mask)[mask], "shape"),
]
RIGHT["03.5"] = [whiten, whiten_in_place]

# --- 03.6 ---


def controller(coefficient, kl, target, steps, horizon):
    error = np.clip(kl / target - 1, -0.2, 0.2)
    return coefficient * (1 + error * steps / horizon)


def controller_in_steps(coefficient, kl, target, steps, horizon):
    error = (kl - target) / target
    error = min(error, 0.2)
    error = max(error, -0.2)
    coefficient += coefficient * error * (steps / horizon)
    return torch.tensor(coefficient, dtype=torch.float64)


def _control(error, combine=lambda c, e, steps, horizon: c * (1 + e * steps / horizon)):
    return lambda coefficient, kl, target, steps, horizon: combine(
        coefficient, error(kl, target), steps, horizon
    )


def _held(kl, target):
    return max(-0.2, min(0.2, kl / target - 1))


WRONG["03.6"] = [
    (_control(lambda kl, target: -_held(kl, target)), "wrong way"),
    (_control(lambda kl, target: kl / target - 1), "not clipped"),
    (_control(lambda kl, target: max(-0.2, min(0.2, kl - target))), "absolute"),
    (_control(lambda kl, target: max(-0.2, min(0.2, target / kl - 1))), "swapped in the ratio"),
    (_control(lambda kl, target: max(-0.2, min(0.2, kl / target))), "the 1 is missing"),
    (_control(_held, lambda c, e, steps, horizon: c * (1 + e)), "steps / horizon is missing"),
    (_control(_held, lambda c, e, steps, horizon: c * (1 + e * horizon / steps)), "steps and horizon"),
    (_control(_held, lambda c, e, steps, horizon: c + e * steps / horizon), "change is added"),
    (_control(_held, lambda c, e, steps, horizon: c * e * steps / horizon), "should be"),
    (_control(lambda kl, target: max(0.0, _held(kl, target))), "should be"),
    (_control(lambda kl, target: min(0.2, kl / target - 1)), "should be"),
]
RIGHT["03.6"] = [controller, controller_in_steps]
