"""The four disagreeing runs of notebook 12: SimPO on a toy policy, in an engine with one setting wrong."""

import numpy as np
import torch

FAULTS = {1: "D", 2: "B", 3: "C", 4: "A"}  # number on the page's table: letter of the setting
BETA, GAMMA, RATE, EOS = 2.0, 1.0, 0.5, 0


def toy_pairs(seed=5) -> list[tuple[list[int], list[int], list[int]]]:
    """(last prompt token, chosen, rejected) as ids of a vocabulary of 6, without EOS."""
    rng = np.random.default_rng(seed)
    text = lambda low, high: rng.integers(1, 6, rng.integers(low, high)).tolist()
    return [(text(1, 2), text(2, 6), text(2, 6)) for _ in range(6)]


def engine(number: int | None) -> dict:
    """Tokens and losses of two updates on the same batch, by the right engine or by that of row 1 to 4."""
    fault = FAULTS.get(number)
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(6, 6, generator=generator, dtype=torch.float64).requires_grad_()
    end = [] if fault == "D" else [EOS]
    gamma = GAMMA / BETA if fault == "B" else GAMMA
    tokens = 0

    def logps(prompt, response):
        ids = [*prompt, *response, *end]
        steps = weights.log_softmax(-1)[ids[:-1], ids[1:]]
        return steps.sum(), len(steps)

    def loss():
        nonlocal tokens
        terms, nll, count = [], 0.0, 0
        for prompt, chosen, rejected in toy_pairs():
            (s_w, n), (s_l, m) = logps(prompt, chosen), logps(prompt, rejected)
            terms.append(-torch.nn.functional.logsigmoid(BETA * (s_w / n - s_l / m) - gamma))
            nll, count, tokens = nll - s_w, count + n, tokens + n + m
        return torch.stack(terms).mean() + (nll / count if fault == "A" else 0.0)

    losses = []
    for rate in (0.0 if fault == "C" else RATE, RATE):
        tokens = 0
        value = loss()
        losses.append(value.item())
        (gradient,) = torch.autograd.grad(value, weights)
        weights = (weights - rate * gradient).detach().requires_grad_()
    return {"response tokens": tokens, "loss 1": losses[0], "loss 2": losses[1]}


def found_by_symptoms() -> dict[int, str]:
    """Name each row of the page's table by what is odd about it."""
    right, found = engine(None), {}
    for number in FAULTS:
        row = engine(number)
        if row["response tokens"] < right["response tokens"]:
            found[number] = "D"
        elif row["loss 1"] == row["loss 2"]:
            found[number] = "C"
        else:
            found[number] = "A" if row["loss 1"] > right["loss 1"] else "B"
    return found
