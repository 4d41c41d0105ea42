"""Exercises of notebook 02, reward modelling."""

import itertools
import math

import numpy as np
import torch

from . import Exercise, Mistake

# --- 02.1 Cohen's kappa ---


def _two_labelers(rng):
    """Two people with habits of their own: how often each says A, B or tie differs."""
    items = int(rng.integers(24, 40))
    first = rng.choice(["A", "B", "tie"], items, p=[0.6, 0.3, 0.1])
    second = np.where(
        rng.random(items) < 0.5, first, rng.choice(["A", "B", "tie"], items, p=[0.25, 0.45, 0.3])
    )
    return {"first": first.tolist(), "second": second.tolist()}


def _agreement(first, second):
    return float(np.mean([a == b for a, b in zip(first, second, strict=True)]))


def _by_chance(first, second):
    """Every label of one against every label of the other: how often do two random ones agree?"""
    return float(np.mean([a == b for a, b in itertools.product(first, second)]))


def _kappa(first, second, chance=_by_chance):
    expected = chance(first, second)
    return (_agreement(first, second) - expected) / (1 - expected)


def _pooled(first, second):
    both = [*first, *second]
    return _by_chance(both, both)


# --- 02.2, 02.3 losses ---


def _rewards_of_pairs(rng):
    chosen, rejected = rng.normal(0, 2, (2, 8))
    rejected[3] = chosen[3] + 1000  # a pair that the model has very wrong
    chosen[4], rejected[4] = 2001.5, 2000.0  # only the difference matters
    return {
        name: torch.tensor(x).requires_grad_()
        for name, x in (("chosen_rewards", chosen), ("rejected_rewards", rejected))
    }


def _pair_truth(chosen_rewards, rejected_rewards):
    """Two classes with these logits, the first is right."""
    return -torch.stack([chosen_rewards, rejected_rewards]).log_softmax(0)[0]


def _from_gap(function):
    return lambda chosen_rewards, rejected_rewards: function(chosen_rewards - rejected_rewards)


_FINITE = (
    "right for small differences, but not finite for large ones: take the log and the sigmoid in one step."
)


def _rankings(rng):
    shape = int(rng.integers(2, 5)), int(rng.integers(5, 8))
    return {"rewards": torch.tensor(rng.normal(0, 2, shape)).requires_grad_()}


def _over(pairs_of):
    """The mean loss over the pairs (i, j), i better, that `pairs_of(K)` lists: (batch,)."""

    def loss(rewards):
        rows = []
        for row in rewards:
            terms = [torch.log(1 + torch.exp(row[j] - row[i])) for i, j in pairs_of(len(row))]
            rows.append(sum(terms) / len(terms))
        return torch.stack(rows)

    return loss


_ranking_truth = _over(lambda k: [(i, j) for i in range(k) for j in range(i + 1, k)])


def _times(function, factor_of):
    return lambda rewards: function(rewards) * factor_of(rewards.shape[1])


# --- 02.5 where the reward is read ---


def _scored_tokens(rng):
    """Right-padded rows of different lengths, none of the full width; padding positions hold numbers too."""
    lengths = rng.integers(3, 9, 6)
    time = 11
    mask = torch.tensor(np.arange(time) < lengths[:, None]).long()
    return {
        "token_rewards": torch.tensor(rng.normal(0, 2, (6, time))).requires_grad_(),
        "attention_mask": mask,
    }


def _read_by_loop(token_rewards, attention_mask):
    rows = []
    for rewards, mask in zip(token_rewards, attention_mask, strict=True):
        place = max(t for t in range(len(mask)) if mask[t] == 1)
        rows.append(rewards[place])
    return torch.stack(rows)


def _at(offset):
    def read(token_rewards, attention_mask):
        place = attention_mask.sum(1) + offset
        return token_rewards[torch.arange(len(place)), place]

    return read


def _measured_accuracy():
    """Every case: the model right or wrong, the label right or wrong; they agree if both are or neither is."""
    cases = itertools.product((0.85, 0.15), (0.8, 0.2))
    return math.fsum(m * label for (m, label) in cases if (m > 0.5) == (label > 0.5))


EXERCISES = [
    Exercise(
        "02.1",
        "Cohen's kappa",
        truth=_kappa,
        inputs=_two_labelers,
        mistakes=(
            Mistake("this is the observed agreement; what chance alone would give is not taken off.", _agreement),
            Mistake("this is the agreement by chance alone, not kappa.", _by_chance),
            Mistake(
                "chance is not one over the number of labels: each person has frequencies of their own.",
                lambda first, second: _kappa(first, second, lambda a, b: 1 / len({*a, *b})),
            ),
            Mistake(
                "the labels of both people are thrown together before chance is worked out: that is Scott's pi.",
                lambda first, second: _kappa(first, second, _pooled),
            ),
            Mistake(
                "observed minus expected is right; it is not yet divided by the most that it could be.",
                lambda first, second: _agreement(first, second) - _by_chance(first, second),
            ),
            Mistake(
                "the denominator has the observed agreement where the expected one belongs.",
                lambda first, second: (
                    (_agreement(first, second) - _by_chance(first, second)) / (1 - _agreement(first, second))
                ),
            ),
            Mistake("the sign is turned round: more agreement must give more.", lambda first, second: -_kappa(first, second)),
        ),
        praise="0 is what two people who do not read would reach, 1 is perfect agreement.",
    ),
    Exercise(
        "02.2",
        "the Bradley-Terry loss",
        truth=_pair_truth,
        inputs=_rewards_of_pairs,
        mistakes=(
            Mistake(
                "chosen and rejected are the wrong way round: the loss must fall when the chosen reward grows.",
                _from_gap(lambda gap: -torch.nn.functional.logsigmoid(-gap)),
            ),
            Mistake("the minus is missing: this is the log-likelihood.", _from_gap(torch.nn.functional.logsigmoid)),
            Mistake("this is a probability; the loss is minus its logarithm.", _from_gap(torch.sigmoid)),
            Mistake("one minus the probability is not minus its logarithm.", _from_gap(lambda gap: 1 - torch.sigmoid(gap))),
            Mistake("minus the probability is not minus its logarithm.", _from_gap(lambda gap: -torch.sigmoid(gap))),
            Mistake(
                "one loss for each pair is asked for, and this is their mean.",
                _from_gap(lambda gap: -torch.nn.functional.logsigmoid(gap).mean()),
            ),
            Mistake(
                "one loss for each pair is asked for, and this is their sum.",
                _from_gap(lambda gap: -torch.nn.functional.logsigmoid(gap).sum()),
            ),
            Mistake("this is a hinge, which is 0 beyond its margin; here no margin is enough.", _from_gap(lambda gap: torch.relu(1 - gap))),
            Mistake("this is linear in the difference: the sigmoid and its logarithm are missing.", _from_gap(lambda gap: -gap)),
            Mistake(_FINITE, _from_gap(lambda gap: -torch.log(torch.sigmoid(gap)))),
            Mistake(
                "e to the reward overflows: use that only the difference matters.",
                lambda chosen_rewards, rejected_rewards: (
                    -torch.log(chosen_rewards.exp() / (chosen_rewards.exp() + rejected_rewards.exp()))
                ),
            ),
        ),
        praise="Equal rewards cost ln 2 = 0.693, the loss of a model that knows nothing.",
    ),
    Exercise(
        "02.3",
        "the loss of a ranking",
        truth=_ranking_truth,
        inputs=_rankings,
        mistakes=(
            Mistake("these are the sums over the pairs; the mean divides by K(K-1)/2.", _times(_ranking_truth, lambda k: k * (k - 1) / 2)),
            Mistake("the sum over the pairs is divided by K; there are K(K-1)/2 pairs.", _times(_ranking_truth, lambda k: (k - 1) / 2)),
            Mistake("the sum is divided by K squared; there are K(K-1)/2 pairs.", _times(_ranking_truth, lambda k: (k - 1) / (2 * k))),
            Mistake(
                "the sum is divided by K(K-1): that counts each pair twice, but it was summed once.",
                _times(_ranking_truth, lambda k: 0.5),
            ),
            Mistake("only neighbours in the ranking are compared; all pairs count.", _over(lambda k: [(i, i + 1) for i in range(k - 1)])),
            Mistake("only the best one is compared with the others; all pairs count.", _over(lambda k: [(0, j) for j in range(1, k)])),
            Mistake("the worst stands first here: best first is asked for.", _over(lambda k: [(j, i) for i in range(k) for j in range(i + 1, k)])),
            Mistake(
                "each pair is taken in both orders, so that nothing can be learned from it.",
                _over(lambda k: [(i, j) for i in range(k) for j in range(k) if i != j]),
            ),
            Mistake(
                "responses are compared with themselves too: leave the diagonal out.",
                _over(lambda k: [(i, j) for i in range(k) for j in range(i, k)]),
            ),
            Mistake("one loss for each ranking is asked for, and this is one number for the batch.", lambda rewards: _ranking_truth(rewards).mean()),
            Mistake(
                "this is the likelihood of the whole order (Plackett and Luce), not the mean over the pairs.",
                lambda rewards: torch.stack(
                    [-sum(row[i:].log_softmax(0)[0] for i in range(len(row))) for row in rewards]
                ),
            ),
            Mistake("the minus is missing: this is the mean log-likelihood.", lambda rewards: -_ranking_truth(rewards)),
        ),
        praise="K rewards, one forward pass each, have served K(K-1)/2 comparisons.",
    ),
    Exercise(
        "02.4",
        "accuracy against noisy labels",
        truth=_measured_accuracy,
        tolerance=1e-3,
        mistakes=(
            Mistake("a model that is wrong agrees with a label that is wrong: that case is missing.", 0.85 * 0.8),
            Mistake("this is the share of right labels; the model is not perfect.", 0.8),
            Mistake("this is the accuracy against the truth; it is measured against noisy labels.", 0.85),
            Mistake("shares of errors do not subtract: list the four cases.", 0.85 - 0.2),
            Mistake("this is the share of disagreements; the accuracy is the other part.", 0.29),
            Mistake("give a share between 0 and 1, not percent.", 71.0),
        ),
        praise="So a measured accuracy near the agreement of the labelers is not the mark of a bad reward model.",
    ),
    Exercise(
        "02.5",
        "the reward is read in the wrong place",
        truth=_read_by_loop,
        inputs=_scored_tokens,
        mistakes=(
            Mistake(
                "this reads the last column: for every shorter text that is padding.",
                lambda token_rewards, attention_mask: token_rewards[:, -1],
            ),
            Mistake("this reads one place past the last token: places count from 0.", _at(0)),
            Mistake("this reads the token before the last one; EOS is a token and counts.", _at(-2)),
            Mistake("this reads the first token, which has seen nothing of the response.", lambda token_rewards, attention_mask: token_rewards[:, 0]),
            Mistake(
                "this is the mean over the tokens; the reward is read at one of them.",
                lambda token_rewards, attention_mask: (token_rewards * attention_mask).sum(1) / attention_mask.sum(1),
            ),
            Mistake(
                "this is the sum over the tokens; the reward is read at one of them.",
                lambda token_rewards, attention_mask: (token_rewards * attention_mask).sum(1),
            ),
            Mistake(
                "this sets the padding to 0 and then still reads it.",
                lambda token_rewards, attention_mask: (token_rewards * attention_mask)[:, -1],
            ),
            Mistake(
                "this is the largest reward of the real tokens, not that of the last one.",
                lambda token_rewards, attention_mask: token_rewards.masked_fill(attention_mask == 0, -torch.inf).max(1).values,
            ),
            Mistake(
                "the shape should be (batch,): take one number a row.",
                lambda token_rewards, attention_mask: _read_by_loop(token_rewards, attention_mask)[:, None],
            ),
            Mistake(
                "every row is read at every row's last place: the result is a (batch, batch) table, index row by row.",
                lambda token_rewards, attention_mask: token_rewards[:, attention_mask.sum(1) - 1],
            ),
        ),
        praise="A text's reward no longer depends on the texts beside it in the batch.",
    ),
    Exercise(
        "02.6",
        "sure of noisy labels",
        truth=lambda: "a",
        mistakes=(
            Mistake("it never saw two people disagree: what could have taught it to be modest?", "b"),
            Mistake("it fits the labels that it was trained on; these are other ones, with more noise.", "c"),
        ),
        praise="The noise of the labels sets the scale of the rewards.",
    ),
]  # fmt: skip
