"""Inputs and truths of notebook 04: each right answer by a loop, a search, a difference or a limit."""

import itertools
import math

import numpy as np
import torch


def world(rng, prompts=3, responses=5):
    """Rewards and a reference, (prompts, responses), in float64."""
    reward = torch.tensor(rng.normal(0, 1, (prompts, responses)))
    reference = torch.tensor(rng.normal(0, 1, (prompts, responses))).softmax(-1)
    return {"reward": reward, "reference": reference, "beta": float(rng.uniform(0.3, 0.8))}


def optimum_by_loops(reward, reference, beta):
    policy, log_z = np.zeros(reward.shape), np.zeros(len(reward))
    for x, (rewards, probabilities) in enumerate(zip(reward.tolist(), reference.tolist(), strict=True)):
        top = max(rewards)
        weights = [p * math.exp((r - top) / beta) for p, r in zip(probabilities, rewards, strict=True)]
        log_z[x] = math.log(math.fsum(weights)) + top / beta
        policy[x] = [w / math.fsum(weights) for w in weights]
    return policy, log_z


def limits():
    """Letters read off numbers: the closed form at a tiny and at a huge beta, shifted against overflow."""
    reference, reward = np.array([0.1, 0.5, 0.4]), np.array([2.0, 1.0, -1.0])
    policies = {"A": reference, "B": np.full(3, 1 / 3), "C": np.eye(3)[reward.argmax()],
                "D": np.eye(3)[reference.argmax()]}  # fmt: skip
    values = {"E": 0.0, "F": reference @ reward, "G": reward.max(), "H": math.inf}
    found = {}
    for limit, beta in (("zero", 1e-3), ("infinity", 1e5)):
        weights = reference * np.exp((reward - reward.max()) / beta)
        value = reward.max() + beta * math.log(weights.sum())
        policy = weights / weights.sum()
        found[f"policy_{limit}"] = min(policies, key=lambda k: np.abs(policies[k] - policy).sum())
        found[f"value_{limit}"] = min(values, key=lambda k: abs(values[k] - value))
    return found


def anchored(rng):
    given = world(rng)
    policy = torch.tensor(rng.normal(0, 1, given["reward"].shape)).softmax(-1)
    anchor = torch.tensor(rng.integers(0, policy.shape[1], len(policy)))
    return {"policy": policy, "reference": given["reference"], "anchor": anchor,
            "anchor_reward": torch.tensor(rng.normal(0, 2, len(policy))), "beta": given["beta"]}  # fmt: skip


def reward_by_pairs(policy, reference, anchor, anchor_reward, beta):
    out = np.zeros(policy.shape)
    for x, y in itertools.product(*map(range, policy.shape)):
        a = int(anchor[x])
        odds = float(policy[x, y] / policy[x, a]) / float(reference[x, y] / reference[x, a])
        out[x, y] = float(anchor_reward[x]) + beta * math.log(odds)
    return out


def policies(rng):
    given = world(rng, responses=4)
    policy = torch.tensor(rng.normal(0, 1, given["reward"].shape)).softmax(-1)
    return {"policy": policy, "reference": given["reference"], "beta": given["beta"]}


def preferences_by_rewards(policy, reference, beta):
    """DPO eq. 1 with the rewards of eq. 5, for a log Z of our choice."""
    table = np.zeros((*policy.shape, policy.shape[1]))
    for x, i, j in itertools.product(*map(range, table.shape)):
        first, second = (
            math.exp(beta * math.log(policy[x, y] / reference[x, y]) + 0.3 * x + 0.7) for y in (i, j)
        )
        table[x, i, j] = first / (first + second)
    return table


def log_probs(rng, pairs=6):
    """Summed log-probs of policy and reference, float64; the policy's want gradients."""
    draw = lambda: torch.tensor(rng.normal(-20, 4, pairs))
    return {
        "chosen_logps": draw().requires_grad_(),
        "rejected_logps": draw().requires_grad_(),
        "ref_chosen_logps": draw(),
        "ref_rejected_logps": draw(),
        "beta": float(rng.uniform(0.05, 0.5)),
    }


def dpo_by_probabilities(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """DPO eq. 7 through the probability itself: minus the log of two rewards' softmax."""
    rewards = beta * torch.stack([chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps])
    return -rewards.log_softmax(0)[0]


def pairs(rng, prompts=2, responses=4, pairs=7):
    order = np.stack([rng.permutation(responses)[:2] for _ in range(pairs)])
    prompt = rng.integers(0, prompts, pairs)
    prompt[-1], order[-1] = prompt[0], order[0]  # a pair that stands twice counts twice
    theta = lambda: torch.tensor(rng.normal(0, 1, (prompts, responses)))
    return {"theta": theta(), "theta_ref": theta(), "prompt": torch.tensor(prompt),
            "chosen": torch.tensor(order[:, 0]), "rejected": torch.tensor(order[:, 1]),
            "beta": float(rng.uniform(0.2, 2.0))}  # fmt: skip


def gradient_by_differences(theta, theta_ref, prompt, chosen, rejected, beta, step=1e-5):
    def loss(table):
        ratio = table - np.log(np.exp(table).sum(1, keepdims=True)) - theta_ref.log_softmax(-1).numpy()
        h = ratio[prompt, chosen] - ratio[prompt, rejected]
        return np.log1p(np.exp(-beta * h)).mean()

    start, out = theta.detach().numpy(), np.zeros(theta.shape)
    for place in np.ndindex(*out.shape):
        nudge = np.zeros_like(start)
        nudge[place] = step
        out[place] = (loss(start + nudge) - loss(start - nudge)) / (2 * step)
    return out


def where_dpo_goes(beta=10.0):
    """The optimum for p* = 1 - 1e-300, in place of the limit."""
    options = {"A": 0.5, "B": 1 / (1 + math.exp(-0.5 / beta)), "C": 1.0, "D": 1 - 1 / (1 + beta)}
    margin = 300 * math.log(10) / beta
    return min(options, key=lambda k: abs(options[k] - 1 / (1 + math.exp(-margin))))


def two_responses(rng, n=6):
    preference = rng.uniform(0, 1, n)
    preference[0] = 1.0
    return {"preference": torch.tensor(preference), "reference": torch.tensor(rng.uniform(0.1, 0.9, n)),
            "tau": float(rng.uniform(0.15, 1.0))}  # fmt: skip


def ipo_by_search(preference, reference, tau):
    """Ternary search for the h that minimises the expected loss, pair by pair."""
    out = []
    for p, ref in zip(preference.tolist(), reference.tolist(), strict=True):
        loss = lambda h, p=p: p * (h - 0.5 / tau) ** 2 + (1 - p) * (-h - 0.5 / tau) ** 2
        low, high = -50.0, 50.0
        while high - low > 1e-7:
            third = (high - low) / 3
            low, high = (low + third, high) if loss(low + third) > loss(high - third) else (low, high - third)
        odds = ref / (1 - ref) * math.exp((low + high) / 2)
        out.append(odds / (1 + odds))
    return np.array(out)


def cdpo_by_bisection(epsilon=0.1, beta=0.5):
    slope = lambda h: (1 - epsilon) / (1 + math.exp(beta * h)) - epsilon / (1 + math.exp(-beta * h))
    low, high = -100.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low


def tokens(rng, pairs=3, time=5):
    """Log-probs of tokens (pairs, time), garbage under the padding; the reference has gradients, too."""
    given = {}
    for name in ("chosen", "rejected", "ref_chosen", "ref_rejected"):
        given[name] = torch.tensor(rng.normal(-2, 1, (pairs, time))).requires_grad_()
    for name in ("chosen_mask", "rejected_mask"):
        given[name] = torch.arange(time) < torch.tensor(rng.integers(2, time, pairs))[:, None]
    return given | {"beta": float(rng.uniform(0.2, 0.6))}


def by_tokens(chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, beta):
    """One pair at a time, one token at a time, as log(1 + e^-x)."""
    out = []
    for i in range(len(chosen)):
        x = 0.0
        for t in range(chosen.shape[1]):
            if chosen_mask[i, t]:
                x = x + beta * (chosen[i, t] - ref_chosen[i, t].item())
            if rejected_mask[i, t]:
                x = x - beta * (rejected[i, t] - ref_rejected[i, t].item())
        out.append(torch.log1p(torch.exp(-x)))
    return torch.stack(out)
