"""Exercises of notebook 03, PPO."""

import torch

from . import Exercise, Mistake
from . import truths03 as t

EXERCISES = [
    Exercise(
        "03.1",
        "the clipped surrogate",
        truth=t.clipped_by_cases,
        inputs=t.ratios,
        mistakes=(
            Mistake("the sign: eq. 7 is maximised, and a loss is minimised.", t.surrogate(sign=1)),
            Mistake(
                "of the two objectives eq. 7 takes the smaller; yours takes the larger, the hopeful one.",
                t.surrogate(combine=torch.minimum),
            ),
            Mistake(
                "nothing is clipped: the ratio may go anywhere.", t.surrogate(combine=lambda plain, _: plain)
            ),
            Mistake(
                "always clipped: without the minimum, a token that moved the wrong way has no gradient to "
                "bring it back.",
                t.surrogate(combine=lambda _, clipped: clipped),
            ),
            Mistake(
                "the ratio is upside down: new over old, as the samples are from the old policy.",
                t.surrogate(up=-1.0),
            ),
            Mistake(
                "the log-ratio itself is clipped; eq. 7 clips the ratio, exp of it.", t.surrogate(where="log")
            ),
            Mistake(
                "the product with the advantage is clipped; clip the ratio, then multiply.",
                t.surrogate(where="product"),
            ),
            Mistake(
                "the mean is taken: return one value per token, the caller averages.",
                t.surrogate(reduce=torch.mean),
            ),
            Mistake(
                "the sum is taken: return one value per token, the caller averages.",
                t.surrogate(reduce=torch.sum),
            ),
            Mistake(
                "this is advantage times log-prob, without the ratio and without the clip.",
                lambda logps, old_logps, advantages, clip: -advantages * logps,
            ),
            Mistake(
                "the ratio is an exponential: exp(logps - old_logps), not the difference of log-probs.",
                lambda logps, old_logps, advantages, clip: torch.maximum(
                    -advantages * (logps - old_logps),
                    -advantages * (logps - old_logps).clamp(1 - clip, 1 + clip),
                ),
            ),
        ),
        praise="Where the ratio has gone far enough in the direction of the advantage, the gradient is 0.",
    ),
    Exercise(
        "03.2",
        "GAE",
        truth=t.gae_by_sums,
        inputs=t.episodes,
        mistakes=(
            Mistake(
                "off by one: the TD error at t looks ahead to V(t+1), yours uses V(t) twice.",
                t.gae_with(next_value="same"),
            ),
            Mistake(
                "the last token bootstraps: after it the episode is over, and its next value is 0.",
                t.gae_with(next_value="bootstrap"),
            ),
            Mistake(
                "no next value anywhere: delta is r + gamma V(t+1) - V(t).", t.gae_with(next_value="none")
            ),
            Mistake(
                "lambda is missing: the recursion carries gamma times lambda.", t.gae_with(weight="gamma")
            ),
            Mistake(
                "gamma is missing in the recursion: it carries gamma times lambda.", t.gae_with(weight="lam")
            ),
            Mistake(
                "these are one-step TD errors (lambda = 0): nothing is carried from later tokens.",
                t.gae_with(weight="none"),
            ),
            Mistake("the recursion runs forwards in time: start at the last token.", t.gae_with(order=iter)),
            Mistake("the TD errors have the wrong sign.", t.gae_with(sign=-1)),
            Mistake(
                "the advantages are right, the returns are not: yours are the discounted rewards to come "
                "(lambda = 1).",
                t.gae_with(returns="to come"),
            ),
            Mistake(
                "the returns lack the values: what the critic should have said is its value plus the advantage.",
                t.gae_with(returns="same"),
            ),
            Mistake("the returns add the rewards; they add the values.", t.gae_with(returns="rewards")),
            Mistake(
                "a gradient flows through the targets: detach the values, or the critic trains on itself.",
                t.gae_with(keep_gradient=True),
            ),
        ),
        praise="Lambda 0 trusts the critic, lambda 1 trusts the sampled rewards.",
    ),
    Exercise(
        "03.3",
        "the reward of each token",
        truth=t.token_rewards_by_loop,
        inputs=t.scored,
        mistakes=(
            Mistake(
                "the KL has the wrong sign: this pays the policy for leaving the reference "
                "(or policy and reference are swapped).",
                t.rewards_with(sign=1),
            ),
            Mistake(
                "the score stands in the last column, which is padding: the last token of a row is where its "
                "mask ends.",
                t.rewards_with(place="column"),
            ),
            Mistake(
                "the score stands one past the last token: off by one, in the padding.",
                t.rewards_with(place="past"),
            ),
            Mistake(
                "the score stands at the first token; it is earned at the last.",
                t.rewards_with(place="first"),
            ),
            Mistake(
                "every token gets the whole score: there is one score a response, at its last token.",
                t.rewards_with(place="every"),
            ),
            Mistake(
                "the score is spread over the tokens: there is one score a response, at its last token.",
                t.rewards_with(place="spread"),
            ),
            Mistake(
                "the last token lost its KL: add the score to it, do not overwrite it.",
                t.rewards_with(replace=True),
            ),
            Mistake("the score is missing: add it at the last token.", t.rewards_with(place="nowhere")),
            Mistake("padding has a reward: it must be 0 outside the mask.", t.rewards_with(padding=False)),
            Mistake(
                "the KL stands on the last token as one sum: each token pays for itself.",
                t.rewards_with(estimate="sum at the end"),
            ),
            Mistake("this is k3; the exercise asks for k1, the log-ratio.", t.rewards_with(estimate="k3")),
            Mistake(
                "a gradient flows through the rewards: they are data, so detach the log-probs.",
                t.rewards_with(attached=True),
            ),
        ),
        praise="The sum over a response is InstructGPT's r - beta log(policy / reference).",
    ),
    Exercise(
        "03.4",
        "what the gradients are",
        truth=t.kinds_of_gradient,
        mistakes=(
            Mistake(
                "equal means do not make equal gradients: the sampling also depends on the policy.", "RRR"
            ),
            Mistake("k1 is right; k2 and k3 are the other way round.", "ZFR"),
            Mistake("look at k1 again: write its gradient as an expectation of grad log pi.", "RRF"),
            Mistake(
                "look at k3 again: its expectation is right, but its gradient weighs by pi_ref / pi.", "ZRR"
            ),
            Mistake("look at k2 again: its gradient is log-ratio times grad log pi.", "ZZF"),
        ),
        praise="So as a loss, use k2; or put k1 into the reward, as PPO does.",
    ),
    Exercise(
        "03.5",
        "bugs in a whitening",
        truth=t.whiten_by_numpy,
        inputs=t.masked,
        trials=12,
        mistakes=(
            Mistake(
                "nothing is repaired yet: count what differs from the four sentences.",
                t.whiten_with(padding=True, ddof=1, root=False, zero=False),
            ),
            Mistake(
                "padding still counts, now as zeros: take the tokens under the mask alone.",
                t.whiten_with(padding="zeros"),
            ),
            Mistake("padding still counts in mean and variance.", t.whiten_with(padding=True)),
            Mistake("the variance divides by n - 1; Ziegler et al. divide by n.", t.whiten_with(ddof=1)),
            Mistake("it divides by the variance: take its square root.", t.whiten_with(root=False)),
            Mistake("the mean is still there: shift to 0.", t.whiten_with(shift=False)),
            Mistake(
                "the 1e-8 is missing; where all values are equal this divides by 0.",
                t.whiten_with(under=0.0),
            ),
            Mistake(
                "the 1e-8 stands under the root, beside the variance.",
                t.whiten_with(under=0.0, beside=1e-8),
            ),
            Mistake("padding is not 0 in the result.", t.whiten_with(zero=False)),
            Mistake(
                "each row is whitened alone: take one mean and variance over the batch.",
                t.whiten_with(rows=True),
            ),
        ),
    ),
    Exercise(
        "03.6",
        "the adaptive KL coefficient",
        truth=t.next_by_cases,
        inputs=t.controller,
        trials=16,
        mistakes=(
            Mistake(
                "it moves the wrong way: too much KL must raise the price.",
                t.next_with(lambda kl, target: 1 - kl / target),
            ),
            Mistake("the error is not clipped to -0.2 ... 0.2.", t.next_with(t.relative, (-9.0, 9.0))),
            Mistake(
                "the error is absolute: it is relative to the target, kl / target - 1.",
                t.next_with(lambda kl, target: kl - target),
            ),
            Mistake(
                "target and kl are swapped in the ratio.", t.next_with(lambda kl, target: target / kl - 1)
            ),
            Mistake(
                "the 1 is missing: at the target the error is 0.", t.next_with(lambda kl, target: kl / target)
            ),
            Mistake(
                "steps / horizon is missing: each update moves by the whole error.",
                t.next_with(t.relative, share=lambda steps, horizon: 1.0),
            ),
            Mistake(
                "steps and horizon are swapped.",
                t.next_with(t.relative, share=lambda steps, horizon: horizon / steps),
            ),
            Mistake(
                "the change is added; it multiplies the coefficient.",
                lambda coefficient, kl, target, steps, horizon: (
                    coefficient + min(max(kl / target - 1, -0.2), 0.2) * steps / horizon
                ),
            ),
        ),
    ),
    Exercise(
        "03.7",
        "the first update",
        truth=lambda: (1.0, 0.0, 0.0),
        mistakes=(
            Mistake("the ratio of two equal probabilities is 1, not 0.", (0.0, 0.0, 0.0)),
            Mistake(
                "clip = 0.2 is how far a ratio may go, not the share of tokens clipped.", (1.0, 0.2, 0.0)
            ),
            Mistake("the order is ratio, share clipped, KL.", (0.0, 0.0, 1.0)),
        ),
        praise="Nothing has moved: policy, old policy and reference are still one and the same.",
    ),
]
