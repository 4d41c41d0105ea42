"""Exercises of notebook 04, DPO derived: the known wrong answers; what is right is in `truths04`."""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from . import Exercise, Mistake, truths04

log_sigmoid = F.logsigmoid


def _from_log_weights(weights_of, over=-1):
    def answer(reward, reference, beta):
        weights = weights_of(reward, reference, beta)
        if over is None:
            return weights.flatten().softmax(0).view_as(weights), weights.flatten().logsumexp(0)
        return weights.softmax(over), weights.logsumexp(over)

    return answer


def _right_weights(reward, reference, beta):
    return reference.log() + reward / beta


def _after(change):
    def answer(reward, reference, beta):
        weights = _right_weights(reward, reference, beta)
        return change(weights.softmax(-1), weights.logsumexp(-1), weights, beta)

    return answer


def _overflows(answer):
    reward, reference = torch.tensor([[2.0, 1.0, -3.0]]).double(), torch.tensor([[0.2, 0.3, 0.5]]).double()
    try:
        finite = all(np.isfinite(np.asarray(part)).all() for part in answer(reward, reference, 0.001))
    except OverflowError:
        finite = False
    hint = "right, until beta is small: exp(2 / 0.001) overflows. Add logs, and take one log-sum-exp."
    return None if finite else hint


def _guess(a, b, c, d):
    return {"policy_zero": a, "policy_infinity": b, "value_zero": c, "value_infinity": d}


def _anchoring(ratio, shift):
    def answer(policy, reference, anchor, anchor_reward, beta):
        reward = ratio(policy.log(), reference.log(), beta)
        return reward + shift(reward, reward.gather(1, anchor[:, None]), anchor_reward[:, None])

    return answer


def _table(reward_of, squash=torch.sigmoid, outside=False):
    def answer(policy, reference, beta):
        reward = reward_of(policy.log(), reference.log(), beta)
        return squash(reward[:, :, None] - reward[:, None, :]) * (beta if outside else 1)

    return answer


def _loss(of):
    """A wrong loss from of(s_w, s_l, rho_w, rho_l, beta)."""

    def answer(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
        return of(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)

    return answer


def _h(w, l, rw, rl):
    return (w - rw) - (l - rl)


def _loss_overflows(answer):
    far = {
        "chosen_logps": -9000.0,
        "rejected_logps": -10.0,
        "ref_chosen_logps": -10.0,
        "ref_rejected_logps": -9000.0,
    }
    value = answer(**{k: torch.tensor([v], dtype=torch.float64) for k, v in far.items()}, beta=0.5)
    if not np.isfinite(np.asarray(value.detach())).all():
        return (
            "right, until h is far from 0: log(sigmoid(-9000)) is -inf. torch.nn.functional has one function."
        )
    return None


def _gradient(scale=lambda beta, pairs: beta / pairs, weight=None, add=True, chosen_part=1, rejected_part=1):
    weight = weight or (lambda h, without_ref, beta: torch.sigmoid(-beta * h))

    def answer(theta, theta_ref, prompt, chosen, rejected, beta):
        own, ratio = theta, theta - theta_ref
        h = ratio[prompt, chosen] - ratio[prompt, rejected]
        push = scale(beta, len(h)) * weight(h, own[prompt, chosen] - own[prompt, rejected], beta)
        out = torch.zeros_like(theta)
        if add:
            out.index_put_((prompt, chosen), -chosen_part * push, accumulate=True)
            return out.index_put_((prompt, rejected), rejected_part * push, accumulate=True)
        out[prompt, chosen] -= push
        out[prompt, rejected] += push
        return out

    return answer


def _ipo(margin, use_reference=True, first=True):
    return lambda preference, reference, tau: torch.sigmoid(
        (1 if first else -1) * ((reference.logit() if use_reference else 0) + margin(preference, tau))
    )


def _with(
    mean=False, swapped=False, outside=False, moving=False, sign=False, unmasked=False, frozen="",
    negative=False, reduced=False,
):  # fmt: skip
    def answer(chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, beta):
        def total(logps, mask):
            mask = torch.ones_like(mask) if unmasked else mask
            return (logps * mask).sum(1) / (mask.sum(1) if mean else 1)

        w, l = total(chosen, chosen_mask), total(rejected, rejected_mask)
        rw, rl = total(ref_chosen, chosen_mask), total(ref_rejected, rejected_mask)
        rw, rl = (rw, rl) if moving else (rw.detach(), rl.detach())
        w, l = (w.detach() if "chosen" in frozen else w), (l.detach() if "rejected" in frozen else l)
        h = _h(w, l, rl, rw) if swapped else _h(w, l, rw, rl)
        h = -h if sign else h
        loss = -beta * log_sigmoid(h) if outside else -log_sigmoid(beta * h)
        loss = -loss if negative else loss
        return loss.mean() if reduced else loss

    return answer


_shift = lambda reward, at_anchor, wanted: wanted - at_anchor
_BUGS = {  # the four bugs of the page, each by its symptom
    "mean": "a response is weighed by its mean log-prob, so repeating it changes nothing",
    "swapped": "where policy and reference agree the loss is not log 2: what is subtracted from what?",
    "outside": "at the start the loss is not log 2 but that times beta",
    "moving": "a gradient reaches the reference, which must stand still",
}
_LEFT = [
    Mistake(
        (f"{len(left)} bugs are left: " if len(left) > 1 else "one bug is left: ")
        + "; ".join(_BUGS[b] for b in left) + ".", _with(**dict.fromkeys(left, True)),
    )
    for size in range(1, 5)
    for left in itertools.combinations(_BUGS, size)
]  # fmt: skip


def _mistakes(by_hint, more=()):
    return (*(Mistake(hint, answer) for hint, answer in by_hint.items()), *more)


# fmt: off
EXERCISES = [
    Exercise(
        "04.1", "the optimal policy", truth=truths04.optimum_by_loops, inputs=truths04.world,
        examine=_overflows,
        mistakes=_mistakes({
            "the reward is multiplied by beta: a small beta should make the reward count more, not less.":
                _from_log_weights(lambda reward, reference, beta: reference.log() + reward * beta),
            "beta is missing: with any other beta the policy would be the same.":
                _from_log_weights(lambda reward, reference, beta: reference.log() + reward),
            "the reference is missing: where all rewards are equal, what should come out?":
                _from_log_weights(lambda reward, reference, beta: reward / beta),
            "the reference's probabilities stand where their logs belong.":
                _from_log_weights(lambda reward, reference, beta: reference + reward / beta),
            "the sum runs over the prompts: Z(x) is a sum over the responses to one prompt.":
                _from_log_weights(_right_weights, over=0),
            "there is one Z for the whole table: every prompt has its own.":
                _from_log_weights(_right_weights, over=None),
            "the policy does not sum to 1 for each prompt: it still has to be divided by something.":
                _after(lambda policy, log_z, weights, beta: (weights.exp(), log_z)),
            "the policy is right; the second part is Z, and its log is asked for.":
                _after(lambda policy, log_z, weights, beta: (policy, log_z.exp())),
            "the policy is right; the second part is log Z alone, without beta before it.":
                _after(lambda policy, log_z, weights, beta: (policy, beta * log_z)),
            "that is the log of the policy: return probabilities.":
                _after(lambda policy, log_z, weights, beta: (policy.log(), log_z)),
        }),
        praise="The rest of the notebook uses it.",
    ),
    Exercise(
        "04.2", "the limits of beta", truth=truths04.limits,
        mistakes=_mistakes({
            "the two limits are exchanged: what does a free divergence allow?": _guess(*"ACFG"),
            "KL is measured from the reference: staying near it is not being uniform.": _guess(*"CBGF"),
            "the policies are right; think of the values again: at both ends the KL term costs nothing.":
                _guess(*"CAFG"),
            "the policies are right; a value is a mean of rewards at best, and they are finite.":
                _guess(*"CAHF"),
            "the policies are right; staying at the reference still earns its mean reward.": _guess(*"CAGE"),
        }),
        praise="Between the two limits lies everything that RLHF does.",
    ),
    Exercise(
        "04.3", "the reward of a policy", truth=truths04.reward_by_pairs, inputs=truths04.anchored,
        mistakes=_mistakes({
            "policy and reference are exchanged: what the policy raised must have the higher reward.":
                _anchoring(lambda p, ref, beta: beta * (ref - p), _shift),
            "beta is missing before the log-ratio.": _anchoring(lambda p, ref, beta: p - ref, _shift),
            "you divide by beta: solve pi proportional to ref * exp(r / beta) for r once more.":
                _anchoring(lambda p, ref, beta: (p - ref) / beta, _shift),
            "the reference is missing: a policy that equals its reference has a constant reward.":
                _anchoring(lambda p, ref, beta: beta * p, _shift),
            "those are the log-ratios alone: the known reward of one response fixes a constant per prompt.":
                _anchoring(lambda p, ref, beta: beta * (p - ref), lambda r, at, wanted: 0 * r),
            "the known reward is added, but the anchor does not come out with it: it has a log-ratio too.":
                _anchoring(lambda p, ref, beta: beta * (p - ref), lambda r, at, wanted: wanted),
            "the reward is centred to its mean and then shifted: the anchor itself must have the known reward.":
                _anchoring(lambda p, ref, beta: beta * (p - ref), lambda r, at, wanted: wanted - r.mean(1, True)),
            "that is the ratio itself, without its log.":
                _anchoring(lambda p, ref, beta: beta * (p - ref).exp(), _shift),
            "one constant for all prompts: each prompt has a log Z of its own.":
                _anchoring(lambda p, ref, beta: beta * (p - ref), lambda r, at, wanted: (wanted - at)[0]),
        }),
        praise="One known reward for each prompt is all that a policy cannot tell.",
    ),
    Exercise(
        "04.4", "preferences from policies", truth=truths04.preferences_by_rewards, inputs=truths04.policies,
        mistakes=_mistakes({
            "the table is transposed: entry [x, i, j] is the probability that i is preferred to j.":
                _table(lambda p, ref, beta: beta * (ref - p)),
            "the reference is missing: a likely response is not therefore a good one.":
                _table(lambda p, ref, beta: beta * p),
            "beta is missing inside the sigmoid.": _table(lambda p, ref, beta: p - ref),
            "the log-ratio is divided by beta.": _table(lambda p, ref, beta: (p - ref) / beta),
            "beta stands outside the sigmoid: then [x, i, j] and [x, j, i] do not sum to 1.":
                _table(lambda p, ref, beta: p - ref, outside=True),
            "pi(i) / (pi(i) + pi(j)) compares probabilities; Bradley-Terry compares rewards.":
                _table(lambda p, ref, beta: p),
            "those are logs of probabilities.":
                _table(lambda p, ref, beta: beta * (p - ref), squash=log_sigmoid),
            "those are differences of reward, not probabilities.":
                _table(lambda p, ref, beta: beta * (p - ref), squash=lambda difference: difference),
        }),
        praise="No Z was needed.",
    ),
    Exercise(
        "04.6", "the DPO loss", truth=truths04.dpo_by_probabilities, inputs=truths04.log_probs,
        examine=_loss_overflows,
        mistakes=_mistakes({
            "chosen and rejected are the wrong way round: the loss must fall when the chosen response gains.":
                _loss(lambda w, l, rw, rl, beta: -log_sigmoid(-beta * _h(w, l, rw, rl))),
            "beta stands outside the sigmoid: it scales the reward difference inside (eq. 7).":
                _loss(lambda w, l, rw, rl, beta: -beta * log_sigmoid(_h(w, l, rw, rl))),
            "the reference counts with the wrong sign: with policy = reference h must be 0.":
                _loss(lambda w, l, rw, rl, beta: -log_sigmoid(beta * _h(w, l, rl, rw))),
            "the reference is missing: only the policy's log-probs are compared.":
                _loss(lambda w, l, rw, rl, beta: -log_sigmoid(beta * (w - l))),
            "beta is missing.": _loss(lambda w, l, rw, rl, beta: -log_sigmoid(_h(w, l, rw, rl))),
            "h is divided by beta: a large beta would then let the policy go.":
                _loss(lambda w, l, rw, rl, beta: -log_sigmoid(_h(w, l, rw, rl) / beta)),
            "that is the log-likelihood; a loss is its negative.":
                _loss(lambda w, l, rw, rl, beta: log_sigmoid(beta * _h(w, l, rw, rl))),
            "that is a probability: its log is missing.":
                _loss(lambda w, l, rw, rl, beta: torch.sigmoid(beta * _h(w, l, rw, rl))),
            "that is minus a probability: its log is missing.":
                _loss(lambda w, l, rw, rl, beta: -torch.sigmoid(beta * _h(w, l, rw, rl))),
            "you took the mean over the pairs: return one loss a pair, and let the caller take it.":
                _loss(lambda w, l, rw, rl, beta: -log_sigmoid(beta * _h(w, l, rw, rl)).mean()),
            "you took the sum over the pairs: return one loss a pair.":
                _loss(lambda w, l, rw, rl, beta: -log_sigmoid(beta * _h(w, l, rw, rl)).sum()),
            "the values are right, but the policy is detached: nothing would be learned.":
                _loss(lambda w, l, rw, rl, beta: -log_sigmoid(beta * _h(w, l, rw, rl)).detach()),
            "the values are right, but the rejected response is detached: only the chosen one would move.":
                _loss(lambda w, l, rw, rl, beta: -log_sigmoid(beta * _h(w, l.detach(), rw, rl))),
            "the values are right, but the chosen response is detached: only the rejected one would move.":
                _loss(lambda w, l, rw, rl, beta: -log_sigmoid(beta * _h(w.detach(), l, rw, rl))),
        }),
        praise="At the start policy and reference agree and this is log 2, whatever beta is.",
    ),
    Exercise(
        "04.7", "the gradient by hand", truth=truths04.gradient_by_differences, inputs=truths04.pairs,
        mistakes=_mistakes({
            "the sign: this is the direction in which the loss falls, and its gradient points uphill.":
                _gradient(chosen_part=-1, rejected_part=-1),
            "the weight is large for pairs that are already right: it should be sigma(r_l - r_w).":
                _gradient(weight=lambda h, without_ref, beta: torch.sigmoid(beta * h)),
            "the factor beta before everything is missing.": _gradient(lambda beta, pairs: 1 / pairs),
            "that is the sum over the pairs: the mean is asked for.": _gradient(lambda beta, pairs: beta),
            "two things: the mean over the pairs is asked for, and the factor beta is missing.":
                _gradient(lambda beta, pairs: 1),
            "the weight does not know the reference: its rewards are log-ratios.":
                _gradient(weight=lambda h, without_ref, beta: torch.sigmoid(-beta * without_ref)),
            "beta is missing inside the weight.":
                _gradient(weight=lambda h, without_ref, beta: torch.sigmoid(-h)),
            "the weight is missing: every pair pushes equally.":
                _gradient(weight=lambda h, without_ref, beta: torch.ones_like(h)),
            "a response that stands in several pairs keeps only the last: grad[i, j] -= v with repeated "
            "indices does not add up. See index_put_(..., accumulate=True), or loop.":
                _gradient(add=False),
            "the rejected response is missing.": _gradient(rejected_part=0),
            "the chosen response is missing.": _gradient(chosen_part=0),
            "both responses are pushed the same way: they should part.": _gradient(rejected_part=-1),
        }),
        praise="In a table a pair moves two numbers, and the softmax needs no derivative of its own.",
    ),
    Exercise(
        "04.8", "one certain pair, beta 10", truth=truths04.where_dpo_goes,
        mistakes=_mistakes({
            "a gradient that shrinks is not zero: for which h does it vanish?": "A",
            "that is where IPO ends, with tau in place of beta; DPO has no such target.": "B",
            "what would be special about this point? Look for the h at which the weight is 0.": "D",
        }),
        praise="A large beta only makes it slow.",
    ),
    Exercise(
        "04.9", "where IPO ends", truth=truths04.ipo_by_search, inputs=truths04.two_responses,
        mistakes=_mistakes({
            "the margin is 1/(2 tau), and yours is twice that.": _ipo(lambda p, tau: (2 * p - 1) / tau),
            "the margin has tau in the numerator: a large tau should keep the policy near the reference.":
                _ipo(lambda p, tau: (2 * p - 1) * tau / 2),
            "the preference is missing: at 1/2 nothing should move.":
                _ipo(lambda p, tau: torch.full_like(p, 0.5 / tau)),
            "the pairs that the second response wins are missing: they pull the other way.":
                _ipo(lambda p, tau: p / (2 * tau)),
            "the reference is missing: h is counted from it.":
                _ipo(lambda p, tau: (2 * p - 1) / (2 * tau), use_reference=False),
            "that is where DPO ends: IPO's h is linear in the preference, so that 1 stays finite.":
                _ipo(lambda p, tau: p.logit() / tau),
            "that is the probability of the second response: the first is asked for.":
                _ipo(lambda p, tau: (2 * p - 1) / (2 * tau), first=False),
            "the reference is weighted, but the two responses do not sum to 1 yet.":
                lambda preference, reference, tau: reference * torch.exp((2 * preference - 1) / (2 * tau)),
            "that is h, and the probability of the first response is asked for.":
                lambda preference, reference, tau: (2 * preference - 1) / (2 * tau),
        }),
        praise="Uniform reference, certain label, tau 0.5: 0.731.",
    ),
    Exercise(
        "04.10", "where a smoothed label stops pushing", truth=truths04.cdpo_by_bisection, tolerance=1e-3,
        mistakes=_mistakes({
            "that is beta h; h itself is asked for.": math.log(9),
            "you multiplied by beta: solve sigma(beta h) = 1 - epsilon for h.": 0.5 * math.log(9),
            "the sign: the chosen response should still be the more likely one.": -2 * math.log(9),
            "that is sigma(beta h), the probability; h is asked for.": 0.9,
            "that is the IPO margin; here a sigmoid is to be inverted.": 1.0,
        }),
        praise="Doubting one label in ten is enough to keep the policy finite.",
    ),
    Exercise(
        "04.11", "repair a DPO loss", truth=truths04.by_tokens, inputs=truths04.tokens,
        mistakes=_mistakes({
            "a new one: chosen and rejected are the wrong way round.": _with(sign=True),
            "a new one: padding is counted, its log-probs are garbage.": _with(unmasked=True),
            "you detached the policy as well: only the reference must stand still.":
                _with(frozen="chosen and rejected"),
            "a new one: that is the log-likelihood, and a loss is its negative.": _with(negative=True),
            "you took the mean over the pairs: return one loss a pair.": _with(reduced=True),
            "you detached the rejected response of the policy.": _with(frozen="rejected"),
            "you detached the chosen response of the policy.": _with(frozen="chosen"),
        }, _LEFT),
        praise="Four silent bugs, none of which raises an error or stops a run.",
    ),
]
