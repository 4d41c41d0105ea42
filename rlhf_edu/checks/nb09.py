"""Exercises of notebook 09, the objective zoo."""

import itertools
import math
from decimal import Decimal, localcontext

import numpy as np
import torch
import torch.nn.functional as F

from . import Exercise, Mistake
from .truths09 import BROKEN, found_by_symptoms, what_a_solved_pair_gets

# --- 09.1: what a solved pair gets ---


def _solved(**changed):
    right = {
        "DPO": "A",
        "IPO": "C",
        "SLiC-HF": "B",
        "KTO": "A",
        "SimPO": "A",
        "Unlikelihood": "D",
        "RRHF": "B",
    }
    return right | {k.replace("_", "-"): v for k, v in changed.items()}


# --- 09.3: ORPO's odds ratio ---


def _odds_inputs(rng, pairs=12):
    lengths = [torch.tensor(rng.integers(4, 30, pairs)) for _ in range(2)]
    sums = [torch.tensor(-rng.uniform(0.2, 2.5, pairs)) * n for n in lengths]
    sums[0][0], sums[1][1] = -3e-16, -3e-16  # a certain chosen, a certain rejected response
    sums[0][2], sums[1][3] = -4e-9, -4e-9
    sums[0][4] = -45.0 * lengths[0][4]
    names = ("chosen_logps", "rejected_logps", "chosen_lengths", "rejected_lengths")
    values = [*(s.requires_grad_() for s in sums), *lengths]
    return dict(zip(names, values, strict=True)) | {"weight": float(rng.uniform(0.1, 2))}


def _odds_in_fifty_digits(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, weight):
    """Odds with 50 digits; gradients by the chain rule: d log-odds / d a = 1 / (1 - p)."""
    out = []
    with localcontext() as context:
        context.prec = 50
        columns = (chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
        for w, l, n, m in zip(*(c.tolist() for c in columns), strict=True):
            p, q = ((Decimal(s) / k).exp() for s, k in ((w, n), (l, m)))
            ratio = p / (1 - p) * (1 - q) / q
            wrong = 1 / (1 + ratio)  # 1 - sigmoid(log ratio)
            loss = float((1 + 1 / ratio).ln()) * weight
            out.append((loss, -weight * float(wrong / (1 - p)) / n, weight * float(wrong / (1 - q)) / m))
    loss, by_chosen, by_rejected = torch.tensor(out, dtype=torch.float64).T
    linear = by_chosen * (chosen_logps - chosen_logps.detach())
    return loss + linear + by_rejected * (rejected_logps - rejected_logps.detach())


def _log_odds(x):
    return x - torch.log(-torch.expm1(x))


def _odds(of=_log_odds, mean=True, outside=lambda d: -F.logsigmoid(d), swap=False, nll=False):
    def answer(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, weight):
        w, l = chosen_logps, rejected_logps
        if mean:
            w, l = w / chosen_lengths, l / rejected_lengths
        difference = of(l) - of(w) if swap else of(w) - of(l)
        return weight * outside(difference) - (chosen_logps / chosen_lengths if nll else 0)

    return answer


# --- 09.2: KTO ---


def _kto_inputs(rng, pairs=6):
    base = {name: torch.tensor(rng.normal(-30, 4, pairs)) for name in ("chosen", "rejected", "mismatched")}
    given = {f"{k}_logps": v + torch.tensor(rng.normal(0, 3, pairs)) for k, v in base.items()}
    side = 1 if rng.random() < 0.5 else -1  # a KL estimate above 0, or below
    given["mismatched_logps"] = base["mismatched"] + side * 2 + torch.tensor(rng.normal(0, 3, pairs))
    given = {k: v.requires_grad_() for k, v in given.items()}
    return given | {f"ref_{k}_logps": v for k, v in base.items()} | {"beta": float(rng.uniform(0.05, 0.4))}


def _kto_by_loop(
    chosen_logps, rejected_logps, mismatched_logps, ref_chosen_logps, ref_rejected_logps, ref_mismatched_logps, beta
):  # fmt: skip
    shifts = [p - r for p, r in zip(mismatched_logps.tolist(), ref_mismatched_logps.tolist(), strict=True)]
    z = max(0.0, math.fsum(shifts) / len(shifts))
    rows = []
    for w, l, rw, rl in zip(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, strict=True):
        good, bad = torch.exp(beta * (w - rw)), torch.exp(beta * (l - rl))
        anchor = math.exp(beta * z)
        rows.append(anchor / (anchor + good) + bad / (bad + anchor))
    return torch.stack(rows)


def _kto(
    sign=-1,
    clamp=True,
    detach=True,
    point=None,
    scale_point=True,
    swap=False,
    halves=2,
    value=False,
    ref=True,
):
    """A wrong KTO loss."""

    def answer(
        chosen_logps, rejected_logps, mismatched_logps, ref_chosen_logps, ref_rejected_logps, ref_mismatched_logps, beta
    ):  # fmt: skip
        u_w, u_l = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
        if not ref:
            u_w, u_l = chosen_logps, rejected_logps
        shifts = mismatched_logps - ref_mismatched_logps
        z = (point or (lambda s, w, l: s.mean()))(shifts, u_w, u_l)
        z = z.clamp(min=0) if clamp else z
        z = z.detach() if detach else z
        inside = (lambda u: beta * (u - z)) if scale_point else (lambda u: beta * u - z)
        good, bad = torch.sigmoid(inside(u_w)), torch.sigmoid((1 if swap else -1) * inside(u_l))
        if value:
            return -good - bad
        if sign > 0:  # as Table 3 prints it
            return -good + bad
        return (1 - good) + (1 - bad) if halves == 2 else ((1 - good) + (1 - bad)) / 2

    return answer


# --- 09.4: the same number in two conventions ---


def _conventions(ipo_tau=0.005, cpo_weight=0.05, kto_point=0.4, simpo_ratio=0.8, rdpo_alpha=0.02):
    return {
        "ipo_tau": ipo_tau, "cpo_weight": cpo_weight, "kto_point": kto_point, "simpo_ratio": simpo_ratio,
        "rdpo_alpha": rdpo_alpha,
    }  # fmt: skip


def _conventions_by_search():
    """Each by equating the two forms on numbers, not by formula."""
    length, h_mean = 20, 0.37
    target = next(
        h for h in np.arange(0, 400, 0.5) if abs(h / length - 1 / (2 * 0.1)) < 1e-9
    )  # of the mean form
    tau = 1 / (2 * target)
    nll = np.full(length, 1.3)
    weight = 1.0 * nll.mean() / nll.sum()
    point = np.interp(
        0.5, [0.1 * u - 0.1 * 4.0 + 0.5 for u in (0, 8)], [0.0, 0.8]
    )  # beta r where the value is 1/2
    ratio = h_mean - (2.0 * h_mean - 1.6) / 2.0
    reward, tokens = (
        np.array([1.0, 0.4]),
        np.array([9, 4]),
    )  # two responses, equally likely under the reference
    best = np.exp((reward - 0.02 * tokens) / 0.3)
    h = math.log(best[0] / best[1])
    alpha = (reward[0] - reward[1] - 0.3 * h) / (tokens[0] - tokens[1])
    return _conventions(tau, weight, float(point), ratio, alpha)


# --- 09.5 ---

_TELLS = {
    "AB": "one of them pushes the rejected response up",
    "AC": "one pushes half as hard on responses of twice the length, the other gets a pair of unequal length wrong",
    "AD": "one pushes y_w and y_l equally at equal lengths, the other has an NLL, which only y_w feels",
    "BC": "only one of them has a negative number",
    "BD": "only one of them has a negative number",
    "CD": "only one of them treats y_w and y_l alike",
}


def _exchanged(first, second):
    other = {first: second, second: first}
    return {number: other.get(letter, letter) for number, letter in BROKEN.items()}


EXERCISES = [
    Exercise(
        "09.1",
        "what a solved pair gets",
        truth=what_a_solved_pair_gets,
        mistakes=(
            Mistake("IPO regresses h on a target: what is the slope of a parabola beyond its lowest point?", _solved(IPO="A")),
            Mistake("IPO's push is zero at one margin only, not from there on.", _solved(IPO="B")),
            Mistake("Unlikelihood is linear in both log-probs: nothing in it ever notices that a pair is solved.", _solved(Unlikelihood="A")),
            Mistake("a hinge is flat beyond its corner: SLiC-HF does not fade, it stops.", _solved(SLiC_HF="A")),
            Mistake("RRHF's hinge has its corner at a margin of 0, and is flat beyond.", _solved(RRHF="A")),
            Mistake("both hinges are flat beyond their corner: exactly 0, no fading.", _solved(SLiC_HF="A", RRHF="A")),
            Mistake("KTO's sigmoid saturates on both sides: the push fades and never becomes exactly 0.", _solved(KTO="B")),
            Mistake("KTO's value is a sigmoid, not a line.", _solved(KTO="D")),
            Mistake("γ in SimPO moves the sigmoid and makes no hinge of it.", _solved(SimPO="B")),
            Mistake("SimPO has a target margin γ, but beyond it the logistic loss still falls; only a square pushes back.", _solved(SimPO="C")),
            Mistake("DPO's sigmoid weight fades and never becomes exactly 0.", _solved(DPO="B")),
        ),
        praise="Four behaviours from few shapes: logistic or bell, hinge, square, line. Nearly everything else is where the zero is put.",
    ),
    Exercise(
        "09.2",
        "KTO, with the right sign",
        inputs=_kto_inputs,
        truth=_kto_by_loop,
        trials=16,  # of which some have a KL estimate below 0
        mistakes=(
            Mistake("that is the sign as Table 3 prints it: minimised, it raises the rejected response.", _kto(sign=1)),
            Mistake("the reference point must not fall below 0.", _kto(clamp=False)),
            Mistake("cut the mean off at 0, not each log-ratio: that could only push the estimate up.", _kto(point=lambda s, w, l: s.clamp(min=0).mean())),
            Mistake("the reference point gets no gradient: detach it.", _kto(detach=False)),
            Mistake("the reference point is there, but neither clamped at 0 nor detached.", _kto(clamp=False, detach=False)),
            Mistake("the reference point is one number for the batch, the mean; this is a sum.", _kto(point=lambda s, w, l: s.sum())),
            Mistake("one reference point for the whole batch, not one a pair.", _kto(point=lambda s, w, l: s)),
            Mistake("the reference point comes from the mismatched pairs, not from the chosen responses themselves.", _kto(point=lambda s, w, l: w.mean())),
            Mistake("the reference point comes from the mismatched pairs, not from chosen and rejected.", _kto(point=lambda s, w, l: (w.mean() + l.mean()) / 2)),
            Mistake("where is the reference point?", _kto(point=lambda s, w, l: torch.zeros((), dtype=s.dtype))),
            Mistake("beta multiplies the reference point as well: it stands inside with the log-ratio.", _kto(scale_point=False)),
            Mistake("in the undesirable half the difference is turned round: z0 minus the log-ratio.", _kto(swap=True)),
            Mistake("these are the negative values; the loss is one minus each (the gradient is the same).", _kto(value=True)),
            Mistake("the two halves are added, not averaged.", _kto(halves=1)),
            Mistake("the log-ratios need the reference.", _kto(ref=False)),
        ),
        praise="Note what a pair is here: two separate verdicts, and nothing compares the two responses.",
    ),
    Exercise(
        "09.3",
        "the odds near certainty",
        inputs=_odds_inputs,
        truth=_odds_in_fifty_digits,
        mistakes=(
            Mistake("near p = 1 the exponential has lost 1 − p before it is subtracted from 1, by log1p(−e^x) as well: there is a function for e^x − 1.", _odds(lambda x: x - torch.log(1 - torch.exp(x)))),
            Mistake("the odds are of the mean log-prob per token, not of the sum.", _odds(mean=False)),
            Mistake("that is the ratio of probabilities: odds are p / (1 − p).", _odds(lambda x: x)),
            Mistake("the log-odds are log p MINUS log(1 − p).", _odds(lambda x: x + torch.log(-torch.expm1(x)))),
            Mistake("only 1 − p is in there: the odds have p above it.", _odds(lambda x: -torch.log(-torch.expm1(x)))),
            Mistake("chosen and rejected are exchanged.", _odds(swap=True)),
            Mistake("a loss is asked for: minus the log of the sigmoid.", _odds(outside=F.logsigmoid)),
            Mistake("the sigmoid itself has no log here.", _odds(outside=lambda d: -torch.sigmoid(d))),
            Mistake("the log-odds ratio alone: where is the log-sigmoid?", _odds(outside=lambda d: -d)),
            Mistake("only the preference term is asked for, without the NLL.", _odds(nll=True)),
        ),
        praise="A response of stock phrases has p near 1, and in half precision that comes early.",
    ),
    Exercise(
        "09.4",
        "the same number in two conventions",
        truth=_conventions_by_search,
        tolerance=2e-3,
        mistakes=(
            Mistake("ipo_tau: sums have a margin 20 times larger; which τ asks for it, a larger or a smaller one?", _conventions(ipo_tau=2.0)),
            Mistake("ipo_tau: the margin is 1/(2τ), and it is the margin that is multiplied by the length.", _conventions(ipo_tau=0.1)),
            Mistake("cpo_weight: the sum is 20 times the mean, so its weight must be smaller.", _conventions(cpo_weight=20.0)),
            Mistake("cpo_weight: 1 times the mean over 20 tokens is how much times their sum?", _conventions(cpo_weight=1.0)),
            Mistake("kto_point: Table 3 puts β inside: its z is β times the KL.", _conventions(kto_point=4.0)),
            Mistake("kto_point: multiply by β, do not divide.", _conventions(kto_point=40.0)),
            Mistake("simpo_ratio: γ divided by β, not multiplied.", _conventions(simpo_ratio=3.2)),
            Mistake("simpo_ratio: the ratio is γ over β, not β over γ.", _conventions(simpo_ratio=1.25)),
            Mistake("rdpo_alpha: α stands outside β h in the course's form, so β does not change it.", _conventions(rdpo_alpha=0.006)),
            Mistake("rdpo_alpha: α stands outside β h in the course's form; do not divide by β.", _conventions(rdpo_alpha=0.02 / 0.3)),
        ),
        praise="A hyperparameter without its convention is no number.",
    ),
    Exercise(
        "09.5",
        "four broken animals",
        truth=found_by_symptoms,
        mistakes=tuple(
            Mistake(f"{a} and {b} are exchanged: {_TELLS[a + b]}.", _exchanged(a, b))
            for a, b in itertools.combinations("ABCD", 2)
        ),
        praise="Two pushes at two lengths: a whole test-suite for a loss in one line.",
    ),
]  # fmt: skip
