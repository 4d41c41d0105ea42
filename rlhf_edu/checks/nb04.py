"""Exercises of notebook 04, DPO derived."""

import torch
import torch.nn.functional as F

from . import Exercise, Mistake


def _log_probs(rng, pairs=6):
    """Summed log-probs of policy and reference, float64; the policy's want gradients."""
    draw = lambda: torch.tensor(rng.normal(-20, 4, pairs))
    return {
        "chosen_logps": draw().requires_grad_(),
        "rejected_logps": draw().requires_grad_(),
        "ref_chosen_logps": draw(),
        "ref_rejected_logps": draw(),
        "beta": float(rng.uniform(0.05, 0.5)),
    }


def _dpo_by_probabilities(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """DPO eq. 7 through the probability itself: minus the log of two rewards' softmax."""
    rewards = beta * torch.stack([chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps])
    return -rewards.log_softmax(0)[0]


def _h(c, r, rc, rr):
    return (c - r) - (rc - rr)


EXERCISES = [
    Exercise(
        "04.1",
        "the DPO loss",
        truth=_dpo_by_probabilities,
        inputs=_log_probs,
        mistakes=(
            Mistake(
                "chosen and rejected are the wrong way round: the loss must fall when the chosen response gains.",
                lambda chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta: (
                    -F.logsigmoid(
                        -beta * _h(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
                    )
                ),
            ),
            Mistake(
                "beta stands outside the sigmoid: it scales the reward difference inside (eq. 7).",
                lambda chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta: (
                    -beta
                    * F.logsigmoid(_h(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps))
                ),
            ),
        ),
        praise="At the start policy and reference agree and this is log 2, whatever beta is.",
    ),
]
