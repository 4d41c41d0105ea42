"""Notebook 09's objectives once more, in plain numbers, and the broken ones of its last exercise."""

import math

BROKEN = {1: "C", 2: "D", 3: "A", 4: "B"}  # number on the page's table: letter of the fragment
PAIRS = {  # name: (chosen sum, rejected sum, chosen length, rejected length); tokens of -1 and -1.2 nats
    "10 tokens each": (-10.0, -12.0, 10, 10),
    "20 tokens each": (-20.0, -24.0, 20, 20),
    "10 and 20 tokens": (-10.0, -24.0, 10, 20),
}
METHOD = {"A": "IPO", "B": "KTO", "C": "R-DPO", "D": "CPO"}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def loss_of(letter: str, pair, *, broken: bool) -> float:
    """Fragment A to D of the page, or the right loss of its method; the reference gives every token -1.1 nats."""
    s_w, s_l, n_w, n_l = pair
    u_w, u_l = s_w + 1.1 * n_w, s_l + 1.1 * n_l
    if letter == "A":
        h = u_w / n_w - u_l / n_l if broken else u_w - u_l
        return (h - 5.0) ** 2
    if letter == "B":
        return -sigmoid(0.1 * u_w) + (1 if broken else -1) * sigmoid(-0.1 * u_l)
    if letter == "C":
        return -log_sigmoid(0.1 * (u_w - u_l) + (-1 if broken else 1) * 0.05 * (n_w - n_l))
    return -log_sigmoid(0.1 * (s_w - s_l)) - (s_w / n_w if broken else s_w)


def symptoms(letter: str, *, broken: bool) -> dict:
    """By pair: how much the loss falls for one nat more of the chosen sum, and for one nat less of the rejected."""
    row, step = {}, 1e-5
    for name, (s_w, s_l, n_w, n_l) in PAIRS.items():
        f = lambda w, l, n_w=n_w, n_l=n_l: loss_of(letter, (w, l, n_w, n_l), broken=broken)
        row[f"{name}: up y_w"] = (f(s_w - step, s_l) - f(s_w + step, s_l)) / (2 * step)
        row[f"{name}: down y_l"] = (f(s_w, s_l + step) - f(s_w, s_l - step)) / (2 * step)
    return row


def table_of_symptoms() -> dict:
    """Rows of the page's table: the four methods done rightly, then the four broken ones by number."""
    rows = {f"right {method}": symptoms(letter, broken=False) for letter, method in METHOD.items()}
    return rows | {f"number {number}": symptoms(letter, broken=True) for number, letter in BROKEN.items()}


def found_by_symptoms() -> dict:
    """Name each row of the page's table by what is odd about it."""
    found = {}
    for number, letter in BROKEN.items():
        row = symptoms(letter, broken=True)
        ten, _, uneven = ([row[f"{n}: {p}"] for p in ("up y_w", "down y_l")] for n in PAIRS)
        if ten[1] < 0:
            found[number] = "B"  # pushes the rejected response up
        elif not math.isclose(ten[0], ten[1], rel_tol=1e-3):
            found[number] = "D"  # lopsided: an NLL, and a small one
        else:  # lengths should change no push of IPO's; in R-DPO they do, but on both sides alike
            found[number] = "C" if math.isclose(uneven[0], uneven[1], rel_tol=1e-3) else "A"
    return found


def what_a_solved_pair_gets() -> dict:
    """Exercise 09.1 by finite differences of each preference term at growing margins of two 20-token responses."""
    terms = {
        "DPO": lambda m: -log_sigmoid(0.1 * m),
        "IPO": lambda m: (m - 5.0) ** 2,
        "SLiC-HF": lambda m: max(0.0, 1.0 - m),
        "KTO": lambda m: 2 - sigmoid(0.1 * m / 2) - sigmoid(0.1 * m / 2),
        "SimPO": lambda m: -log_sigmoid(2.0 * m / 20 - 1.0),
        "Unlikelihood": lambda m: -(m / 2) + 0.5 * (-m / 2),
        "RRHF": lambda m: max(0.0, -m / 20),
    }
    found = {}
    for method, term in terms.items():
        pushes = [(term(m - 1e-3) - term(m + 1e-3)) / 2e-3 for m in (20.0, 60.0, 150.0)]
        if pushes[-1] < -1e-9:
            found[method] = "C"
        elif pushes[0] == pushes[-1] == 0:
            found[method] = "B"
        else:
            found[method] = "D" if math.isclose(pushes[0], pushes[-1], rel_tol=1e-6) else "A"
    return found
