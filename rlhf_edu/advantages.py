"""What PPO needs between the rollout and the loss: GAE, KL estimates, whitening, the adaptive KL coefficient.

The details are those of Ziegler et al. 2019, https://github.com/openai/lm-human-preferences. Tensors are
(batch, time), one value per response token, padded on the right where a `mask` says so.
"""

import math
import numbers

import torch


@torch.no_grad()  # both results are targets; a gradient through them would train the critic on itself
def gae(rewards, values, *, gamma=1.0, lam=0.95, mask=None):
    """Generalized advantage estimation over the last dimension: (advantages, returns), shaped like `rewards`.

    The value after the last token, or after the last token under the mask, is 0: the episode ends there.
    Padding gives 0 in both results.
    lam: 0 is the one-step TD error, calm but as wrong as the critic; 1 is return - value, unbiased but noisy.
    gamma: 1 discounts nothing, the usual choice for text; 0 credits a token with its own reward alone.
    """
    _check("gae", rewards, values, *([] if mask is None else [mask]))
    if (
        not values.dim()
        or not values.numel()
        or rewards.shape != values.shape
        or (mask is not None and mask.shape != values.shape)
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (rewards, values, mask) if x is not None)
        raise ValueError(
            f"gae: rewards, values and mask have shapes {shapes}; give them all the same shape, (batch, time)"
        )
    if mask is not None:
        rewards, values = rewards.masked_fill(~mask.bool(), 0), values.masked_fill(~mask.bool(), 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[..., 0])
    for t in reversed(range(values.shape[-1])):
        delta = rewards[..., t] + gamma * next_value - values[..., t]  # the TD error
        advantages[..., t] = next_advantage = delta + gamma * lam * next_advantage  # PPO: truncated estimate
        next_value = values[..., t]
    return advantages, advantages + values


def kl_estimates(logps, ref_logps):
    """Three estimates of KL(policy || reference) in nats, from samples of the policy. Any shape, per sample.

    k1 is unbiased and noisy and can be negative; k2 is biased and calm; k3 is unbiased and never negative.
    Average over samples. They hold only for tokens sampled from what is scored: same temperature, no top-p.
    """
    _check("kl_estimates", logps, ref_logps)
    if logps.shape != ref_logps.shape:
        raise ValueError(
            f"kl_estimates: logps has shape {tuple(logps.shape)} but ref_logps {tuple(ref_logps.shape)}; "
            "score the same tokens under both models"
        )
    log_ratio = logps - ref_logps
    return {  # http://joschu.net/blog/kl-approx.html, whose ratio r is exp(-log_ratio) here
        "k1": log_ratio,
        "k2": log_ratio**2 / 2,
        "k3": torch.expm1(-log_ratio) + log_ratio,  # exp(-x) - 1 + x, without cancellation near 0
    }


def whiten(values, mask, *, shift_mean=True):
    """Scale to variance 1 over the tokens under the mask, and shift to mean 0 unless `shift_mean` is False.

    values, mask: (batch, time) -> (batch, time), 0 outside the mask. The variance divides by n, not n - 1.
    Ziegler et al. whiten rewards with shift_mean=False (the mean stays) and advantages with True.
    """
    _check("whiten", values, mask)
    mask = mask.bool()
    if mask.shape != values.shape or not mask.any():
        raise ValueError(
            f"whiten: values have shape {tuple(values.shape)}, mask {tuple(mask.shape)} with {mask.sum()} "
            "true; pass a mask of the same shape that keeps at least one token"
        )
    kept = values[mask]
    mean, var = kept.mean(), kept.var(correction=0)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0)


def _check(where, *tensors):
    if wrong := [x for x in tensors if not isinstance(x, torch.Tensor)]:
        raise TypeError(f"{where}: this is a {type(wrong[0]).__name__}; pass torch tensors, all of one shape")


class AdaptiveKL:
    """A KL coefficient that rises while the measured KL is above its target and falls while it is below.

    Ziegler et al. 2019; the defaults are those of their code.
    coefficient: its value now. target: KL per response, in nats.
    horizon: responses in which the coefficient changes by 20% at most, as it does in one update from more responses
        than that; a very long one keeps it fixed.
    """

    def __init__(self, coefficient=0.15, target=6.0, horizon=10_000):
        if not all(0 < x < math.inf for x in (coefficient, target, horizon)):
            raise ValueError(
                f"AdaptiveKL: coefficient, target and horizon are {coefficient}, {target} and {horizon}; "
                "make all three positive and finite"
            )
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl, steps):
        """Take the mean KL per response of the last `steps` responses; return the new coefficient."""
        if not isinstance(kl, numbers.Real | torch.Tensor) or not math.isfinite(kl):
            raise ValueError(
                f"AdaptiveKL: the measured KL is {kl}; pass a finite number, and lower the learning rate"
            )
        error = min(max(float(kl) / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * min(steps / self.horizon, 1)  # more would make it negative in the end
        return self.coefficient
