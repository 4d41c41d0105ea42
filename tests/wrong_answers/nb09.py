"""Answers to the exercises of notebook 09 as students write them."""

import torch
import torch.nn.functional as F

WRONG, RIGHT = {}, {}

# --- 09.1 what a solved pair gets ---

SOLVED = {"DPO": "A", "IPO": "C", "SLiC-HF": "B", "KTO": "A", "SimPO": "A", "Unlikelihood": "D", "RRHF": "B"}
RIGHT["09.1"] = [SOLVED, {k: v.lower() for k, v in reversed(SOLVED.items())}]
WRONG["09.1"] = [
    (SOLVED | {"IPO": "A"}, "parabola"),
    (SOLVED | {"IPO": "B"}, "one margin only"),
    (SOLVED | {"Unlikelihood": "A"}, "linear"),
    (SOLVED | {"SLiC-HF": "A"}, "it stops"),
    (SOLVED | {"RRHF": "A"}, "corner at a margin of 0"),
    (SOLVED | {"RRHF": "A", "SLiC-HF": "A"}, "both hinges"),
    (SOLVED | {"KTO": "B"}, "saturates"),
    (SOLVED | {"KTO": "D"}, "not a line"),
    (SOLVED | {"SimPO": "B"}, "makes no hinge"),
    (SOLVED | {"SimPO": "C"}, "only a square"),
    (SOLVED | {"DPO": "B"}, "never becomes exactly 0"),
    (SOLVED | {"KTO": "C", "IPO": "D"}, "is not it"),
    ({"DPO": "A"}, "a dict with"),
    ("A", "a dict with"),
]

# --- 09.2 KTO, with the right sign ---


def kto(
    chosen_logps,
    rejected_logps,
    mismatched_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    ref_mismatched_logps,
    beta,
):
    with torch.no_grad():
        z0 = torch.relu((mismatched_logps - ref_mismatched_logps).mean())
    good = F.sigmoid(beta * (chosen_logps - ref_chosen_logps - z0))
    bad = F.sigmoid(beta * (z0 - rejected_logps + ref_rejected_logps))
    return 2 - good - bad


def kto_turned(
    chosen_logps,
    rejected_logps,
    mismatched_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    ref_mismatched_logps,
    beta,
):  # 1 - sigmoid(x) = sigmoid(-x)
    z0 = max(0.0, (mismatched_logps - ref_mismatched_logps).mean().item())
    u_w, u_l = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    return torch.sigmoid(-beta * (u_w - z0)) + torch.sigmoid(beta * (u_l - z0))


def kto_with(z_of=None, first=1, second=-1, base=2.0, beta_outside=False, use_ref=True):
    """z_of(log-ratios of mismatched, chosen, rejected) -> z0."""

    def answer(
        chosen_logps,
        rejected_logps,
        mismatched_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        ref_mismatched_logps,
        beta,
    ):
        u_m = mismatched_logps - ref_mismatched_logps
        u_w, u_l = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
        z0 = (z_of or (lambda m, w, l: m.mean().clamp(min=0).detach()))(u_m, u_w, u_l)
        if not use_ref:
            u_w, u_l = chosen_logps, rejected_logps
        if beta_outside:
            return base - torch.sigmoid(beta * u_w - z0) - torch.sigmoid(z0 - beta * u_l)
        return base - first * torch.sigmoid(beta * (u_w - z0)) + second * torch.sigmoid(beta * (z0 - u_l))

    return answer


RIGHT["09.2"] = [kto, kto_turned, kto_with()]
WRONG["09.2"] = [
    (kto_with(base=0.0, second=1), "Table 3 prints"),
    (kto_with(lambda m, w, l: m.mean().detach()), "not fall below 0"),
    (kto_with(lambda m, w, l: m.clamp(min=0).mean().detach()), "not each log-ratio"),
    (kto_with(lambda m, w, l: m.mean().clamp(min=0)), "detach it"),
    (kto_with(lambda m, w, l: m.mean()), "neither clamped"),
    (kto_with(lambda m, w, l: m.sum().clamp(min=0).detach()), "this is a sum"),
    (kto_with(lambda m, w, l: m.clamp(min=0).detach()), "one reference point"),
    (kto_with(lambda m, w, l: w.mean().clamp(min=0).detach()), "chosen responses themselves"),
    (kto_with(lambda m, w, l: ((w.mean() + l.mean()) / 2).clamp(min=0).detach()), "not from chosen and rejected"),
    (kto_with(lambda m, w, l: 0.0), "where is the reference point"),
    (kto_with(beta_outside=True), "beta multiplies the reference point"),
    (kto_with(base=0.0), "negative values"),
    (lambda **given: kto(**given) / 2, "added, not averaged"),
    (kto_with(use_ref=False), "need the reference"),
    (lambda **given: kto(**given).mean(), "shape"),
    (lambda **given: kto(**given).detach(), "detached"),
    (kto_with(lambda m, w, l: m.mean().abs().detach()), "should be"),
]  # fmt: skip


def kto_not_turned(**given):
    z0 = (given["mismatched_logps"] - given["ref_mismatched_logps"]).mean().clamp(min=0).detach()
    values = [
        torch.sigmoid(given["beta"] * (given[f"{side}_logps"] - given[f"ref_{side}_logps"] - z0))
        for side in ("chosen", "rejected")
    ]
    return 2 - sum(values)


WRONG["09.2"].append((kto_not_turned, "turned round"))

# --- 09.3 the odds near certainty ---


def odds(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, weight):
    a, b = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    ratio = a - b - (torch.log(-torch.expm1(a)) - torch.log(-torch.expm1(b)))
    return weight * F.softplus(-ratio)


def log1mexp(x):
    near = x > -0.6931
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, torch.full_like(x, -0.5)))),
        torch.log1p(-torch.exp(torch.where(near, torch.full_like(x, -1.0), x))),
    )


def odds_of(log_odds, mean=True, last=lambda d: -F.logsigmoid(d)):
    def answer(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, weight):
        w = chosen_logps / chosen_lengths if mean else chosen_logps
        l = rejected_logps / rejected_lengths if mean else rejected_logps
        return weight * last(log_odds(w) - log_odds(l))

    return answer


stable = lambda x: x - log1mexp(x)
exchange = lambda g: {
    "chosen_logps": g["rejected_logps"], "rejected_logps": g["chosen_logps"],
    "chosen_lengths": g["rejected_lengths"], "rejected_lengths": g["chosen_lengths"], "weight": g["weight"],
}  # fmt: skip
RIGHT["09.3"] = [odds, odds_of(stable), odds_of(lambda x: -torch.log(torch.expm1(-x)))]
WRONG["09.3"] = [
    (odds_of(lambda x: torch.log(x.exp() / (1 - x.exp()))), "inf at"),
    (odds_of(lambda x: x - torch.log(1 - x.exp())), "has lost"),
    (odds_of(lambda x: x - torch.log1p(-x.exp())), "has lost"),
    (odds_of(stable, mean=False), "not of the sum"),
    (odds_of(lambda x: x), "ratio of probabilities"),
    (odds_of(lambda x: x + log1mexp(x)), "MINUS"),
    (odds_of(lambda x: -log1mexp(x)), "p above it"),
    (lambda **given: odds(**exchange(given)), "exchanged"),
    (odds_of(stable, last=F.logsigmoid), "minus the log"),
    (odds_of(stable, last=lambda d: -torch.sigmoid(d)), "no log"),
    (odds_of(stable, last=lambda d: -d), "where is the log-sigmoid"),
    (lambda **given: odds(**given) - given["chosen_logps"] / given["chosen_lengths"], "without the NLL"),
    (lambda **given: odds(**given) / given["weight"], "should be"),
    (odds_of(lambda x: x - log1mexp(x.clamp(max=-1e-6))), "should be"),
    (lambda **given: odds(**{k: v.detach() if torch.is_tensor(v) else v for k, v in given.items()}), "detached"),
]  # fmt: skip

# --- 09.4 the same number in two conventions ---

CONVERTED = {"ipo_tau": 0.005, "cpo_weight": 0.05, "kto_point": 0.4, "simpo_ratio": 0.8, "rdpo_alpha": 0.02}
RIGHT["09.4"] = [CONVERTED, {"ipo_tau": 0.1 / 20, "cpo_weight": 1 / 20, "kto_point": 4 * 0.1, "simpo_ratio": 1.6 / 2.0, "rdpo_alpha": 2e-2}]  # fmt: skip
WRONG["09.4"] = [
    (CONVERTED | {"ipo_tau": 2.0}, "a larger or a smaller one"),
    (CONVERTED | {"ipo_tau": 0.1}, "it is the margin that is multiplied"),
    (CONVERTED | {"cpo_weight": 20}, "must be smaller"),
    (CONVERTED | {"cpo_weight": 1}, "how much times their sum"),
    (CONVERTED | {"kto_point": 4}, "inside"),
    (CONVERTED | {"kto_point": 40}, "do not divide"),
    (CONVERTED | {"simpo_ratio": 3.2}, "not multiplied"),
    (CONVERTED | {"simpo_ratio": 1.25}, "not β over γ"),
    (CONVERTED | {"rdpo_alpha": 0.006}, "does not change it"),
    (CONVERTED | {"rdpo_alpha": 0.0667}, "do not divide by β"),
    (CONVERTED | {"ipo_tau": 0.01}, "ipo_tau"),
    (list(CONVERTED.values()), "a dict with"),
]

# --- 09.5 four broken animals ---

FOUND = {1: "C", 2: "D", 3: "A", 4: "B"}
RIGHT["09.5"] = [FOUND, {k: f" {v.lower()} " for k, v in FOUND.items()}]
WRONG["09.5"] = [
    (FOUND | {3: "B", 4: "A"}, "pushes the rejected response up"),
    (FOUND | {1: "A", 3: "C"}, "A and C are exchanged"),
    (FOUND | {2: "A", 3: "D"}, "A and D are exchanged"),
    (FOUND | {1: "B", 4: "C"}, "B and C are exchanged"),
    (FOUND | {2: "B", 4: "D"}, "B and D are exchanged"),
    (FOUND | {1: "D", 2: "C"}, "C and D are exchanged"),
    ({1: "A", 2: "B", 3: "C", 4: "D"}, "is not it"),
    ("CDAB", "a dict with"),
]
