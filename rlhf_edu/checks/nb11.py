"""Exercises of notebook 11, bug hunt."""

import itertools

import torch

from .. import gallery
from . import Exercise, Mistake
from .truths11 import (
    KEYS,
    RIGHT_SUMS,
    broken_rewards,
    exchanged,
    feels,
    is_right,
    matrix_inputs,
    next_ones,
    noise,
    opposite,
    point,
    point_by_loop,
    reward_inputs,
    rewards_by_loop,
    sums_inputs,
)

LEFT = {
    "sign": "the sign of the KL (the policy is paid for leaving the reference)",
    "past": "the place of the score (the last token of a response is at mask.sum(1) − 1)",
    "padding": "the padding (what stands outside the mask has no reward)",
}
STILL_BROKEN = tuple(
    Mistake(
        f"still wrong: {' and '.join(LEFT[name] for name in some)}.",
        broken_rewards(**dict.fromkeys(some, True)),
    )
    for count in (1, 2, 3)
    for some in itertools.combinations(LEFT, count)
)

EXERCISES = [
    Exercise(
        "11.1",
        "which losses feel the prompt",
        truth=feels,
        mistakes=(
            Mistake("not every loss feels it: what happens to log π(y_w) − log π(y_l) when the same number is added to both?", lambda: dict.fromkeys(feels(), "yes")),
            Mistake("a difference of two sums loses what both have in common; a single log-prob or a mean does not.", lambda: dict.fromkeys(feels(), "no")),
            Mistake("R-DPO adds α(|y_w| − |y_l|): both lengths grow by the same number.", lambda: feels(**{"R-DPO": "yes"})),
            Mistake("CPO's contrast does not feel it, but there is a second term.", lambda: feels(CPO="no")),
            Mistake("KTO takes one response at a time: nothing is there to cancel.", lambda: feels(KTO="no")),
            Mistake("IPO is written in h, as DPO is (here with sums).", lambda: feels(IPO="yes")),
            Mistake("h is a difference of two responses to one prompt: what both have in common is gone.", lambda: feels(DPO="yes")),
            Mistake("SimPO divides by the length: the same tokens weigh more in the mean of a shorter response.", lambda: feels(SimPO="no")),
            Mistake("ORPO uses means, and has a term for the chosen response alone.", lambda: feels(ORPO="no")),
            Mistake("yes and no are exchanged.", lambda: {k: {"yes": "no", "no": "yes"}[v] for k, v in feels().items()}),
        ),
        praise="So this bug cannot be found by a DPO run; the same code in SimPO, ORPO or SFT is wrong.",
    ),
    Exercise(
        "11.2",
        "four broken fine-tunings",
        truth=lambda: dict(KEYS["sft"]),
        mistakes=(
            Mistake("A and B are exchanged: no honest model can fall as far as one of the two does.", exchanged("sft", "A", "B")),
            Mistake("A and C are exchanged: which of the two breaks the model, and which only counts more tokens?", exchanged("sft", "A", "C")),
            Mistake("A and D are exchanged: both start high; in which of them are the samples ruined?", exchanged("sft", "A", "D")),
            Mistake("B and C are exchanged: look at the share of samples that end.", exchanged("sft", "B", "C")),
            Mistake("B and D are exchanged: look at the first loss.", exchanged("sft", "B", "D")),
            Mistake("C and D are exchanged: a token that the model has never met costs far more than a prompt token.", exchanged("sft", "C", "D")),
        ),
        praise="Size of the first loss, share of samples that end: the rest of the hunt is done by tests.",
    ),
    Exercise(
        "11.3",
        "the test that catches a counted prompt",
        truth=is_right,
        inputs=sums_inputs,
        trials=48,
        mistakes=(
            Mistake("yes and no are exchanged: True is for a function that leaves the prompt out.", opposite(is_right)),
            Mistake("your test passes every function: did log-probs of the prompt really change? (A constant added to all logits of a position changes none.)", lambda **_: True),
            Mistake("your test refuses every function, right ones too: what predicts a response token, from position prompt − 1 on, must stay.", lambda **_: False),
            Mistake("your test misses a function that counts only the last token or two of the prompt: change everything that predicts a prompt token.", noise(lambda p: slice(0, 1))),
            Mistake("your test misses a function that counts the last prompt token: that is predicted at position prompt − 2.", noise(lambda p: slice(0, p - 2))),
            Mistake("that compares with one special sum; a right function may take a mean, or leave EOS out: only the prompt is asked about.", lambda sums, **_: sums is RIGHT_SUMS[0]),
        ),
        praise="Change what must not matter, and look whether it matters: this form of test needs no right answer.",
    ),
    Exercise(
        "11.4",
        "six broken trainings on pairs",
        truth=lambda: dict(KEYS["dpo"]),
        mistakes=(
            Mistake("A and B are exchanged: in one of them the margin cannot leave 0, in the other it is only small.", exchanged("dpo", "A", "B")),
            Mistake("A and C are exchanged: in one of them the first loss is not log 2.", exchanged("dpo", "A", "C")),
            Mistake("A and D are exchanged: look at what the samples are worth.", exchanged("dpo", "A", "D")),
            Mistake("A and E are exchanged: both losses hardly move; look at the margin in nats.", exchanged("dpo", "A", "E")),
            Mistake("A and F are exchanged: one of them is far from the reference.", exchanged("dpo", "A", "F")),
            Mistake("B and C are exchanged: where is the loss exactly log 2 all the time?", exchanged("dpo", "B", "C")),
            Mistake("B and D are exchanged: look at what the samples are worth.", exchanged("dpo", "B", "D")),
            Mistake("B and E are exchanged: which margin is exactly 0?", exchanged("dpo", "B", "E")),
            Mistake("C and D are exchanged: which first loss is not log 2?", exchanged("dpo", "C", "D")),
            Mistake("C and E are exchanged: which first loss is not log 2?", exchanged("dpo", "C", "E")),
            Mistake("C and F are exchanged: which first loss is not log 2?", exchanged("dpo", "C", "F")),
            Mistake("D and F are exchanged: one is as close to the reference as the healthy run, and goes the wrong way.", exchanged("dpo", "D", "F")),
        ),
        praise="First loss, size and sign of the margin, and a measurement that the run did not make itself.",
    ),
    Exercise(
        "11.5",
        "repair the rewards of PPO",
        truth=rewards_by_loop,
        inputs=reward_inputs,
        mistakes=(
            *STILL_BROKEN,
            Mistake("the score is given once, at the last token, and here every token gets it.", broken_rewards(scored=lambda s, m: s[:, None] * m)),
            Mistake("the score stands at the last column; responses have different lengths.", broken_rewards(scored=lambda s, m: s[:, None] * (torch.arange(m.shape[1]) == m.shape[1] - 1))),
            Mistake("the score is missing.", broken_rewards(scored=lambda s, m: 0)),
            Mistake("the score replaces the KL of the last token; it is added to it.", lambda logps, ref_logps, scores, mask, coefficient: broken_rewards(scored=lambda s, m: 0)(logps, ref_logps, scores, mask, coefficient) * (mask.cumsum(1) < mask.sum(1, keepdim=True)) + gallery.place(scores, mask)),
            Mistake("the coefficient belongs to the KL alone, not to the score.", lambda coefficient, scores, **x: broken_rewards()(scores=coefficient * scores, coefficient=coefficient, **x)),
        ),
        praise="Three lines, three bugs, and each has been in a library.",
    ),
    Exercise(
        "11.6",
        "four broken PPO runs",
        truth=lambda: dict(KEYS["ppo"]),
        mistakes=(
            Mistake("A and B are exchanged: which first ratio is not 1?", exchanged("ppo", "A", "B")),
            Mistake("A and C are exchanged: a run that is not paid stays where it is.", exchanged("ppo", "A", "C")),
            Mistake("A and D are exchanged: a run that is not paid stays where it is.", exchanged("ppo", "A", "D")),
            Mistake("B and C are exchanged: which logged KL is below 0?", exchanged("ppo", "B", "C")),
            Mistake("B and D are exchanged: which first ratio is not 1?", exchanged("ppo", "B", "D")),
            Mistake("C and D are exchanged: which logged KL is below 0?", exchanged("ppo", "C", "D")),
        ),
        praise="A KL below 0, a first ratio other than 1, a score that does not rise: each names its bug.",
    ),
    Exercise(
        "11.7",
        "a roll that does something",
        truth=point_by_loop,
        inputs=matrix_inputs,
        trials=12,
        mistakes=(
            Mistake("the mean of the matched log-ratios: rolling them changes their order, not their mean.", point(lambda m: m.diagonal().roll(1).mean().clamp(min=0))),
            Mistake("a KL is not negative: the mean is cut off at 0.", point(lambda m: next_ones(m).mean())),
            Mistake("cut off the mean at 0, not each log-ratio: that would only push the estimate up.", point(lambda m: next_ones(m).clamp(min=0).mean())),
            Mistake("rows are prompts, columns responses: prompt i goes with the response of prompt i + 1.", point(lambda m: next_ones(m.T).mean().clamp(min=0))),
            Mistake("the last prompt has a partner too: it goes with the first response.", point(lambda m: m.diagonal(offset=1).mean().clamp(min=0))),
            Mistake("only the next response is used, not all mismatched ones: KTO re-scores one a prompt.", point(lambda m: (m.sum() - m.trace()).div(len(m) * (len(m) - 1)).clamp(min=0))),
            Mistake("the whole matrix is averaged, the matched pairs with it.", point(lambda m: m.mean().clamp(min=0))),
            Mistake("that is a sum; the mean over prompts is asked for.", point(lambda m: next_ones(m).sum().clamp(min=0))),
            Mistake("the values are right, but z0 must carry no gradient: detach it.", lambda log_ratios: next_ones(log_ratios).mean().clamp(min=0)),
        ),
        praise="One more forward pass a batch is the price: the mismatched pairs have to be scored.",
    ),
]  # fmt: skip
