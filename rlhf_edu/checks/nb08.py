"""Exercises of notebook 08, SimPO against DPO."""

import itertools
import math

import numpy as np
import torch

from . import Exercise, Mistake
from .truths08 import BROKEN, found_by_symptoms

# --- 08.1: the contingency table ---


def _table_inputs(rng, pairs=30):
    lengths = lambda: torch.tensor(rng.integers(3, 30, pairs))
    logps = lambda: torch.tensor(rng.normal(-30, 10, pairs))
    given = {
        "chosen_logps": logps(),
        "rejected_logps": logps(),
        "ref_chosen_logps": torch.tensor(rng.normal(-30, 10, pairs)),
        "ref_rejected_logps": torch.tensor(rng.normal(-30, 10, pairs)),
        "chosen_lengths": lengths(),
        "rejected_lengths": lengths(),
    }
    for name in ("chosen", "rejected"):  # the last pair is a tie in both
        given[f"{name}_logps"][-1], given[f"ref_{name}_logps"][-1] = -12.0, -12.0
        given[f"{name}_lengths"][-1] = 6
    return given


def _table_by_counting(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths
):
    counts = [[0, 0], [0, 0]]
    columns = (
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_lengths,
        rejected_lengths,
    )
    for w, l, rw, rl, n, m in zip(*(c.tolist() for c in columns), strict=True):
        counts[0 if w - rw > l - rl else 1][0 if w * m > l * n else 1] += 1  # w / n > l / m, multiplied out
    return np.array(counts)


def _table(reward=lambda s, r, n: s - r, likelihood=lambda s, r, n: s / n, after=lambda t: t, strict=True):
    """A wrong table from what it takes for the reward and the likelihood of (sum, reference, length)."""

    def answer(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths
    ):
        w, l = (
            (chosen_logps, ref_chosen_logps, chosen_lengths),
            (rejected_logps, ref_rejected_logps, rejected_lengths),
        )
        ahead = (lambda a, b: a > b) if strict else (lambda a, b: a >= b)
        r, q = ahead(reward(*w), reward(*l)), ahead(likelihood(*w), likelihood(*l))
        return after(torch.stack([torch.stack([(x & y).sum() for y in (q, ~q)]) for x in (r, ~r)]))

    return answer


# --- 08.2: an interval for a difference ---


def _interval_inputs(rng, prompts=25):
    pairs_of = rng.integers(2, 7, prompts)
    prompt = np.repeat(np.arange(prompts), pairs_of)
    shared = rng.uniform(0.2, 0.9, prompts)[prompt]
    first = rng.random(len(prompt)) < np.clip(shared + 0.15, 0, 1)
    second = np.where(rng.random(len(prompt)) < 0.6, first, rng.random(len(prompt)) < shared)
    return {"right_a": first, "right_b": second.astype(bool), "prompt": prompt}


def _interval_by_loop(right_a, right_b, prompt):
    groups = {}
    for a, b, p in zip(right_a.tolist(), right_b.tolist(), prompt.tolist(), strict=True):
        groups.setdefault(p, []).append(int(a) - int(b))
    means = [math.fsum(g) / len(g) for g in groups.values()]
    mean = math.fsum(means) / len(means)
    error = math.sqrt(math.fsum((m - mean) ** 2 for m in means) / (len(means) - 1) / len(means))
    return mean, mean - 1.96 * error, mean + 1.96 * error


def _interval(of=None, z=1.96, ddof=1, root=True, scale=1.0, sign=1, error_of=None):
    """A wrong interval: the values it averages, and how it finds their error."""

    def per_prompt(a, b, p):
        d = a.astype(float) - b.astype(float)
        return np.array([d[p == q].mean() for q in np.unique(p)])

    def answer(right_a, right_b, prompt):
        values = sign * scale * (of or per_prompt)(right_a, right_b, prompt)
        if error_of:
            error = error_of(right_a, right_b, prompt)
        else:
            error = values.std(ddof=ddof) / (len(values) ** 0.5 if root else 1)
        return values.mean(), values.mean() - z * error, values.mean() + z * error

    return answer


def _pairs_alone(a, b, p):
    return a.astype(float) - b.astype(float)


def _unpaired_error(a, b, p):
    each = [[side[p == q].mean() for q in np.unique(p)] for side in (a.astype(float), b.astype(float))]
    return math.hypot(*(np.std(x, ddof=1) / len(x) ** 0.5 for x in each))


# --- 08.3, 08.4 ---


def _cost(plain=0.25, one_epoch=0.25, three_epochs=0.1):
    return {"plain": plain, "one_epoch": one_epoch, "three_epochs": three_epochs}


def _cost_by_counting():
    """Add up the passes of 100 batches: forward 1, backward 2."""

    def passes(epochs, reference):
        total = 0
        for epoch in range(epochs):
            for _ in range(100):
                total += 1 + 2
                total += reference == "always" or (reference == "first" and epoch == 0)
        return total

    saved = lambda epochs, reference: 1 - passes(epochs, None) / passes(epochs, reference)
    return {"plain": saved(3, "always"), "one_epoch": saved(1, "first"), "three_epochs": saved(3, "first")}


# --- 08.6 ---


def _exchanged(first, second):
    other = {first: second, second: first}
    return {number: other.get(letter, letter) for number, letter in BROKEN.items()}


_TELLS = {
    "AB": "whose reward is the same for every response",
    "AC": "one of them flatters, the other says zero",
    "AD": "one of them concerns the samples alone",
    "BC": "one of them leaves the reward accuracy as it is",
    "BD": "one of them leaves the KL as it is",
    "CD": "a KL below zero belongs to one of them",
}

EXERCISES = [
    Exercise(
        "08.1",
        "two rankings of the same pairs",
        truth=_table_by_counting,
        inputs=_table_inputs,
        mistakes=(
            Mistake("the likelihood is ranked by sums here; the page asks for the mean log-prob of a token.", _table(likelihood=lambda s, r, n: s)),
            Mistake("the reference is missing in the reward.", _table(reward=lambda s, r, n: s)),
            Mistake("the reward is divided by the length here; DPO's is not.", _table(reward=lambda s, r, n: (s - r) / n)),
            Mistake("the reference stands in the likelihood as well: that column knows the policy alone.", _table(likelihood=lambda s, r, n: (s - r) / n)),
            Mistake("the ratio stands upside down: policy minus reference.", _table(reward=lambda s, r, n: r - s)),
            Mistake("the lengths multiply; a mean divides.", _table(likelihood=lambda s, r, n: s * n)),
            Mistake("rows and columns are exchanged: the reward decides the row.", _table(after=lambda t: t.T)),
            Mistake("the row of right rewards comes first.", _table(after=lambda t: t.flip(0))),
            Mistake("the column of right likelihoods comes first.", _table(after=lambda t: t.flip(1))),
            Mistake("a tie is not ahead: it belongs to the second row and the second column.", _table(strict=False)),
            Mistake("counts are asked for, and these are shares.", _table(after=lambda t: t.double() / t.sum())),
        ),
        praise="For SimPO both rankings are one and the same, so two of the four cells are empty.",
    ),
    Exercise(
        "08.2",
        "is the difference real?",
        truth=_interval_by_loop,
        inputs=_interval_inputs,
        mistakes=(
            Mistake("pairs of one prompt share responses and are not independent: first one number a prompt.", _interval(of=_pairs_alone)),
            Mistake("the errors of the two methods were combined as if they had seen other pairs: take differences first.", _interval(error_of=_unpaired_error)),
            Mistake("the difference is a minus b.", _interval(sign=-1)),
            Mistake("shares are asked for, and these are percent.", _interval(scale=100)),
            Mistake("one standard error on each side is no 95 % interval.", _interval(z=1.0)),
            Mistake("the page asks for n - 1 in the deviation.", _interval(ddof=0)),
            Mistake("that is the spread of a single prompt: the root of the number of prompts is missing.", _interval(root=False)),
        ),
        praise="Same pairs, same prompts: what is hard for both methods cancels.",
    ),
    Exercise(
        "08.3",
        "what β does to the KL",
        truth=lambda: {"dpo": "B", "simpo": "C"},
        mistakes=(
            Mistake("DPO's β is the price of the KL: what does a higher price do?", {"dpo": "A", "simpo": "C"}),
            Mistake("SimPO's loss has no reference in it, so none of its numbers is a price on the KL.", {"dpo": "B", "simpo": "B"}),
            Mistake("SimPO's loss has no reference: nothing that it holds can promise a direction.", {"dpo": "B", "simpo": "A"}),
            Mistake("DPO does hold the reference, and β is its price; it is SimPO that promises nothing.", {"dpo": "C", "simpo": "C"}),
            Mistake("the two are exchanged: which loss contains the reference?", {"dpo": "C", "simpo": "B"}),
        ),
        praise="What the optimum promises and what forty updates do are two things: look at the figure.",
    ),
    Exercise(
        "08.4",
        "passes to pay for",
        truth=_cost_by_counting,
        tolerance=2e-3,
        mistakes=(
            Mistake("a share of DPO's passes is asked for, not of SimPO's: four passes become three.", _cost(1 / 3, 1 / 3, 1 / 9)),
            Mistake("plain: the backward pass costs 2, and only the policy has one.", _cost(plain=0.5)),
            Mistake("plain: the reference has no backward pass.", _cost(plain=1 / 6)),
            Mistake("one_epoch: computing the reference once for each batch is what one epoch does anyway.", _cost(one_epoch=0.0)),
            Mistake("three_epochs: one reference pass a batch for three passes through the data.", _cost(three_epochs=0.25)),
            Mistake("three_epochs: computing in advance is not free, it is done once.", _cost(three_epochs=0.0)),
            Mistake("these are what is left; asked is the share that is saved.", _cost(0.75, 0.75, 0.9)),
        ),
        praise="In one epoch precomputing saves memory and no time; over several it saves time too.",
    ),
    Exercise(
        "08.6",
        "four broken measurements",
        truth=found_by_symptoms,
        mistakes=tuple(
            Mistake(f"{a} and {b} are exchanged: {_TELLS[a + b]}.", _exchanged(a, b))
            for a, b in itertools.combinations("ABCD", 2)
        ),
        praise="A number that is exactly 0, negative where it cannot be, or too good: look at the measurement first.",
    ),
]  # fmt: skip
