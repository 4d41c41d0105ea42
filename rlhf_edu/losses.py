"""Every objective of the course as a pure function: log-probs in, one loss per pair out.

Notation, as in the papers, for the chosen response y_w and the rejected response y_l of one prompt:

    s_w, s_l   summed log-prob of the response under the policy, in nats   `chosen_logps`, `rejected_logps`
    rho        the same sum under the frozen reference model               `ref_chosen_logps`, ...
    |y|        response length in tokens, EOS included                     `chosen_lengths`, ...
    a = s/|y|  mean log-prob per token; a loss that uses it divides in its own line
    h          (s_w - rho_w) - (s_l - rho_l): by how much more than the reference the policy prefers y_w

Arguments are (batch,), one value per pair, and so are results: the caller takes the mean. The exceptions are
`reward_ranking_loss` (one row per prompt) and the two PPO losses (one value per token). A signature is a
statement about its method: what SimPO does not ask for, it does not need.

"SimPO Table 3" is the table of objectives in Meng et al. 2024, https://arxiv.org/abs/2405.14734.
"""

import math
import numbers

import torch
import torch.nn.functional as F

# --- supervised ---


def sft_loss(logps, lengths):
    """Negative log-likelihood per token of each response, in nats: (batch,), (batch,) -> (batch,).

    Its batch mean weighs every response the same; the mean over all tokens of the batch favours long ones.
    """
    _check("sft_loss", locals())
    return -logps / lengths


def preferred_ft_loss(chosen_logps):
    """Preferred-FT (DPO sec. 6): fine-tune on the chosen responses alone, summed: (batch,) -> (batch,)."""
    _check("preferred_ft_loss", locals())
    return -chosen_logps


def unlikelihood_loss(chosen_logps, rejected_logps, *, alpha=0.1):
    """Unlikelihood baseline (DPO sec. 6): (batch,), (batch,) -> (batch,).

    alpha: 0 is Preferred-FT. Any alpha > 0 is unbounded below, as log pi(y_l) can fall for ever: texts
      degenerate, and the DPO paper drops the method outside IMDb (where it sweeps .05, .1, .5, 1).
    """
    _check("unlikelihood_loss", locals())
    return -(chosen_logps - alpha * rejected_logps)


# --- preferences, with a reference model ---


def dpo_loss(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1, label_smoothing=0.0
):
    """Direct Preference Optimization (Rafailov et al. 2023): all (batch,). ln 2 while policy = reference.

    beta: strength of the KL constraint. beta -> 0 forgets the reference: a pair pushes until h is several
      times 1/beta. A large beta is content with a small h. The paper's default is 0.1, for TL;DR 0.5.
    label_smoothing: probability eps that a label is flipped (conservative DPO). A pair's gradient vanishes
      at sigmoid(beta h) = 1 - eps, so h stays finite; at 0.5 the labels say nothing and that is h = 0.
    """
    _check("dpo_loss", locals())
    h = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    loss_if_right, loss_if_flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)  # DPO eq. 7
    return (1 - label_smoothing) * loss_if_right + label_smoothing * loss_if_flipped  # cDPO note eq. 3


def ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, tau=0.1):
    """Identity Preference Optimization (Azar et al. 2023), on sums as the paper prints it: all (batch,).

    tau: h is regressed on the margin 1/(2 tau) and never pushed beyond it. tau -> 0 asks for an infinite
      margin, a large tau for none (stay at the reference). TRL divides each log-ratio by its length first,
      so there the same tau asks for a margin |y| times larger.
    """
    _check("ipo_loss", locals())
    h = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return (h - 1 / (2 * tau)) ** 2  # IPO eq. 17


def kto_loss(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    *,
    beta=0.1,
    reference_point=0.0,
    desirable_weight=1.0,
    undesirable_weight=1.0,
):
    """Kahneman-Tversky Optimization (Ethayarajh et al. 2024), desirable plus undesirable half: all (batch,).

    SimPO Table 3 prints a plus before its second sigmoid; minimised, that would raise pi(y_l).
    beta: risk aversion. beta -> 0 makes both values 1/2; a large beta makes them steps at z0.
    reference_point: z0, an estimate of KL(policy || reference) in nats, one number for the batch, usually
      the mean log-ratio of mismatched prompts and responses, clamped at 0. It gets no gradient, and beta
      multiplies it: the z_ref of SimPO Table 3 is beta z0.
    desirable_weight, undesirable_weight: lambda_D and lambda_U; 0 switches that half off.
    """
    _check("kto_loss", locals())
    z0 = reference_point.detach() if isinstance(reference_point, torch.Tensor) else reference_point
    chosen_value = torch.sigmoid(beta * ((chosen_logps - ref_chosen_logps) - z0))
    rejected_value = torch.sigmoid(beta * (z0 - (rejected_logps - ref_rejected_logps)))
    # SimPO Table 3, KTO row, sign corrected
    return desirable_weight * (1 - chosen_value) + undesirable_weight * (1 - rejected_value)


def rdpo_loss(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    chosen_lengths,
    rejected_lengths,
    *,
    beta=0.1,
    alpha=0.05,
):
    """R-DPO, DPO with a length penalty in the reward (Park et al. 2024): all (batch,).

    The plus is right: where r - alpha |y| is maximised, the policy implies r = beta (s - rho) + alpha |y|.
    beta: as in `dpo_loss`.
    alpha: penalty per token. 0 is DPO; a large one counts a pair as solved if y_w is the longer response.
    """
    _check("rdpo_loss", locals())
    h = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    longer = (chosen_lengths - rejected_lengths).to(h.dtype)  # alpha * int64 would be float32
    return -F.logsigmoid(beta * h + alpha * longer)  # SimPO Table 3, R-DPO row


# --- preferences, without a reference model ---


def cpo_loss(chosen_logps, rejected_logps, *, beta=0.1, nll_weight=1.0):
    """Contrastive Preference Optimization (Xu et al. 2024), NLL summed: (batch,), (batch,) -> (batch,).

    beta: beta -> 0 makes the contrast the constant ln 2; a large one makes it a hinge.
    nll_weight: 0 leaves the contrast alone; a large one is Preferred-FT. TRL's NLL is a mean over tokens,
      so the same weight counts about |y_w| times less there.
    """
    _check("cpo_loss", locals())
    contrast = -F.logsigmoid(beta * (chosen_logps - rejected_logps))
    return contrast - nll_weight * chosen_logps  # SimPO Table 3, CPO row


def slic_hf_loss(chosen_logps, rejected_logps, *, delta=1.0, nll_weight=1.0):
    """SLiC-HF (Zhao et al. 2023), regularised on y_w as in SimPO: (batch,), (batch,) -> (batch,).

    delta: margin in nats. 0 asks only for the right order; with a large one every pair pushes, equally.
    nll_weight: 0 is the hinge alone; a large one is Preferred-FT.
    """
    _check("slic_hf_loss", locals())
    hinge = F.relu(delta - chosen_logps + rejected_logps)
    return hinge - nll_weight * chosen_logps  # SimPO Table 3, SLiC-HF row


def rrhf_loss(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, *, nll_weight=1.0):
    """RRHF (Yuan et al. 2023) for a pair, a hinge on mean log-probs and a summed NLL: all (batch,).

    nll_weight: 0 stops as soon as the order is right; a large one is Preferred-FT.
    """
    _check("rrhf_loss", locals())
    hinge = F.relu(rejected_logps / rejected_lengths - chosen_logps / chosen_lengths)
    return hinge - nll_weight * chosen_logps  # SimPO Table 3, RRHF row


def orpo_loss(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, *, weight=0.1):
    """Odds Ratio Preference Optimization (Hong et al. 2024): all (batch,).

    The NLL is the token mean over the chosen response; TRL's covers the prompt too.
    weight: lambda. 0 is SFT on y_w; a large one is the odds ratio alone. The paper uses 0.1 to 0.25.
    """
    _check("orpo_loss", locals())
    mean_chosen, mean_rejected = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    log_odds_ratio = (mean_chosen - log1mexp(mean_chosen)) - (mean_rejected - log1mexp(mean_rejected))
    return -mean_chosen - weight * F.logsigmoid(log_odds_ratio)  # ORPO eq. 7, with its SFT term


def simpo_loss(
    chosen_logps,
    rejected_logps,
    chosen_lengths,
    rejected_lengths,
    *,
    beta=2.0,
    gamma=1.0,
    length_normalize=True,
):
    """Simple Preference Optimization (Meng et al. 2024), defaults of its Llama-3-Base run: all (batch,).

    beta: scale of the reward beta a. beta -> 0 makes the loss flat, a large one at fixed gamma/beta a hinge.
    gamma: target margin, in units of reward. 0 asks only for the right order; with a large one every pair
      pushes, equally. The authors' code asks for gamma_beta_ratio = gamma / beta instead.
    length_normalize: False is the paper's ablation, the sums with the same beta.
    """
    _check("simpo_loss", locals())
    if length_normalize:
        chosen_logps, rejected_logps = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    return -F.logsigmoid(beta * (chosen_logps - rejected_logps) - gamma)  # SimPO eq. 6


# --- reward model ---


def reward_pair_loss(chosen_rewards, rejected_rewards):
    """Bradley-Terry negative log-likelihood: (batch,), (batch,) -> (batch,). ln 2 for equal rewards."""
    _check("reward_pair_loss", locals())
    return -F.logsigmoid(chosen_rewards - rejected_rewards)  # DPO eq. 2


def reward_ranking_loss(rewards):
    """Mean Bradley-Terry loss over the K-choose-2 pairs of a ranking: (batch, K), best first -> (batch,).

    A row holds all K responses to a prompt: K forward passes serve K(K-1)/2 comparisons, and no response
    is met K-1 times as if it were new, which overfits (InstructGPT sec. 3.5).
    """
    _check("reward_ranking_loss", locals(), shape="(batch, K)")
    better, worse = torch.triu_indices(rewards.shape[1], rewards.shape[1], offset=1, device=rewards.device)
    return -F.logsigmoid(rewards[:, better] - rewards[:, worse]).mean(dim=1)  # InstructGPT eq. 1


# --- PPO: per token, any shape; the mask is the caller's ---


def ppo_policy_loss(logps, old_logps, advantages, *, clip=0.2):
    """Clipped policy loss (Schulman et al. 2017), one value per token: all one shape, and so is the result.

    old_logps: log-probs at sampling time. They limit the step; the KL penalty is against another model.
    clip: a token whose ratio left [1 - clip, 1 + clip] in the direction its advantage asks for has no
      gradient. clip -> 0 stops after the first step; a large one is the unclipped policy gradient.
    """
    _check("ppo_policy_loss", locals(), shape="any")
    ratio = torch.exp(logps - old_logps)
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(pg_loss1, pg_loss2)  # PPO eq. 7, negated


def ppo_value_loss(values, old_values, returns, *, clip=0.2):
    """Clipped value loss of the code of Ziegler et al. 2019, per token: all one shape, and so is the result.

    clip: a value that moved by more than clip towards its return has no gradient. clip -> 0 stops after the
      first step; a large one is half the squared error.
    """
    _check("ppo_value_loss", locals(), shape="any")
    values_clipped = old_values + (values - old_values).clamp(-clip, clip)
    v_loss_unclipped = (values - returns) ** 2
    v_loss_clipped = (values_clipped - returns) ** 2
    return 0.5 * torch.maximum(v_loss_unclipped, v_loss_clipped)


# --- helpers ---


def log1mexp(x):
    """log(1 - e^x) of every x < 0, without cancellation near 0 or far from it (Maechler 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)  # x rounds to 0 once a response is certain
    near = x > -math.log(2)
    # Each branch gets only its own half: `where` gives the other one a gradient of 0, and 0 * inf is NaN.
    log_near = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    log_far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, log_near, log_far)


_TENSORS = ("logps", "lengths", "rewards", "values", "advantages", "returns")
_POSITIVE = ("beta", "tau", "clip")
_NOT_NEGATIVE = ("alpha", "delta", "nll_weight", "weight", "desirable_weight", "undesirable_weight")
_NUMBERS = ("gamma", "label_smoothing", "reference_point")


def _is_number(value):
    """A tensor passes unread (KTO's estimate is one); a NaN or an infinity given by hand does not."""
    return isinstance(value, torch.Tensor) or isinstance(value, numbers.Real) and math.isfinite(value)


def _check(where, arguments, shape="(batch,)"):
    """Turn a caller's mistake into one sentence. Only lengths are read: reading a tensor stalls a GPU."""
    tensors = {name: x for name, x in arguments.items() if name.endswith(_TENSORS)}
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        at = f"{where}: {name}"
        counts = name.endswith("lengths") and isinstance(x, torch.Tensor) and not x.is_complex()
        if not isinstance(x, torch.Tensor) or not (x.is_floating_point() or counts):
            kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{at} is of type {kind}; pass a torch tensor of floats")
        size = f"{at} has shape {tuple(x.shape)}"
        if shape == "(batch,)" and (x.dim() != 1 or len(x) == 0):
            raise ValueError(
                f"{size}, not (batch,); pass one value per response, the sum over its tokens for log-probs"
            )
        if shape == "(batch, K)" and (x.dim() != 2 or len(x) == 0 or x.shape[1] < 2):
            raise ValueError(f"{size}, not (batch, K >= 2); pass one row per prompt, best response first")
        if x.shape != first.shape or x.device != first.device:
            there = f"{first_name} {tuple(first.shape)} on {first.device}"
            raise ValueError(f"{size} on {x.device}, but {there}; give all the same shape and device")
        if name.endswith("lengths") and not (x >= 1).all():
            raise ValueError(f"{at} has a {x.min():g}; count EOS, and drop pairs with an empty response")
    for name, value in arguments.items():
        at = f"{where}: {name} is {value}"
        if name in (*_POSITIVE, *_NOT_NEGATIVE, *_NUMBERS) and not _is_number(value):
            raise ValueError(f"{at}; make it a finite number")
        if name in _POSITIVE and not value > 0:
            raise ValueError(f"{at}; make it positive")
        if name in _NOT_NEGATIVE and not value >= 0:
            raise ValueError(f"{at}; make it zero or positive")
        if name == "label_smoothing" and not 0 <= value <= 0.5:
            raise ValueError(f"{at}; it is the share of flipped labels, from 0 to 0.5")
        if name == "reference_point" and isinstance(value, torch.Tensor) and value.dim() > 0:
            raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}; pass one number for the batch")
