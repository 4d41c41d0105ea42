"""Answers to the exercises of notebook 12 as students write them."""

import numpy as np
import torch
import torch.nn.functional as F

WRONG, RIGHT = {}, {}

# --- 12.1 bytes of a training run ---


def training_bytes(parameters, trained, reference, weight_bytes):
    total = weight_bytes * parameters + 4 * trained + 8 * trained
    if reference:
        total += weight_bytes * parameters
    return total


RIGHT["12.1"] = [
    training_bytes,
    lambda parameters, trained, reference, weight_bytes: float(
        parameters * weight_bytes * (2 if reference else 1) + trained * 12
    ),
    lambda **g: np.int64(g["weight_bytes"] * g["parameters"] * (1 + g["reference"]) + 12 * g["trained"]),
]
WRONG["12.1"] = [
    (lambda parameters, trained, reference, weight_bytes: weight_bytes * parameters * (1 + reference) + 8 * trained, "two moments"),
    (lambda parameters, trained, reference, weight_bytes: parameters * (weight_bytes * (1 + reference) + 12), "only what is trained"),
    (lambda parameters, trained, reference, weight_bytes: (1 + reference) * training_bytes(parameters, trained, False, weight_bytes), "weights and nothing else"),
    (lambda parameters, trained, reference, weight_bytes: training_bytes(parameters, trained, True, weight_bytes), "no second copy"),
    (lambda parameters, trained, reference, weight_bytes: training_bytes(parameters, trained, False, weight_bytes), "in memory too"),
    (lambda parameters, trained, reference, weight_bytes: training_bytes(parameters, trained, reference, 4), "may be 2"),
    (lambda parameters, trained, reference, weight_bytes: weight_bytes * ((1 + reference) * parameters + 3 * trained), "stay in float32"),
    (lambda parameters, trained, reference, weight_bytes: training_bytes(parameters, trained, reference, weight_bytes) - weight_bytes * parameters, "policy's own"),
    (lambda parameters, trained, reference, weight_bytes: training_bytes(parameters, trained, reference, weight_bytes) / 1e9, "gigabytes"),
    (lambda parameters, trained, reference, weight_bytes: training_bytes(parameters, trained, reference, weight_bytes) / 2**30, "should be"),
    (lambda parameters, trained, reference, weight_bytes: 16 * parameters, "should be"),
]  # fmt: skip

# --- 12.2 many small batches for one large one ---


def scaled_losses(token_losses, micro_batch):
    count = len(token_losses)
    return torch.stack([token_losses[micro_batch == k].sum() / count for k in micro_batch.unique()])


def scaled_one_hot(token_losses, micro_batch):
    return (
        F.one_hot(micro_batch, int(micro_batch.max()) + 1).T.to(token_losses) @ token_losses
    ) / micro_batch.numel()


def by_part(function):
    """function(losses of the micro-batch, all losses, number of micro-batches) -> its loss."""

    def answer(token_losses, micro_batch):
        number = len(micro_batch.unique())
        return torch.stack(
            [function(token_losses[micro_batch == k], token_losses, number) for k in range(number)]
        )

    return answer


def seen_so_far(token_losses, micro_batch):
    seen, parts = 0, []
    for k in range(int(micro_batch.max()) + 1):
        part = token_losses[micro_batch == k]
        seen += len(part)
        parts.append(part.sum() / seen)
    return torch.stack(parts)


RIGHT["12.2"] = [
    scaled_losses,
    scaled_one_hot,
    by_part(lambda part, all_of_them, number: part.mean() * len(part) / len(all_of_them)),
]
WRONG["12.2"] = [
    (by_part(lambda part, every, number: part.mean() / number), "mean of means"),
    (by_part(lambda part, every, number: part.mean()), "several times"),
    (by_part(lambda part, every, number: part.sum()), "these are sums"),
    (by_part(lambda part, every, number: part.sum() / number), "number of micro-batches, but"),
    (seen_so_far, "seen so far"),
    (by_part(lambda part, every, number: part.sum() / len(every) / number), "added, not averaged"),
    (by_part(lambda part, every, number: part.detach().sum() / len(every)), "no gradient"),
    (by_part(lambda part, every, number: part.sum() / len(every) * (1.0 if len(part) > 3 else 0.0)), "should be"),
    (lambda token_losses, micro_batch: token_losses.mean(), "shape"),
    (lambda token_losses, micro_batch: token_losses / len(token_losses), "shape"),
]  # fmt: skip

# --- 12.3 two processes ---


def two(followed=3.0, wanted=2.5, factor=2 / 40):
    return {"followed": followed, "wanted": wanted, "factor": factor}


RIGHT["12.3"] = [two(), {"factor": 1 / 20, "wanted": 100 / 40, "followed": 3}]
WRONG["12.3"] = [
    (two(followed=2.5), "mean of its own tokens, and then"),
    (two(followed=6), "not added"),
    (two(wanted=3), "count alike"),
    (two(2.5, 3), "the first two are exchanged"),
    (two(factor=1 / 40), "halves"),
    (two(factor=2 / 30), "not of process 0 alone"),
    (two(factor=1 / 30), "its own tokens again"),
    (two(factor=20), "factor: 20"),
    (2.5, "dict"),
    ({"followed": 3.0}, "dict"),
]

# --- 12.4 a linear layer with an adapter ---


def lora_linear(x, weight, a, b, alpha):
    r = a.shape[0]
    return F.linear(x, weight) + (alpha / r) * F.linear(F.linear(x, a), b)


def lora_merged(x, weight, a, b, alpha):
    return x @ (weight + alpha * (b @ a) / len(a)).mT


def lora_with(scale):
    return lambda x, weight, a, b, alpha: F.linear(x, weight) + scale(alpha, a, b) * (x @ a.T @ b.T)


RIGHT["12.4"] = [lora_linear, lora_merged, lora_with(lambda alpha, a, b: alpha / b.shape[1])]
WRONG["12.4"] = [
    (lora_with(lambda alpha, a, b: 1), "scale is missing"),
    (lora_with(lambda alpha, a, b: alpha), "and this does not"),
    (lora_with(lambda alpha, a, b: alpha / a.shape[1]), "width is not the rank"),
    (lora_with(lambda alpha, a, b: alpha / a.shape[0] ** 0.5), "rslora"),
    (lora_with(lambda alpha, a, b: alpha * len(a)), "not multiplied"),
    (lora_with(lambda alpha, a, b: alpha / b.shape[0]), "should be"),
    (lambda x, weight, a, b, alpha: alpha / len(a) * x @ a.T @ b.T, "that one is missing"),
    (lambda x, weight, a, b, alpha: F.linear(x, weight) + alpha / len(a) * (x.detach() @ a.T @ b.T), "without its gradient"),
    (lambda x, weight, a, b, alpha: F.linear(x, weight + alpha / len(a) * (b @ a).detach()), "adapter is detached"),
    (lambda x, weight, a, b, alpha: F.linear(x, weight) + alpha / len(a) * F.linear(F.relu(x @ a.T), b), "no activation"),
    (lambda x, weight, a, b, alpha: F.linear(x, weight) + alpha / len(a) * (x @ a.T @ b.detach().T), "gradient"),
    (lambda x, weight, a, b, alpha: F.linear(x, weight), "should be"),
    (lambda x, weight, a, b, alpha: F.linear(x, weight) + alpha / len(a) * x @ b @ a, "stopped with RuntimeError"),
    (lambda x, weight, a, b, alpha: x @ weight, "stopped with RuntimeError"),
]  # fmt: skip

# --- 12.5 SimPO in TRL's words ---


def trl_simpo(beta, gamma_beta_ratio):
    return {"loss_type": "simpo", "beta": beta, "simpo_gamma": gamma_beta_ratio * beta, "cpo_alpha": 0}


def trl_with(**other):
    """A setting replaced, as a value or as a function of (beta, ratio)."""

    def answer(beta, gamma_beta_ratio):
        changed = {k: v(beta, gamma_beta_ratio) if callable(v) else v for k, v in other.items()}
        return trl_simpo(beta, gamma_beta_ratio) | changed

    return answer


RIGHT["12.5"] = [trl_simpo, trl_with(cpo_alpha=0.0, loss_type="SimPO ")]
WRONG["12.5"] = [
    (trl_with(simpo_gamma=lambda beta, ratio: ratio), "this is the ratio"),
    (trl_with(simpo_gamma=lambda beta, ratio: ratio / beta), "one multiplies"),
    (trl_with(cpo_alpha=1), "CPO-SimPO"),
    (trl_with(loss_type="sigmoid"), "on sums"),
    (trl_with(beta=1.0), "the same in both"),
    (trl_with(simpo_gamma=lambda beta, ratio: ratio, cpo_alpha=1.0), "another method"),
    (trl_with(beta=0.1, simpo_gamma=0.5, cpo_alpha=1.0), "should be"),
    (trl_with(beta=lambda beta, ratio: 2 * beta), "should be"),
    (trl_with(label_smoothing=0.0), "dict"),
    (lambda beta, gamma_beta_ratio: {"loss_type": "simpo", "beta": beta}, "dict"),
    (lambda beta, gamma_beta_ratio: beta * gamma_beta_ratio, "dict"),
]

# --- 12.6 four runs that disagree ---

RIGHT["12.6"] = [{1: "D", 2: "B", 3: "C", 4: "A"}, {4: "a", 3: "c", 2: "b ", 1: "d"}]
WRONG["12.6"] = [
    ({1: "D", 2: "A", 3: "C", 4: "B"}, "A and B"),
    ({1: "D", 2: "B", 3: "A", 4: "C"}, "A and C"),
    ({1: "A", 2: "B", 3: "C", 4: "D"}, "A and D"),
    ({1: "D", 2: "C", 3: "B", 4: "A"}, "B and C"),
    ({1: "B", 2: "D", 3: "C", 4: "A"}, "B and D"),
    ({1: "C", 2: "B", 3: "D", 4: "A"}, "C and D"),
    ({1: "A", 2: "C", 3: "D", 4: "B"}, "is not it"),
    ({"A": 4}, "dict"),
]
