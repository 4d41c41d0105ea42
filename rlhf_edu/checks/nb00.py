"""Exercises of notebook 00, the tour."""

import itertools
import math

import numpy as np
import torch
from torch.distributions import Bernoulli, kl_divergence

from . import Exercise, Mistake

# --- 00.1 the log-prob of a response ---


def _table(rng, tokens=5):
    """A toy language model and one text: table[i, j] is the probability of token j after token i; EOS is 4."""
    length = int(rng.integers(2, 5))
    return {
        "table": torch.tensor(rng.dirichlet(np.ones(tokens), tokens)),
        "prompt": [int(t) for t in rng.integers(0, tokens - 1, 3)],
        "response": [*(int(t) for t in rng.integers(0, tokens - 1, length)), tokens - 1],
    }


def _by_product(table, prompt, response):
    """The probability first, as one product, then its log."""
    probability, previous = 1.0, prompt[-1]
    for token in response:
        probability *= float(table[previous, token])
        previous = token
    return math.log(probability)


def _steps(table, first, second):
    return [math.log(float(table[i, j])) for i, j in zip(first, second, strict=False)]


def _of_steps(change):
    def answer(table, prompt, response):
        return change(_steps(table, [prompt[-1], *response], response), table, prompt, response)

    return answer


# --- 00.2 sum and mean ---


def _padded(rng, batch=4, time=7):
    lengths = rng.permutation(np.arange(2, 2 + batch))
    return {"token_logps": torch.tensor(rng.normal(-2, 1, (batch, time))), "lengths": torch.tensor(lengths)}


def _sum_and_mean_by_loops(token_logps, lengths):
    rows = [[float(x) for x in row[: int(n)]] for row, n in zip(token_logps, lengths, strict=True)]
    return np.array([math.fsum(r) for r in rows]), np.array([math.fsum(r) / len(r) for r in rows])


def _with_mask(change):
    def answer(token_logps, lengths):
        mask = torch.arange(token_logps.shape[1]) < lengths[:, None]
        return change(token_logps, lengths, (token_logps * mask).sum(1))

    return answer


# --- 00.3 KL of two coins ---


def _coins(rng):
    policy, reference = rng.uniform(0.05, 0.95, 2)
    return {"policy_heads": float(policy), "reference_heads": float(reference)}


def _coin_kl(policy_heads, reference_heads):
    return kl_divergence(*(Bernoulli(torch.tensor(p).double()) for p in (policy_heads, reference_heads)))


def _of_faces(face, both=True):
    """Sums face(p, q) over heads, and over tails where `both`."""
    return lambda policy_heads, reference_heads: (
        face(policy_heads, reference_heads) + both * face(1 - policy_heads, 1 - reference_heads)
    )


# --- 00.4 Best-of-4 ---


def _some_positive(share=0.4, samples=4):
    """The probability that some sample is positive, added up over all outcomes of `samples` samples."""
    outcomes = itertools.product((share, 1 - share), repeat=samples)
    return math.fsum(math.prod(outcome) for outcome in outcomes if share in outcome)


# --- 00.5 find the bug ---


def _rewards(rng, prompts=5, samples=4):
    return {"rewards": torch.tensor(rng.uniform(0, 1, (prompts, samples)) + rng.normal(0, 0.5, (prompts, 1)))}


def _best_by_loops(rewards):
    return math.fsum(max(row) for row in rewards.tolist()) / len(rewards)


EXERCISES = [
    Exercise(
        "00.1",
        "the log-prob of a response",
        truth=_by_product,
        inputs=_table,
        mistakes=(
            Mistake("this is the probability: the log-prob is its logarithm, or a sum of logs.",
                    _of_steps(lambda s, *_: math.exp(sum(s)))),
            Mistake("the sign: the log of a probability below 1 is negative.", _of_steps(lambda s, *_: -sum(s))),
            Mistake("this is the mean over the tokens: the log-prob of the whole response is the sum.",
                    _of_steps(lambda s, *_: sum(s) / len(s))),
            Mistake("EOS is dropped: to stop here has a probability too, and it belongs to the response.",
                    _of_steps(lambda s, *_: sum(s[:-1]))),
            Mistake("the first token of the response is missing: it is predicted by the last token of the prompt.",
                    _of_steps(lambda s, *_: sum(s[1:]))),
            Mistake("the first token of the response is predicted by the last token of the prompt, not by the first.",
                    lambda table, prompt, response: sum(_steps(table, [prompt[0], *response], response))),
            Mistake("the prompt is scored as well: it was given, so only the response's tokens count.",
                    _of_steps(lambda s, table, prompt, _: sum(s) + sum(_steps(table, prompt, prompt[1:])))),
            Mistake("rows and columns are swapped: the row is the token before, the column the token that follows.",
                    _of_steps(lambda s, t, p, r: sum(_steps(t.T, [p[-1], *r], r)))),
            Mistake("this uses base 2: log-probs are in nats, natural logarithms.",
                    _of_steps(lambda s, *_: sum(s) / math.log(2))),
            Mistake("this uses base 10: log-probs are in nats, natural logarithms.",
                    _of_steps(lambda s, *_: sum(s) / math.log(10))),
        ),
        praise="Log-probs of tokens add up because their probabilities multiply.",
    ),
    Exercise(
        "00.2",
        "sum and mean",
        truth=_sum_and_mean_by_loops,
        inputs=_padded,
        mistakes=(
            Mistake("padding is counted in the sum: only the first `lengths` entries of a row are real.",
                    lambda token_logps, lengths: (token_logps.sum(1), token_logps.sum(1) / lengths)),
            Mistake("padding is counted in both: only the first `lengths` entries of a row are real.",
                    lambda token_logps, lengths: (token_logps.sum(1), token_logps.mean(1))),
            Mistake("the mean divides by the width of the padded row: divide by the length of the response.",
                    _with_mask(lambda x, n, s: (s, s / x.shape[1]))),
            Mistake("the last token of each response is left out: `lengths` counts it.",
                    lambda token_logps, lengths: _sum_and_mean_by_loops(token_logps, lengths - 1)),
            Mistake("one token too many is counted: positions 0 to length - 1 are the response.",
                    lambda token_logps, lengths: _sum_and_mean_by_loops(token_logps, lengths + 1)),
            Mistake("the order: first the sums, then the means.", _with_mask(lambda x, n, s: (s / n, s))),
            Mistake("each response is divided by the same number, the mean length: divide each by its own.",
                    _with_mask(lambda x, n, s: (s, s / n.double().mean()))),
        ),
        praise="A sum over n tokens is n times the mean, so sums punish length; each loss must say which it uses.",
    ),
    Exercise(
        "00.3",
        "KL of two coins",
        truth=_coin_kl,
        inputs=_coins,
        mistakes=(
            Mistake("this is KL(reference || policy): weigh the log-ratios with the policy's probabilities.",
                    _of_faces(lambda p, q: q * math.log(q / p))),
            Mistake("the sign: the log-ratio is log policy minus log reference, and a KL is never negative.",
                    _of_faces(lambda p, q: -p * math.log(p / q))),
            Mistake("tails are forgotten: the expectation runs over both faces.",
                    _of_faces(lambda p, q: p * math.log(p / q), both=False)),
            Mistake("the weights are the reference's: samples come from the policy.",
                    _of_faces(lambda p, q: q * math.log(p / q))),
            Mistake("the log-ratios are added without weights: each face counts with the policy's probability.",
                    _of_faces(lambda p, q: math.log(p / q))),
            Mistake("this is in bits: use the natural logarithm, which gives nats.",
                    _of_faces(lambda p, q: p * math.log2(p / q))),
            Mistake("this is the cross-entropy: subtract the policy's own entropy, i.e. use the log of the ratio.",
                    _of_faces(lambda p, q: -p * math.log(q))),
        ),
        praise="KL is 0 only where the coins agree, and which of the two comes first matters.",
    ),
    Exercise(
        "00.4",
        "predict Best-of-4",
        truth=_some_positive,
        mistakes=(
            Mistake("this is the chance of a single sample: four tries make a positive one likelier.", 0.4),
            Mistake("this is the chance that all four are positive: one is enough.", 0.4**4),
            Mistake("this is the chance that none is positive: you want the opposite.", 0.6**4),
            Mistake("this is the chance that at least one is negative: exchange the two.", 1 - 0.4**4),
            Mistake("chances of tries do not add up: 4 times 0.4 is more than 1.", 1.6),
            Mistake("a chance cannot be 1 here: all four can be negative.", 1.0),
            Mistake("give a probability between 0 and 1, not percent.", 100 * (1 - 0.6**4)),
        ),
        praise="Best-of-N needs no training at all; it pays with N samples for each answer.",
        tolerance=1.5e-3,
    ),
    Exercise(
        "00.5",
        "find the bug",
        truth=_best_by_loops,
        inputs=_rewards,
        mistakes=(
            Mistake("still the bug: the maximum runs over the prompts. Each prompt must choose among its own samples.",
                    lambda rewards: rewards.max(dim=0).values.mean()),
            Mistake("this is the best reward of all: each prompt has a best of its own, and you want their mean.",
                    lambda rewards: rewards.max()),
            Mistake("this is the mean of all samples: nothing is chosen.", lambda rewards: rewards.mean()),
            Mistake("this is the best prompt's mean: choose first, then take the mean over the prompts.",
                    lambda rewards: rewards.mean(dim=1).max()),
            Mistake("this chooses the worst sample of each prompt.", lambda rewards: rewards.min(dim=1).values.mean()),
            Mistake("this is the mean of each sample number first: choose within a prompt.",
                    lambda rewards: rewards.mean(dim=0).max()),
            Mistake("one value a prompt is right so far: return their mean, one number.",
                    lambda rewards: rewards.max(dim=1).values),
            Mistake("this is the sum over the prompts: take the mean.", lambda rewards: rewards.max(dim=1).values.sum()),
        ),
        praise="A number that is too good is the best reason to look at an axis.",
    ),
]  # fmt: skip
