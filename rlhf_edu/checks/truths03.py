"""What the exercises of notebook 03 are compared with: inputs, truths, and makers of known mistakes."""

import numpy as np
import torch

# --- 03.1 the clipped surrogate ---


def ratios(rng, shape=(4, 6)):
    old = torch.tensor(rng.normal(-3, 1, shape))
    return {
        "logps": (old + torch.tensor(rng.normal(0, 0.35, shape))).requires_grad_(),
        "old_logps": old,
        "advantages": torch.tensor(rng.normal(0, 1, shape)),
        "clip": float(rng.uniform(0.1, 0.3)),
    }


def clipped_by_cases(logps, old_logps, advantages, clip):
    """PPO eq. 7 case by case: what the minimum means, token by token."""
    losses = []
    for logp, old, advantage in zip(logps.flatten(), old_logps.flatten(), advantages.flatten(), strict=True):
        ratio = torch.exp(logp - old)
        if advantage > 0 and ratio > 1 + clip:
            ratio = ratio.detach() * 0 + 1 + clip
        if advantage < 0 and ratio < 1 - clip:
            ratio = ratio.detach() * 0 + 1 - clip
        losses.append(-advantage * ratio)
    return torch.stack(losses).reshape(logps.shape)


def surrogate(combine=torch.maximum, sign=-1, up=1.0, reduce=None, where="ratio"):
    def answer(logps, old_logps, advantages, clip):
        log_ratio = up * (logps - old_logps)
        if where == "log":
            clipped = log_ratio.clamp(-clip, clip).exp()
        elif where == "product":
            product = log_ratio.exp() * advantages
            return -torch.minimum(product, product.clamp(1 - clip, 1 + clip))
        else:
            clipped = log_ratio.exp().clamp(1 - clip, 1 + clip)
        loss = sign * -combine(-advantages * log_ratio.exp(), -advantages * clipped)
        return reduce(loss) if reduce else loss

    return answer


# --- 03.2 GAE ---


def episodes(rng, shape=(3, 5)):
    return {
        "rewards": torch.tensor(rng.normal(0, 1, shape)),
        "values": torch.tensor(rng.normal(0, 1, shape)).requires_grad_(),
        "gamma": float(rng.uniform(0.8, 0.95)),
        "lam": float(rng.uniform(0.7, 0.95)),
    }


def gae_by_sums(rewards, values, gamma, lam):
    """Every advantage as its own sum over the rest of the episode."""
    r, v = rewards.numpy(), np.pad(values.detach().numpy(), ((0, 0), (0, 1)))
    time = r.shape[1]
    delta = r + gamma * v[:, 1:] - v[:, :-1]
    advantages = np.stack(
        [sum((gamma * lam) ** k * delta[:, t + k] for k in range(time - t)) for t in range(time)], axis=1
    )
    return torch.tensor(advantages), torch.tensor(advantages + v[:, :-1])


def gae_with(next_value="next", weight="both", returns="sum", sign=1, order=reversed, keep_gradient=False):
    def answer(rewards, values, gamma, lam):
        v = values if keep_gradient else values.detach()
        time = v.shape[1]
        factor = {"both": gamma * lam, "gamma": gamma, "lam": lam, "none": 0.0}[weight]
        advantages, carried = [None] * time, torch.zeros_like(v[:, 0])
        for t in order(range(time)):
            after = torch.zeros_like(carried) if t + 1 == time else v[:, t + 1]
            if next_value == "same":
                after = v[:, t]
            if next_value == "bootstrap" and t + 1 == time:
                after = v[:, t]
            if next_value == "none":
                after = torch.zeros_like(carried)
            carried = sign * (rewards[:, t] + gamma * after - v[:, t]) + factor * carried
            advantages[t] = carried
        advantages = torch.stack(advantages, 1)
        if returns == "to come":
            ahead, total = [None] * time, torch.zeros_like(carried)
            for t in reversed(range(time)):
                ahead[t] = total = rewards[:, t] + gamma * total
            return advantages, torch.stack(ahead, 1)
        return advantages, {"sum": advantages + v, "same": advantages, "rewards": advantages + rewards}[
            returns
        ]

    return answer


# --- 03.3 the reward of each token ---


def scored(rng, rows=4, time=7):
    lengths = rng.integers(2, time, rows)  # at least one place of padding in each row
    return {
        "logps": torch.tensor(rng.normal(-3, 1, (rows, time))).requires_grad_(),
        "ref_logps": torch.tensor(rng.normal(-3, 1, (rows, time))),
        "mask": torch.arange(time)[None] < torch.tensor(lengths)[:, None],
        "scores": torch.tensor(rng.normal(0, 1, rows)),
        "kl_coefficient": float(rng.uniform(0.05, 0.5)),
    }


def token_rewards_by_loop(logps, ref_logps, mask, scores, kl_coefficient):
    rewards = np.zeros(mask.shape)
    for i, row in enumerate(mask.tolist()):
        for t in range(sum(row)):
            rewards[i, t] = kl_coefficient * (ref_logps[i, t].item() - logps[i, t].item())
        rewards[i, sum(row) - 1] += scores[i].item()
    return torch.tensor(rewards)


def rewards_with(sign=-1, place="last", estimate="k1", padding=True, attached=False, replace=False):
    def answer(logps, ref_logps, mask, scores, kl_coefficient):
        ratio = (logps if attached else logps.detach()) - ref_logps
        kl = torch.expm1(-ratio) + ratio if estimate == "k3" else ratio
        if estimate == "sum at the end":
            kl = torch.zeros_like(kl)
        rewards = sign * kl_coefficient * (kl * mask if padding else kl)
        rows, n = torch.arange(len(mask)), mask.sum(1)
        if estimate == "sum at the end":
            rewards[rows, n - 1] += sign * kl_coefficient * (ratio * mask).sum(1)
        if place == "nowhere":
            return rewards
        if place == "every":
            return rewards + scores[:, None] * mask
        if place == "spread":
            return rewards + scores[:, None] * mask / n[:, None]
        column = {"last": n - 1, "column": torch.full_like(n, -1), "past": n, "first": 0 * n}[place]
        if replace:
            rewards[rows, column] = 0.0
        rewards[rows, column] += scores
        return rewards

    return answer


# --- 03.4 gradients of the estimators ---


def kinds_of_gradient():
    """By finite differences on four tokens: what each estimate's expected gradient is."""
    rng = np.random.default_rng(4)
    theta, ref = rng.normal(size=4), rng.normal(size=4)
    log_softmax = lambda x: x - np.log(np.exp(x).sum())
    p, q = np.exp(log_softmax(theta)), np.exp(log_softmax(ref))

    def slope(f):
        step = 1e-6 * np.eye(4)
        return np.array([(f(theta + s) - f(theta - s)) / 2e-6 for s in step])

    reverse = slope(lambda x: (np.exp(log_softmax(x)) * (log_softmax(x) - np.log(q))).sum())
    forward = slope(lambda x: (q * (np.log(q) - log_softmax(x))).sum())
    kinds = {"Z": np.zeros(4), "R": reverse, "F": forward}
    ratio = lambda x: log_softmax(x) - np.log(q)
    estimates = (ratio, lambda x: ratio(x) ** 2 / 2, lambda x: np.exp(-ratio(x)) - 1 + ratio(x))
    found = [slope(lambda x, k=k: (p * k(x)).sum()) for k in estimates]  # p stays: samples already drawn
    return "".join(min(kinds, key=lambda name: np.abs(kinds[name] - g).max()) for g in found)


# --- 03.5 whitening ---


def masked(rng, rows=4, time=6):
    lengths = rng.integers(2, time, rows)
    return {
        # sometimes so close together that 1e-8 beside their variance counts
        "values": torch.tensor(rng.normal(1.5, rng.choice([2, 1e-4]), (rows, time))),
        "mask": torch.arange(time)[None] < torch.tensor(lengths)[:, None],
    }


def whiten_by_numpy(values, mask):
    out, keep = np.zeros(values.shape), mask.numpy()
    kept = values.numpy()[keep]
    out[keep] = (kept - kept.sum() / kept.size) / np.sqrt(((kept - kept.mean()) ** 2).mean() + 1e-8)
    return torch.tensor(out)


def whiten_with(padding=False, ddof=0, root=True, shift=True, zero=True, rows=False, under=1e-8, beside=0.0):
    def answer(values, mask):
        if rows:
            parts = [answer_of(v[None], m[None]) for v, m in zip(values, mask, strict=True)]
            return torch.cat(parts)
        return answer_of(values, mask)

    def answer_of(values, mask):
        values = values * mask if padding == "zeros" else values
        kept = values.flatten() if padding else values[mask]
        variance = kept.var(correction=ddof) + under
        out = (values - kept.mean()) / ((variance.sqrt() if root else variance) + beside)
        out = out if shift else out + kept.mean()
        return out * mask if zero else out

    return answer


# --- 03.6 the adaptive coefficient ---


def controller(rng):
    return {
        "coefficient": float(rng.uniform(0.05, 0.3)),
        "kl": float(rng.choice([0.3, 0.9, 1.1, 2.5]) * 6.0 * rng.uniform(0.95, 1.05)),
        "target": 6.0,
        "steps": int(rng.integers(64, 512)),
        "horizon": int(rng.integers(1000, 5000)),
    }


def next_by_cases(coefficient, kl, target, steps, horizon):
    percent = 20.0 if kl > 1.2 * target else -20.0 if kl < 0.8 * target else 100.0 * (kl - target) / target
    return coefficient + coefficient * percent / 100.0 * (steps / horizon)


def next_with(error, bounds=(-0.2, 0.2), share=lambda steps, horizon: steps / horizon):
    def answer(coefficient, kl, target, steps, horizon):
        clipped = min(max(error(kl, target), bounds[0]), bounds[1])
        return coefficient * (1 + clipped * share(steps, horizon))

    return answer


relative = lambda kl, target: kl / target - 1
