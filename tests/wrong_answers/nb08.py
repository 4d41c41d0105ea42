"""Answers to the exercises of notebook 08 as students write them."""

import numpy as np
import pandas as pd
import torch

WRONG, RIGHT = {}, {}

# --- 08.1 two rankings of the same pairs ---


def contingency(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths
):
    reward = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps) > 0
    likelihood = chosen_logps / chosen_lengths > rejected_logps / rejected_lengths
    return torch.tensor(
        [
            [(reward & likelihood).sum(), (reward & ~likelihood).sum()],
            [(~reward & likelihood).sum(), (~reward & ~likelihood).sum()],
        ]
    )


def contingency_numpy(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths
):
    row = np.where(chosen_logps - ref_chosen_logps > rejected_logps - ref_rejected_logps, 0, 1)
    column = np.where(chosen_logps / chosen_lengths > rejected_logps / rejected_lengths, 0, 1)
    table = np.zeros((2, 2))
    np.add.at(table, (row, column), 1)
    return table


def ranked(reward, likelihood, ahead=torch.gt):
    """reward(s, rho, n), likelihood(s, rho, n)."""

    def answer(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths
    ):
        w, l = (
            (chosen_logps, ref_chosen_logps, chosen_lengths),
            (rejected_logps, ref_rejected_logps, rejected_lengths),
        )
        r, q = ahead(reward(*w), reward(*l)), ahead(likelihood(*w), likelihood(*l))
        table = torch.zeros(2, 2)
        for i in range(len(r)):
            table[0 if r[i] else 1, 0 if q[i] else 1] += 1
        return table

    return answer


ratio, mean = (lambda s, r, n: s - r), (lambda s, r, n: s / n)
RIGHT["08.1"] = [contingency, contingency_numpy, ranked(ratio, mean)]
WRONG["08.1"] = [
    (ranked(ratio, lambda s, r, n: s), "by sums"),
    (ranked(lambda s, r, n: s, mean), "reference is missing"),
    (ranked(lambda s, r, n: (s - r) / n, mean), "divided by the length"),
    (ranked(ratio, lambda s, r, n: (s - r) / n), "knows the policy alone"),
    (ranked(lambda s, r, n: r - s, mean), "upside down"),
    (ranked(ratio, lambda s, r, n: s * n), "a mean divides"),
    (lambda **given: contingency(**given).T, "exchanged"),
    (lambda **given: contingency(**given).flip(0), "row of right rewards"),
    (lambda **given: contingency(**given).flip(1), "column of right likelihoods"),
    (ranked(ratio, mean, torch.ge), "a tie"),
    (lambda **given: contingency(**given) / contingency(**given).sum(), "shares"),
    (lambda **given: contingency(**given).flatten(), "shape"),
    (lambda **given: contingency(**given)[0, 1] / contingency(**given)[0].sum(), "shape"),
]

# --- 08.2 is the difference real? ---


def interval(right_a, right_b, prompt):
    d = right_a.astype(float) - right_b
    means = np.array([d[prompt == p].mean() for p in np.unique(prompt)])
    error = means.std(ddof=1) / np.sqrt(len(means))
    return means.mean(), means.mean() - 1.96 * error, means.mean() + 1.96 * error


def interval_pandas(right_a, right_b, prompt):
    means = pd.Series(right_a.astype(int) - right_b.astype(int)).groupby(prompt).mean()
    return [means.mean() + z * means.sem() for z in (0, -1.96, 1.96)]


def interval_of(change):
    """change(per-prompt means) -> (values, z, ddof, divide by the root)."""

    def answer(right_a, right_b, prompt):
        d = right_a.astype(float) - right_b
        means = np.array([d[prompt == p].mean() for p in np.unique(prompt)])
        values, z, ddof, root = change(means)
        error = values.std(ddof=ddof) / (np.sqrt(len(values)) if root else 1)
        return values.mean(), values.mean() - z * error, values.mean() + z * error

    return answer


def interval_pairs(right_a, right_b, prompt):
    d = right_a.astype(float) - right_b
    error = d.std(ddof=1) / np.sqrt(len(d))
    return d.mean(), d.mean() - 1.96 * error, d.mean() + 1.96 * error


def interval_unpaired(right_a, right_b, prompt):
    a, b = (
        np.array([x[prompt == p].mean() for p in np.unique(prompt)]) for x in (right_a * 1.0, right_b * 1.0)
    )
    error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    gap = a.mean() - b.mean()
    return gap, gap - 1.96 * error, gap + 1.96 * error


RIGHT["08.2"] = [interval, interval_pandas]
WRONG["08.2"] = [
    (interval_pairs, "not independent"),
    (interval_unpaired, "take differences first"),
    (interval_of(lambda m: (-m, 1.96, 1, True)), "a minus b"),
    (interval_of(lambda m: (100 * m, 1.96, 1, True)), "percent"),
    (interval_of(lambda m: (m, 1, 1, True)), "no 95 %"),
    (interval_of(lambda m: (m, 1.96, 0, True)), "n - 1"),
    (interval_of(lambda m: (m, 1.96, 1, False)), "root of the number"),
    (lambda **given: interval(**given)[0], "3 things"),
    (lambda **given: interval(**given)[1:], "3 things"),
    (lambda right_a, right_b, prompt: (right_a - right_b).mean(), "stopped with TypeError"),
]

# --- 08.3 what beta does to the KL ---

RIGHT["08.3"] = [{"dpo": "B", "simpo": "C"}, {"simpo": "c", "dpo": " b"}]
WRONG["08.3"] = [
    ({"dpo": "A", "simpo": "C"}, "higher price"),
    ({"dpo": "B", "simpo": "B"}, "none of its numbers"),
    ({"dpo": "B", "simpo": "A"}, "promise a direction"),
    ({"dpo": "C", "simpo": "C"}, "simpo that promises nothing"),
    ({"dpo": "C", "simpo": "B"}, "exchanged"),
    ({"dpo": "A", "simpo": "A"}, "is not it"),
    ({"dpo": "B"}, "dict"),
    ("B", "dict"),
]

# --- 08.4 passes to pay for ---


def saved(plain=1 / 4, one_epoch=1 / 4, three_epochs=1 / 10):
    return {"plain": plain, "one_epoch": one_epoch, "three_epochs": three_epochs}


RIGHT["08.4"] = [saved(), saved(0.25, 0.25, 0.1)]
WRONG["08.4"] = [
    (saved(1 / 3, 1 / 3, 1 / 9), "not of SimPO's"),
    (saved(plain=0.5), "only the policy has one"),
    (saved(plain=1 / 6), "no backward pass"),
    (saved(one_epoch=0), "what one epoch does anyway"),
    (saved(three_epochs=0.25), "one reference pass a batch"),
    (saved(three_epochs=0), "is not free"),
    (saved(0.75, 0.75, 0.9), "what is left"),
    (saved(25, 25, 10), "should be"),
    (0.25, "dict"),
]

# --- 08.6 four broken measurements ---

RIGHT["08.6"] = [{1: "C", 2: "A", 3: "D", 4: "B"}, {4: "b", 3: "d", 2: "a", 1: "c "}]
WRONG["08.6"] = [
    ({1: "C", 2: "B", 3: "D", 4: "A"}, "A and B"),
    ({1: "A", 2: "C", 3: "D", 4: "B"}, "A and C"),
    ({1: "C", 2: "D", 3: "A", 4: "B"}, "A and D"),
    ({1: "B", 2: "A", 3: "D", 4: "C"}, "B and C"),
    ({1: "C", 2: "A", 3: "B", 4: "D"}, "B and D"),
    ({1: "D", 2: "A", 3: "C", 4: "B"}, "C and D"),
    ({1: "A", 2: "B", 3: "C", 4: "D"}, "is not it"),
    ({"A": 2}, "dict"),
]
