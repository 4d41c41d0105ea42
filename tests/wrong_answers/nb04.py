"""Answers to the exercises of notebook 04 as students write them."""

import itertools
import math

import torch
import torch.nn.functional as F

WRONG, RIGHT = {}, {}

# --- 04.1 the optimal policy ---


def optimum(reward, reference, beta):
    weights = reference.log() + reward / beta
    log_z = torch.logsumexp(weights, dim=1)
    return torch.exp(weights - log_z[:, None]), log_z


def optimum_rows(reward, reference, beta):
    policies, logs = [], []
    for r, p in zip(reward, reference, strict=True):
        top = r.max()
        w = p * torch.exp((r - top) / beta)
        policies.append(w / w.sum())
        logs.append(w.sum().log() + top / beta)
    return torch.stack(policies), torch.stack(logs)


def optimum_naive(reward, reference, beta):
    w = reference * torch.exp(reward / beta)
    z = w.sum(-1)
    return w / z[:, None], z.log()


def optimum_naive_python(reward, reference, beta):
    policy, log_z = torch.zeros_like(reward), torch.zeros(len(reward), dtype=reward.dtype)
    for x in range(len(reward)):
        z = sum(float(reference[x, y]) * math.exp(float(reward[x, y]) / beta) for y in range(reward.shape[1]))
        log_z[x] = math.log(z)
        for y in range(reward.shape[1]):
            policy[x, y] = float(reference[x, y]) * math.exp(float(reward[x, y]) / beta) / z
    return policy, log_z


def optimum_with(weights, dim=-1):
    def answer(reward, reference, beta):
        w = weights(reward, reference, beta)
        z = w.sum(dim, keepdim=True) if dim is not None else w.sum()
        return w / z, z.log().squeeze()

    return answer


def optimum_keepdim(reward, reference, beta):
    w = reference * torch.exp(reward / beta)
    z = w.sum(-1, keepdim=True)
    return w / z, z.log()


def optimum_one_part(reward, reference, beta):
    return optimum(reward, reference, beta)[0]


RIGHT["04.1"] = [optimum, optimum_rows]
WRONG["04.1"] = [
    (optimum_naive, "overflows"),
    (optimum_naive_python, "overflows"),
    (optimum_with(lambda r, p, b: p * torch.exp(r * b)), "multiplied by beta"),
    (optimum_with(lambda r, p, b: p * torch.exp(r)), "beta is missing"),
    (optimum_with(lambda r, p, b: torch.exp(r / b)), "reference is missing"),
    (lambda reward, reference, beta: (
        (reference + reward / beta).softmax(-1), (reference + reward / beta).logsumexp(-1)), "their logs belong"),
    (optimum_with(lambda r, p, b: p * torch.exp(r / b), dim=0), "over the prompts"),
    (optimum_with(lambda r, p, b: p * torch.exp(r / b), dim=None), "one Z for the whole table"),
    (lambda reward, reference, beta: (
        reference * torch.exp(reward / beta), (reference * torch.exp(reward / beta)).sum(1).log()),
     "does not sum to 1"),
    (lambda reward, reference, beta: (
        optimum(reward, reference, beta)[0], (reference * torch.exp(reward / beta)).sum(1)), "its log is asked for"),
    (lambda reward, reference, beta: (
        optimum(reward, reference, beta)[0], beta * optimum(reward, reference, beta)[1]), "without beta before it"),
    (lambda reward, reference, beta: (
        optimum(reward, reference, beta)[0].log(), optimum(reward, reference, beta)[1]), "return probabilities"),
    (optimum_keepdim, "shape"),
    (optimum_one_part, "2 things"),
]  # fmt: skip

# --- 04.2 the limits of beta ---


def limits(policy_zero, policy_infinity, value_zero, value_infinity):
    return {
        "policy_zero": policy_zero,
        "policy_infinity": policy_infinity,
        "value_zero": value_zero,
        "value_infinity": value_infinity,
    }


RIGHT["04.2"] = [limits("C", "A", "G", "F"), limits("c", "a", "g", " f")]
WRONG["04.2"] = [
    (limits("A", "C", "F", "G"), "exchanged"),
    (limits("C", "B", "G", "F"), "not being uniform"),
    (limits("C", "A", "F", "G"), "KL term costs nothing"),
    (limits("C", "A", "H", "F"), "finite"),
    (limits("C", "A", "G", "E"), "still earns"),
    (limits("D", "A", "G", "F"), "policy_zero"),
    ({"policy_zero": "C"}, "dict"),
    ("C A G F", "dict"),
]

# --- 04.3 the reward of a policy ---


def anchored(policy, reference, anchor, anchor_reward, beta):
    ratio = beta * torch.log(policy / reference)
    rows = torch.arange(len(policy))
    return ratio - ratio[rows, anchor][:, None] + anchor_reward[:, None]


def anchored_by_log_z(policy, reference, anchor, anchor_reward, beta):
    reward = torch.empty_like(policy)
    for x in range(len(policy)):
        a = anchor[x]
        beta_log_z = anchor_reward[x] - beta * (policy[x, a].log() - reference[x, a].log())
        reward[x] = beta * (policy[x].log() - reference[x].log()) + beta_log_z
    return reward


def anchored_with(ratio):
    def answer(policy, reference, anchor, anchor_reward, beta):
        r = ratio(policy, reference, beta)
        return r - r.gather(1, anchor.unsqueeze(1)) + anchor_reward.unsqueeze(1)

    return answer


def only_ratio(policy, reference, anchor, anchor_reward, beta):
    return beta * torch.log(policy / reference)


def added(policy, reference, anchor, anchor_reward, beta):
    return beta * torch.log(policy / reference) + anchor_reward[:, None]


def first_prompt_only(policy, reference, anchor, anchor_reward, beta):
    r = beta * torch.log(policy / reference)
    return r - r[0, anchor[0]] + anchor_reward[0]


def centred(policy, reference, anchor, anchor_reward, beta):
    r = beta * torch.log(policy / reference)
    return r - r.mean(1, keepdim=True) + anchor_reward[:, None]


RIGHT["04.3"] = [anchored, anchored_by_log_z]
WRONG["04.3"] = [
    (anchored_with(lambda p, ref, b: b * torch.log(ref / p)), "exchanged"),
    (anchored_with(lambda p, ref, b: torch.log(p / ref)), "beta is missing"),
    (anchored_with(lambda p, ref, b: torch.log(p / ref) / b), "divide by beta"),
    (anchored_with(lambda p, ref, b: b * p.log()), "reference is missing"),
    (only_ratio, "log-ratios alone"),
    (added, "anchor does not come out"),
    (first_prompt_only, "one constant for all prompts"),
    (centred, "centred"),
    (anchored_with(lambda p, ref, b: b * p / ref), "the ratio itself"),
]

# --- 04.4 preferences from policies ---


def preferences(policy, reference, beta):
    r = beta * (policy.log() - reference.log())
    return torch.sigmoid(r[:, :, None] - r[:, None, :])


def preferences_by_powers(policy, reference, beta):
    strength = (policy / reference) ** beta  # exp(r)
    return strength[:, :, None] / (strength[:, :, None] + strength[:, None, :])


def preferences_by_eq_6(policy, reference, beta):
    out = torch.zeros(*policy.shape, policy.shape[1], dtype=policy.dtype)
    for x in range(len(policy)):
        for i in range(policy.shape[1]):
            for j in range(policy.shape[1]):
                first = beta * math.log(policy[x, i] / reference[x, i])
                second = beta * math.log(policy[x, j] / reference[x, j])
                out[x, i, j] = 1 / (1 + math.exp(second - first))
    return out


RIGHT["04.4"] = [preferences, preferences_by_powers, preferences_by_eq_6]
WRONG["04.4"] = [
    (lambda policy, reference, beta: preferences(policy, reference, beta).transpose(1, 2), "transposed"),
    (lambda policy, reference, beta: 1 - preferences(policy, reference, beta), "transposed"),
    (lambda policy, reference, beta: preferences(policy, torch.ones_like(policy), beta), "reference is missing"),
    (lambda policy, reference, beta: preferences(policy, reference, 1.0), "beta is missing"),
    (lambda policy, reference, beta: preferences(policy, reference, 1 / beta), "divided by beta"),
    (lambda policy, reference, beta: beta * preferences(policy, reference, 1.0), "outside the sigmoid"),
    (lambda policy, reference, beta: policy[:, :, None] / (policy[:, :, None] + policy[:, None, :]),
     "compares probabilities"),
    (lambda policy, reference, beta: preferences(policy, reference, beta).logit(), "not probabilities"),
    (lambda policy, reference, beta: preferences(policy, reference, beta).log(), "logs of probabilities"),
    (lambda policy, reference, beta: preferences(policy, reference, beta)[0], "shape"),
]  # fmt: skip

# --- 04.6 the DPO loss ---


def dpo(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    h = (chosen_logps - rejected_logps) - (ref_chosen_logps - ref_rejected_logps)
    return -F.logsigmoid(beta * h)


def dpo_softplus(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    r_w = beta * (chosen_logps - ref_chosen_logps)
    r_l = beta * (rejected_logps - ref_rejected_logps)
    return F.softplus(r_l - r_w)


def dpo_logaddexp(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    r_w = beta * (chosen_logps - ref_chosen_logps)
    r_l = beta * (rejected_logps - ref_rejected_logps)
    return torch.logaddexp(r_w, r_l) - r_w


def dpo_with(loss_of_h, h_of=lambda w, l, rw, rl: (w - rw) - (l - rl)):
    def answer(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
        return loss_of_h(h_of(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps), beta)

    return answer


plain = lambda h, b: -F.logsigmoid(b * h)

RIGHT["04.6"] = [dpo, dpo_softplus, dpo_logaddexp]
WRONG["04.6"] = [
    (dpo_with(lambda h, b: -torch.log(torch.sigmoid(-b * h))), "wrong way round"),
    (dpo_with(plain, lambda w, l, rw, rl: (l - rl) - (w - rw)), "wrong way round"),
    (dpo_with(lambda h, b: -b * F.logsigmoid(h)), "outside the sigmoid"),
    (dpo_with(plain, lambda w, l, rw, rl: (w - l) + (rw - rl)), "wrong sign"),
    (dpo_with(plain, lambda w, l, rw, rl: (w - rl) - (l - rw)), "wrong sign"),
    (dpo_with(plain, lambda w, l, rw, rl: w - l), "reference is missing"),
    (dpo_with(lambda h, b: -F.logsigmoid(h)), "beta is missing"),
    (dpo_with(lambda h, b: -F.logsigmoid(h / b)), "divided by beta"),
    (dpo_with(lambda h, b: F.logsigmoid(b * h)), "log-likelihood"),
    (dpo_with(lambda h, b: torch.sigmoid(b * h)), "that is a probability"),
    (dpo_with(lambda h, b: -torch.sigmoid(b * h)), "minus a probability"),
    (dpo_with(lambda h, b: -F.logsigmoid(b * h).mean()), "mean over the pairs"),
    (dpo_with(lambda h, b: -F.logsigmoid(b * h).sum()), "sum over the pairs"),
    (dpo_with(lambda h, b: plain(h, b).detach()), "policy is detached"),
    (dpo_with(plain, lambda w, l, rw, rl: (w - rw) - (l.detach() - rl)), "rejected response is detached"),
    (dpo_with(plain, lambda w, l, rw, rl: (w.detach() - rw) - (l - rl)), "chosen response is detached"),
    (dpo_with(lambda h, b: -torch.log(torch.sigmoid(b * h))), "far from 0"),
    (dpo_with(lambda h, b: torch.log(1 + torch.exp(-b * h))), "far from 0"),
]  # fmt: skip

# --- 04.7 the gradient by hand ---


def gradient(theta, theta_ref, prompt, chosen, rejected, beta):
    ratio = theta.log_softmax(-1) - theta_ref.log_softmax(-1)
    reward_w, reward_l = beta * ratio[prompt, chosen], beta * ratio[prompt, rejected]
    weight = torch.sigmoid(reward_l - reward_w)
    out = torch.zeros_like(theta)
    for i in range(len(prompt)):
        out[prompt[i], chosen[i]] -= beta * weight[i] / len(prompt)
        out[prompt[i], rejected[i]] += beta * weight[i] / len(prompt)
    return out


def gradient_one_hot(theta, theta_ref, prompt, chosen, rejected, beta):
    policy = theta.softmax(-1)
    ratio = theta.log_softmax(-1) - theta_ref.log_softmax(-1)
    weight = torch.sigmoid(beta * (ratio[prompt, rejected] - ratio[prompt, chosen]))
    e = torch.eye(theta.shape[1], dtype=theta.dtype)
    direction = (e[chosen] - policy[prompt]) - (e[rejected] - policy[prompt])
    rows = torch.eye(theta.shape[0], dtype=theta.dtype)[prompt]
    return -beta * rows.T @ (weight[:, None] * direction) / len(prompt)


def gradient_autograd(theta, theta_ref, prompt, chosen, rejected, beta):
    theta = theta.clone().requires_grad_()
    a, b = theta.log_softmax(-1), theta_ref.log_softmax(-1)
    loss = dpo(a[prompt, chosen], a[prompt, rejected], b[prompt, chosen], b[prompt, rejected], beta).mean()
    return torch.autograd.grad(loss, theta)[0]


def gradient_with(weight=None, factor=lambda b, n: b / n, repeated=True, signs=(-1, 1)):
    def answer(theta, theta_ref, prompt, chosen, rejected, beta):
        own, ref = theta.log_softmax(-1), theta_ref.log_softmax(-1)
        h = (own - ref)[prompt, chosen] - (own - ref)[prompt, rejected]
        bare = own[prompt, chosen] - own[prompt, rejected]
        w = torch.sigmoid(-beta * h) if weight is None else weight(h, bare, beta)
        w = w * factor(beta, len(prompt))
        out = torch.zeros_like(theta)
        if not repeated:
            out[prompt, chosen] += signs[0] * w
            out[prompt, rejected] += signs[1] * w
            return out
        for i, (x, c, r) in enumerate(zip(prompt, chosen, rejected, strict=True)):
            out[x, c] += signs[0] * w[i]
            out[x, r] += signs[1] * w[i]
        return out

    return answer


RIGHT["04.7"] = [gradient, gradient_one_hot, gradient_autograd]
WRONG["04.7"] = [
    (gradient_with(signs=(1, -1)), "the sign"),
    (gradient_with(lambda h, bare, b: torch.sigmoid(b * h)), "already right"),
    (gradient_with(factor=lambda b, n: 1 / n), "factor beta before"),
    (gradient_with(factor=lambda b, n: b), "sum over the pairs"),
    (gradient_with(factor=lambda b, n: 1), "two things"),
    (gradient_with(lambda h, bare, b: torch.sigmoid(-b * bare)), "does not know the reference"),
    (gradient_with(lambda h, bare, b: torch.sigmoid(-h)), "inside the weight"),
    (gradient_with(lambda h, bare, b: torch.ones_like(h)), "weight is missing"),
    (gradient_with(repeated=False), "stands in several pairs"),
    (gradient_with(signs=(-1, 0)), "rejected response is missing"),
    (gradient_with(signs=(0, 1)), "chosen response is missing"),
    (gradient_with(signs=(-1, -1)), "both responses"),
]

# --- 04.8, 04.9, 04.10 where the labels are certain ---

RIGHT["04.8"] = ["C", "c"]
WRONG["04.8"] = [
    ("A", "not zero"),
    ("B", "where IPO ends"),
    ("D", "weight is 0"),
    ("E", "is not it"),
    (1.0, "text"),
]


def ipo(preference, reference, tau):
    h = (2 * preference - 1) / (2 * tau)
    return torch.sigmoid(torch.log(reference / (1 - reference)) + h)


def ipo_by_weights(preference, reference, tau):
    first = reference * torch.exp((preference - 0.5) / tau)
    return first / (first + 1 - reference)


def ipo_with(h_of):
    return lambda preference, reference, tau: torch.sigmoid(reference.logit() + h_of(preference, tau))


RIGHT["04.9"] = [ipo, ipo_by_weights]
WRONG["04.9"] = [
    (ipo_with(lambda p, t: (2 * p - 1) / t), "twice that"),
    (ipo_with(lambda p, t: (2 * p - 1) * t / 2), "numerator"),
    (ipo_with(lambda p, t: torch.ones_like(p) / (2 * t)), "preference is missing"),
    (ipo_with(lambda p, t: p / (2 * t)), "second response wins are missing"),
    (lambda preference, reference, tau: torch.sigmoid((2 * preference - 1) / (2 * tau)), "reference is missing"),
    (ipo_with(lambda p, t: torch.log(p / (1 - p)) / t), "where DPO ends"),
    (lambda preference, reference, tau: (2 * preference - 1) / (2 * tau), "that is h"),
    (lambda preference, reference, tau: 1 - ipo(preference, reference, tau), "second response"),
    (lambda preference, reference, tau: reference * torch.exp((preference - 0.5) / tau), "sum to 1"),
]  # fmt: skip

RIGHT["04.10"] = [2 * math.log(9), 4.394, 4.39, torch.logit(torch.tensor(0.9)) / 0.5]
WRONG["04.10"] = [
    (math.log(9), "beta h"),
    (math.log(9) / 2, "multiplied by beta"),
    (-2 * math.log(9), "the sign"),
    (0.9, "the probability"),
    (1.0, "IPO margin"),
    (math.inf, "should be 4.39"),
    (4.3, "should be 4.39"),
]

# --- 04.11 repair a DPO loss ---


def repaired(chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, beta):
    s_w, s_l = (chosen * chosen_mask).sum(1), (rejected * rejected_mask).sum(1)
    with torch.no_grad():
        rho_w, rho_l = (ref_chosen * chosen_mask).sum(1), (ref_rejected * rejected_mask).sum(1)
    h = (s_w - rho_w) - (s_l - rho_l)
    return -F.logsigmoid(beta * h)


def repaired_where(chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, beta):
    total = lambda logps, mask: torch.where(mask, logps, 0.0).sum(-1)
    r_w = beta * (total(chosen, chosen_mask) - total(ref_chosen.detach(), chosen_mask))
    r_l = beta * (total(rejected, rejected_mask) - total(ref_rejected.detach(), rejected_mask))
    return F.softplus(r_l - r_w)


def as_printed(mean=True, swapped=True, outside=True, moving=True):
    """The loss of the page, with some of its bugs repaired."""

    def answer(chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, beta):
        def of(logps, mask):
            return (logps * mask).sum(1) / (mask.sum(1) if mean else torch.ones(len(mask)))

        s_w, s_l = of(chosen, chosen_mask), of(rejected, rejected_mask)
        rho_w, rho_l = of(ref_chosen, chosen_mask), of(ref_rejected, rejected_mask)
        if not moving:
            rho_w, rho_l = rho_w.detach(), rho_l.detach()
        h = (s_w - rho_l) - (s_l - rho_w) if swapped else (s_w - rho_w) - (s_l - rho_l)
        return -beta * F.logsigmoid(h) if outside else -F.logsigmoid(beta * h)

    return answer


def repaired_but(change):
    def answer(chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, beta):
        return repaired(
            *change(chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask), beta=beta
        )

    return answer


RIGHT["04.11"] = [repaired, repaired_where]
SYMPTOMS = {
    "mean": "mean log-prob",
    "swapped": "what is subtracted from what",
    "outside": "that times beta",
    "moving": "gradient reaches the reference",
}
WRONG["04.11"] = [
    (as_printed(**{bug: bug in left for bug in SYMPTOMS}), SYMPTOMS[left[-1]])
    for size in range(1, 5)
    for left in itertools.combinations(SYMPTOMS, size)
]
WRONG["04.11"] += [
    (repaired_but(lambda w, l, rw, rl, mw, ml: (l, w, rl, rw, ml, mw)), "wrong way round"),
    (repaired_but(lambda w, l, rw, rl, mw, ml: (w, l, rw, rl, mw | True, ml | True)), "padding is counted"),
    (repaired_but(lambda w, l, rw, rl, mw, ml: (w.detach(), l.detach(), rw, rl, mw, ml)), "policy as well"),
    (repaired_but(lambda w, l, rw, rl, mw, ml: (w, l.detach(), rw, rl, mw, ml)), "detached the rejected"),
    (repaired_but(lambda w, l, rw, rl, mw, ml: (w.detach(), l, rw, rl, mw, ml)), "detached the chosen"),
    (lambda **given: repaired(**given).mean(), "mean over the pairs"),
    (lambda **given: -repaired(**given), "likelihood"),
]  # fmt: skip
