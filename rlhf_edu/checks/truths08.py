"""The four broken measurements of notebook 08, on made-up numbers."""

import math

import numpy as np

BROKEN = {1: "C", 2: "A", 3: "D", 4: "B"}  # number on the page's table: letter of the fragment


def measured_by(number: int | None, toy: dict) -> dict:
    """What measurement 1 to 4 of the page, or the right one, says of `toy_policies()`."""
    bug = BROKEN.get(number)
    held, train = toy["held"], toy["train"]
    use = train if bug == "C" else held
    reward = use["s"] - use["rho"]
    reward = use["s"] - use["s"] if bug == "A" else reward
    likelihood = use["s"] if bug == "B" else use["s"] / use["n"]
    right = reward[:, 0] > reward[:, 1]
    agrees = (likelihood[:, 0] > likelihood[:, 1])[right]
    kl = toy["rho_own"] - toy["s_own"] if bug == "D" else toy["s_own"] - toy["rho_own"]
    return {
        "reward accuracy": float(right.mean()),
        "same order by mean log-prob": float(agrees.mean()) if len(agrees) else math.nan,
        "KL from samples": float(kl.mean()),
    }


def toy_policies(seed=3) -> dict:
    """Made-up sums (pairs, 2), winner first, of a policy that has overfitted: training and held-out pairs, samples."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, push, pairs in (("train", 6.0, 400), ("held", 0.8, 400)):
        n = rng.integers(5, 30, (pairs, 2))
        rho = -3.0 * n + rng.normal(0, 3, (pairs, 2))
        s = rho + rng.normal(0, 2, (pairs, 2)) + push * np.array([0.5, -0.5])
        out[name] = {"n": n, "rho": rho, "s": s}
    out["rho_own"] = rng.normal(-60, 5, 400)
    out["s_own"] = out["rho_own"] + rng.normal(4, 2, 400)
    return out


def found_by_symptoms():
    """Name each row of the page's table by what is odd about it."""
    toy, found = toy_policies(), {}
    right = measured_by(None, toy)
    for number in BROKEN:
        row = measured_by(number, toy)
        if row["reward accuracy"] == 0:
            found[number] = "A"
        elif row["KL from samples"] < 0:
            found[number] = "D"
        elif row["reward accuracy"] > right["reward accuracy"] + 0.2:
            found[number] = "C"
        else:
            found[number] = "B"
    return found
