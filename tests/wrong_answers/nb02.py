"""Answers to the exercises of notebook 02 as students write them."""

import collections

import numpy as np
import torch
import torch.nn.functional as F

WRONG, RIGHT = {}, {}


# --- 02.1 ---


def kappa_counter(first, second):
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second)) / n
    one, two = collections.Counter(first), collections.Counter(second)
    expected = sum(one[label] * two[label] for label in one) / n**2
    return (observed - expected) / (1 - expected)


def kappa_numpy(first, second):
    first, second = np.array(first), np.array(second)
    observed = (first == second).mean()
    expected = sum((first == label).mean() * (second == label).mean() for label in np.unique([first, second]))
    return 1 - (1 - observed) / (1 - expected)


def kappa_table(first, second):
    labels = sorted(set(first) | set(second))
    table = torch.zeros(len(labels), len(labels), dtype=torch.float64)
    for a, b in zip(first, second):
        table[labels.index(a), labels.index(b)] += 1
    table /= table.sum()
    expected = (table.sum(0) * table.sum(1)).sum()
    return (table.diagonal().sum() - expected) / (1 - expected)


def agreement_only(first, second):
    return sum(a == b for a, b in zip(first, second)) / len(first)


def agreement_in_percent(first, second):
    return 100 * kappa_counter(first, second)


def chance_only(first, second):
    one, two = collections.Counter(first), collections.Counter(second)
    return sum(one[label] * two[label] for label in one) / len(first) ** 2


def uniform_chance(first, second):
    expected = 1 / len(set(first + second))
    return (agreement_only(first, second) - expected) / (1 - expected)


def half_chance(first, second):
    return (agreement_only(first, second) - 0.5) / 0.5


def scotts_pi(first, second):
    pooled = collections.Counter(first + second)
    expected = sum((count / (2 * len(first))) ** 2 for count in pooled.values())
    return (agreement_only(first, second) - expected) / (1 - expected)


def first_person_twice(first, second):
    expected = sum((count / len(first)) ** 2 for count in collections.Counter(first).values())
    return (agreement_only(first, second) - expected) / (1 - expected)


def not_divided(first, second):
    return agreement_only(first, second) - chance_only(first, second)


def divided_by_observed(first, second):
    observed, expected = agreement_only(first, second), chance_only(first, second)
    return (observed - expected) / (1 - observed)


def expected_minus_observed(first, second):
    observed, expected = agreement_only(first, second), chance_only(first, second)
    return (expected - observed) / (1 - expected)


def ties_dropped(first, second):
    kept = [(a, b) for a, b in zip(first, second) if "tie" not in (a, b)]
    return kappa_counter(*map(list, zip(*kept)))


WRONG["02.1"] = [
    (agreement_only, "observed agreement"),
    (chance_only, "chance alone"),
    (uniform_chance, "one over the number of labels"),
    (scotts_pi, "scott's pi"),
    (not_divided, "not yet divided"),
    (divided_by_observed, "the denominator has the observed"),
    (expected_minus_observed, "sign"),
    (agreement_in_percent, "should be"),
    (half_chance, "should be"),
    (first_person_twice, "should be"),
    (ties_dropped, "should be"),
]
RIGHT["02.1"] = [kappa_counter, kappa_numpy, kappa_table]


# --- 02.2 ---


def pair_logsigmoid(chosen_rewards, rejected_rewards):
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


def pair_softplus(chosen_rewards, rejected_rewards):
    return F.softplus(rejected_rewards - chosen_rewards, threshold=100)


def pair_logaddexp(chosen_rewards, rejected_rewards):
    return torch.logaddexp(chosen_rewards, rejected_rewards) - chosen_rewards


def pair_cross_entropy(chosen_rewards, rejected_rewards):
    logits = chosen_rewards - rejected_rewards
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="none")


def pair_swapped(chosen_rewards, rejected_rewards):
    return -F.logsigmoid(rejected_rewards - chosen_rewards)


def pair_no_minus(chosen_rewards, rejected_rewards):
    return F.logsigmoid(chosen_rewards - rejected_rewards)


def pair_no_log(chosen_rewards, rejected_rewards):
    return torch.sigmoid(chosen_rewards - rejected_rewards)


def pair_minus_no_log(chosen_rewards, rejected_rewards):
    return -torch.sigmoid(chosen_rewards - rejected_rewards)


def pair_one_minus(chosen_rewards, rejected_rewards):
    return 1 - torch.sigmoid(chosen_rewards - rejected_rewards)


def pair_mean(chosen_rewards, rejected_rewards):
    return -F.logsigmoid(chosen_rewards - rejected_rewards).mean()


def pair_sum(chosen_rewards, rejected_rewards):
    return -F.logsigmoid(chosen_rewards - rejected_rewards).sum()


def pair_hinge(chosen_rewards, rejected_rewards):
    return torch.clamp(1 - (chosen_rewards - rejected_rewards), min=0)


def pair_linear(chosen_rewards, rejected_rewards):
    return rejected_rewards - chosen_rewards


def pair_naive(chosen_rewards, rejected_rewards):
    return -(1 / (1 + torch.exp(-(chosen_rewards - rejected_rewards)))).log()


def pair_log_sigmoid_apart(chosen_rewards, rejected_rewards):
    return -torch.log(torch.sigmoid(chosen_rewards - rejected_rewards))


def pair_exponentials(chosen_rewards, rejected_rewards):
    winner, loser = torch.exp(chosen_rewards), torch.exp(rejected_rewards)
    return -torch.log(winner / (winner + loser))


def pair_log1p_exp(chosen_rewards, rejected_rewards):
    return torch.log1p(torch.exp(rejected_rewards - chosen_rewards))


def pair_of_sigmoids(chosen_rewards, rejected_rewards):
    return -(torch.sigmoid(chosen_rewards) - torch.sigmoid(rejected_rewards))


def pair_detached(chosen_rewards, rejected_rewards):
    return -F.logsigmoid(chosen_rewards - rejected_rewards.detach())


def pair_clamped(chosen_rewards, rejected_rewards):
    return -torch.log(torch.sigmoid(chosen_rewards - rejected_rewards).clamp(min=1e-8))


def pair_base_two(chosen_rewards, rejected_rewards):
    return -F.logsigmoid(chosen_rewards - rejected_rewards) / np.log(2)


WRONG["02.2"] = [
    (pair_swapped, "wrong way round"),
    (pair_no_minus, "minus is missing"),
    (pair_no_log, "minus its logarithm"),
    (pair_minus_no_log, "minus its logarithm"),
    (pair_one_minus, "one minus the probability"),
    (pair_mean, "their mean"),
    (pair_sum, "their sum"),
    (pair_hinge, "hinge"),
    (pair_linear, "linear"),
    (pair_naive, "not finite"),
    (pair_log_sigmoid_apart, "not finite"),
    (pair_exponentials, "overflows"),
    (pair_log1p_exp, "not finite"),
    (pair_of_sigmoids, "should be"),
    (pair_detached, "detached"),
    (pair_clamped, "should be"),
    (pair_base_two, "should be"),
]
RIGHT["02.2"] = [pair_logsigmoid, pair_softplus, pair_logaddexp, pair_cross_entropy]


# --- 02.3 ---


def ranking_triangle(rewards):
    k = rewards.shape[1]
    i, j = torch.triu_indices(k, k, offset=1)
    return -F.logsigmoid(rewards[:, i] - rewards[:, j]).mean(1)


def ranking_table(rewards):
    k = rewards.shape[1]
    losses = -F.logsigmoid(rewards[:, :, None] - rewards[:, None, :])
    return (losses * torch.ones(k, k).triu(1)).sum((1, 2)) / (k * (k - 1) / 2)


def ranking_loop(rewards):
    batch, k = rewards.shape
    total = torch.zeros(batch, dtype=rewards.dtype)
    for i in range(k - 1):
        total = total - F.logsigmoid(rewards[:, i : i + 1] - rewards[:, i + 1 :]).sum(1)
    return 2 * total / k / (k - 1)


def pairs_of(rewards):
    k = rewards.shape[1]
    i, j = torch.triu_indices(k, k, offset=1)
    return -F.logsigmoid(rewards[:, i] - rewards[:, j])


def ranking_diagonal(rewards):
    k = rewards.shape[1]
    i, j = torch.triu_indices(k, k)
    return -F.logsigmoid(rewards[:, i] - rewards[:, j]).mean(1)


def ranking_both_orders(rewards):
    k = rewards.shape[1]
    losses = -F.logsigmoid(rewards[:, :, None] - rewards[:, None, :])
    return losses[:, ~torch.eye(k, dtype=bool)].mean(1)


def ranking_whole_table(rewards):
    return -F.logsigmoid(rewards[:, :, None] - rewards[:, None, :]).mean((1, 2))


def ranking_plackett_luce(rewards):
    return (rewards.flip(1).logcumsumexp(1).flip(1) - rewards).sum(1)


WRONG["02.3"] = [
    (lambda rewards: pairs_of(rewards).sum(1), "sums over the pairs"),
    (lambda rewards: pairs_of(rewards).sum(1) / rewards.shape[1], "divided by k;"),
    (lambda rewards: pairs_of(rewards).sum(1) / rewards.shape[1] ** 2, "k squared"),
    (lambda rewards: pairs_of(rewards).sum(1) / rewards.shape[1] / (rewards.shape[1] - 1), "counts each pair twice"),
    (lambda rewards: -F.logsigmoid(rewards[:, :-1] - rewards[:, 1:]).mean(1), "neighbours"),
    (lambda rewards: -F.logsigmoid(rewards[:, :1] - rewards[:, 1:]).mean(1), "only the best"),
    (lambda rewards: -F.logsigmoid(rewards[:, :1] - rewards[:, -1:]).mean(1), "should be"),
    (lambda rewards: ranking_triangle(rewards.flip(1)), "worst stands first"),
    (ranking_both_orders, "both orders"),
    (ranking_whole_table, "should be"),
    (ranking_diagonal, "with themselves"),
    (lambda rewards: pairs_of(rewards).mean(), "one number for the batch"),
    (ranking_plackett_luce, "plackett"),
    (lambda rewards: -pairs_of(rewards).mean(1), "minus is missing"),
    (lambda rewards: ranking_triangle(rewards.T), "shape"),
    (lambda rewards: ranking_triangle(rewards.detach()), "detached"),
    (lambda rewards: ranking_triangle(rewards.sort(descending=True).values), "should be"),
]  # fmt: skip
RIGHT["02.3"] = [ranking_triangle, ranking_table, ranking_loop]


# --- 02.4, 02.6: values ---

WRONG["02.4"] = [
    (0.68, "is missing"),
    (0.8, "share of right labels"),
    (0.85, "against the truth"),
    (0.65, "do not subtract"),
    (0.29, "disagreements"),
    (71, "not percent"),
    (0.75, "should be"),
]
RIGHT["02.4"] = [0.71, 0.85 * 0.8 + 0.15 * 0.2, 0.5 + 2 * 0.35 * 0.3]

WRONG["02.6"] = [("b", "never saw"), ("C", "other ones"), ("too sure", "is not it"), (1, "text")]
RIGHT["02.6"] = ["a", " A "]


# --- 02.5 ---


def read_gather(token_rewards, attention_mask):
    last = attention_mask.sum(1, keepdim=True) - 1
    return token_rewards.gather(1, last)[:, 0]


def read_index(token_rewards, attention_mask):
    return token_rewards[torch.arange(len(token_rewards)), attention_mask.sum(1) - 1]


def read_one_hot(token_rewards, attention_mask):
    following = torch.cat([attention_mask[:, 1:], torch.zeros_like(attention_mask[:, :1])], 1)
    return (token_rewards * (attention_mask - following)).sum(1)


def read_last_true(token_rewards, attention_mask):
    places = torch.arange(attention_mask.shape[1])
    return token_rewards.gather(1, (attention_mask * places).argmax(1)[:, None]).squeeze(1)


def read_past_the_end(token_rewards, attention_mask):
    last = attention_mask.sum(1)
    return token_rewards[torch.arange(len(last)), last.clamp(max=token_rewards.shape[1] - 1)]


def read_first_mask(token_rewards, attention_mask):
    return token_rewards.gather(1, attention_mask.argmax(1)[:, None])[:, 0]


def read_longest(token_rewards, attention_mask):
    return token_rewards[:, attention_mask.sum(1).max() - 1]


WRONG["02.5"] = [
    (lambda token_rewards, attention_mask: token_rewards[:, -1], "last column"),
    (read_past_the_end, "one place past"),
    (
        lambda token_rewards, attention_mask: token_rewards[range(len(token_rewards)), attention_mask.sum(1) - 2],
        "before the last",
    ),
    (read_first_mask, "first token"),
    (lambda token_rewards, attention_mask: (token_rewards * attention_mask).sum(1) / attention_mask.sum(1), "mean"),
    (lambda token_rewards, attention_mask: token_rewards.mean(1), "should be"),
    (lambda token_rewards, attention_mask: (token_rewards * attention_mask).sum(1), "sum over"),
    (lambda token_rewards, attention_mask: (token_rewards * attention_mask)[:, -1], "still reads it"),
    (
        lambda token_rewards, attention_mask: token_rewards.masked_fill(~attention_mask.bool(), -1e9).amax(1),
        "largest",
    ),
    (
        lambda token_rewards, attention_mask: token_rewards.gather(1, attention_mask.sum(1, keepdim=True) - 1),
        "(batch,)",
    ),
    (lambda token_rewards, attention_mask: token_rewards[:, attention_mask.sum(1) - 1], "row by row"),
    (read_longest, "should be"),
    (lambda token_rewards, attention_mask: read_index(token_rewards.detach(), attention_mask), "detached"),
]  # fmt: skip
RIGHT["02.5"] = [read_gather, read_index, read_one_hot, read_last_true]
