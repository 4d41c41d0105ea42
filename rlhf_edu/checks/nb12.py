"""Exercises of notebook 12, scaling up and the bridge to TRL."""

import itertools

import numpy as np
import torch

from . import Exercise, Mistake
from .truths12 import FAULTS, found_by_symptoms

# --- 12.1: bytes of a training run ---


def _bytes_inputs(rng):
    parameters = int(rng.integers(10**6, 10**10))
    return {
        "parameters": parameters,
        "trained": int(parameters * rng.uniform(0.001, 0.9)),
        "reference": bool(rng.integers(2)),
        "weight_bytes": int(rng.choice([2, 4])),
    }


def _bytes_by_list(parameters, trained, reference, weight_bytes):
    """One entry for each tensor that is alive."""
    alive = [(parameters, weight_bytes), (trained, 4), (trained, 4), (trained, 4)]
    alive += [(parameters, weight_bytes)] if reference else []
    return sum(number * size for number, size in alive)


def _bytes(a_trained=12, copies=lambda reference: 1 + reference, a_weight=None, of_all=False, scale=1.0):
    """A wrong count from what it takes for a trained parameter and for the copies of the weights."""

    def answer(parameters, trained, reference, weight_bytes):
        weights = (a_weight or weight_bytes) * parameters * copies(reference)
        return (weights + a_trained * (parameters if of_all else trained)) / scale

    return answer


# --- 12.2: gradient accumulation ---


def _tokens_inputs(rng):
    sizes = rng.integers(1, 9, size=4)
    sizes[rng.integers(4)] += 9  # never all equal
    losses = rng.uniform(0.1, 6.0, sizes.sum())
    micro_batch = np.repeat(np.arange(4), sizes)
    return {
        "token_losses": torch.tensor(losses).requires_grad_(),
        "micro_batch": torch.tensor(micro_batch),
    }


def _scaled_by_loop(token_losses, micro_batch):
    parts = []
    for k in range(int(micro_batch.max()) + 1):
        total = torch.zeros((), dtype=token_losses.dtype)
        for loss, place in zip(token_losses, micro_batch.tolist(), strict=True):
            total = total + (loss if place == k else 0.0) / len(micro_batch)
        parts.append(total)
    return torch.stack(parts)


def _scaled(by):
    """by(sums (K,), counts (K,)) -> (K,)."""

    def answer(token_losses, micro_batch):
        number = int(micro_batch.max()) + 1
        sums = torch.zeros(number, dtype=token_losses.dtype).index_add(0, micro_batch, token_losses)
        return by(sums, torch.bincount(micro_batch, minlength=number))

    return answer


# --- 12.3: two processes ---


def _two(followed=3.0, wanted=2.5, factor=0.05):
    return {"followed": followed, "wanted": wanted, "factor": factor}


def _two_by_counting():
    """Every token by itself: 30 of loss 2 on one process, 10 of loss 4 on the other."""
    first, second = [2.0] * 30, [4.0] * 10
    followed = (np.mean(first) + np.mean(second)) / 2
    wanted = np.mean(first + second)
    return _two(followed, wanted, 2 * wanted / (sum(first) + sum(second)))


# --- 12.4: LoRA ---


def _lora_inputs(rng):
    width, out, rank = 5, 4, 3
    tensor = lambda *shape: torch.tensor(rng.normal(size=shape))
    return {
        "x": tensor(2, 3, width).requires_grad_(),
        "weight": tensor(out, width),
        "a": tensor(rank, width).requires_grad_(),
        "b": tensor(out, rank).requires_grad_(),
        "alpha": float(rng.uniform(1, 32)),
    }


def _lora_by_sums(x, weight, a, b, alpha):
    """The sum over the rank, one outer product at a time."""
    whole = weight
    for i in range(a.shape[0]):
        whole = whole + alpha / a.shape[0] * torch.outer(b[:, i], a[i])
    return torch.einsum("btw,ow->bto", x, whole)


def _lora(scale, base=1.0, down=lambda t: t):
    def answer(x, weight, a, b, alpha):
        return base * x @ weight.T + scale(alpha, a) * (down(x @ a.T) @ b.T)

    return answer


# --- 12.5: SimPO in TRL's words ---


def _trl(gamma=lambda beta, ratio: beta * ratio, loss_type="simpo", alpha=0.0, beta_of=lambda beta: beta):
    def answer(beta, gamma_beta_ratio):
        return {
            "loss_type": loss_type, "beta": beta_of(beta), "simpo_gamma": gamma(beta, gamma_beta_ratio), "cpo_alpha": alpha,
        }  # fmt: skip

    return answer


def _trl_by_logit(beta, gamma_beta_ratio):
    """The margin is what is missing of beta when the mean log-probs differ by 1: b (1 - g/b) = b - g."""
    authors_logit = beta * (1.0 - gamma_beta_ratio)
    return {"loss_type": "simpo", "beta": beta, "simpo_gamma": beta - authors_logit, "cpo_alpha": 0.0}


# --- 12.6 ---

_TELLS = {
    "AB": "a term more in the loss and a smaller margin move the first loss to opposite sides",
    "AC": "one changes the loss, the other only what the first update does",
    "AD": "only one of the two changes how many tokens count",
    "BC": "a warm-up changes no loss before the first update",
    "BD": "a margin counts no tokens",
    "CD": "what does an update with a rate of 0 change?",
}


def _exchanged(first, second):
    other = {first: second, second: first}
    return {number: other.get(letter, letter) for number, letter in FAULTS.items()}


EXERCISES = [
    Exercise(
        "12.1",
        "bytes of a training run",
        truth=_bytes_by_list,
        inputs=_bytes_inputs,
        mistakes=(
            Mistake("a trained parameter costs more than 8 bytes: its gradient, and each of Adam's two moments.", _bytes(a_trained=8)),
            Mistake("only what is trained has a gradient and moments; this counts them for every parameter.", _bytes(of_all=True)),
            Mistake("the reference is frozen: it has weights and nothing else.", lambda parameters, trained, reference, weight_bytes: (weight_bytes * parameters + 12 * trained) * (1 + reference)),
            Mistake("there is no second copy of the weights where `reference` is False.", _bytes(copies=lambda reference: 2)),
            Mistake("where `reference` is True its weights are in memory too.", _bytes(copies=lambda reference: 1)),
            Mistake("a stored weight takes `weight_bytes`, which may be 2.", _bytes(a_weight=4)),
            Mistake("the moments and gradients stay in float32 here, whatever the weights are stored in.", lambda parameters, trained, reference, weight_bytes: weight_bytes * (parameters * (1 + reference) + 3 * trained)),
            Mistake("the frozen copy of the weights is forgotten, or the policy's own.", _bytes(copies=lambda reference: int(reference))),
            Mistake("bytes are asked for, and these are gigabytes.", _bytes(scale=1e9)),
        ),
        praise="16 bytes a parameter in full float32 training, 20 with a reference: the rest of the memory is activations.",
    ),
    Exercise(
        "12.2",
        "many small batches for one large one",
        truth=_scaled_by_loop,
        inputs=_tokens_inputs,
        mistakes=(
            Mistake("a mean of means: a token of a small micro-batch now counts more than one of a large one.", _scaled(lambda s, n: s / n / len(n))),
            Mistake("each is a mean over its own tokens; their gradients add up to several times the right one.", _scaled(lambda s, n: s / n)),
            Mistake("these are sums: nothing divides by the number of tokens.", _scaled(lambda s, n: s)),
            Mistake("divided by the number of micro-batches, but a mean over tokens is asked for.", _scaled(lambda s, n: s / len(n))),
            Mistake("divided by the tokens seen so far: the number of the whole batch must be known before the first backward pass.", _scaled(lambda s, n: s / n.cumsum(0))),
            Mistake("the total is divided by all tokens, and again by the number of micro-batches: the gradients are added, not averaged.", _scaled(lambda s, n: s / n.sum() / len(n))),
        ),
        praise="The number of tokens of the whole batch has to be known before the first micro-batch is computed.",
    ),
    Exercise(
        "12.3",
        "two processes",
        truth=_two_by_counting,
        tolerance=1e-4,
        mistakes=(
            Mistake("followed: each process takes the mean of its own tokens, and then the two gradients are averaged.", _two(followed=2.5)),
            Mistake("followed: the gradients are averaged over the processes, not added.", _two(followed=6.0)),
            Mistake("wanted: all 40 tokens count alike.", _two(wanted=3.0)),
            Mistake("the first two are exchanged: which of them does a token's process not matter for?", _two(2.5, 3.0)),
            Mistake("factor: the average over two processes halves what each contributes.", _two(factor=0.025)),
            Mistake("factor: the number of tokens of all processes, not of process 0 alone.", _two(factor=2 / 30)),
            Mistake("factor: that makes the mean of its own tokens again.", _two(factor=1 / 30)),
        ),
        praise="Engines do exactly this: they count the tokens of all processes first, and undo the average.",
    ),
    Exercise(
        "12.4",
        "a linear layer with an adapter",
        truth=_lora_by_sums,
        inputs=_lora_inputs,
        mistakes=(
            Mistake("the scale is missing: alpha / r.", _lora(lambda alpha, a: 1.0)),
            Mistake("alpha is divided by the rank, and this does not.", _lora(lambda alpha, a: alpha)),
            Mistake("alpha is divided by the rank; the width is not the rank.", _lora(lambda alpha, a: alpha / a.shape[1])),
            Mistake("divided by the root of the rank: that is a variant (rsLoRA), and the page asks for alpha / r.", _lora(lambda alpha, a: alpha / a.shape[0] ** 0.5)),
            Mistake("alpha is divided by the rank, not multiplied.", _lora(lambda alpha, a: alpha * a.shape[0])),
            Mistake("the adapter is added to the frozen layer, and that one is missing.", _lora(lambda alpha, a: alpha / a.shape[0], base=0.0)),
            Mistake("the values are right, but x goes into the adapter without its gradient: earlier layers would not learn through it.", lambda x, weight, a, b, alpha: x @ weight.T + alpha / a.shape[0] * (x.detach() @ a.T @ b.T)),
            Mistake("the values are right, but the adapter is detached: nothing would be learned.", lambda x, weight, a, b, alpha: x @ weight.T + alpha / a.shape[0] * (x @ (b @ a).detach().T)),
            Mistake("the adapter stands alone between layers without any curve: no activation goes between a and b.", _lora(lambda alpha, a: alpha / a.shape[0], down=torch.relu)),
        ),
        praise="With b = 0 the second term is 0, so training begins exactly at the reference.",
    ),
    Exercise(
        "12.5",
        "SimPO in TRL's words",
        truth=_trl_by_logit,
        inputs=lambda rng: {"beta": float(rng.uniform(1.5, 10)), "gamma_beta_ratio": float(rng.uniform(0.1, 0.95))},
        mistakes=(
            Mistake("simpo_gamma is the margin γ itself, and this is the ratio γ/β.", _trl(gamma=lambda beta, ratio: ratio)),
            Mistake("simpo_gamma: from the ratio to γ one multiplies.", _trl(gamma=lambda beta, ratio: ratio / beta)),
            Mistake("with cpo_alpha left at 1, CPO's log-likelihood term is in the loss too: that is CPO-SimPO.", _trl(alpha=1.0)),
            Mistake("loss_type 'sigmoid' is CPO on sums: no length normalization and no margin.", _trl(loss_type="sigmoid")),
            Mistake("beta is the same in both; only the margin is written differently.", _trl(beta_of=lambda beta: 1.0)),
            Mistake("both the margin and cpo_alpha are those of another method.", _trl(gamma=lambda beta, ratio: ratio, alpha=1.0)),
        ),
        praise="Nearly every setting differs from TRL's defaults, and no error would have told you.",
    ),
    Exercise(
        "12.6",
        "four runs that disagree",
        truth=found_by_symptoms,
        mistakes=tuple(
            Mistake(f"{a} and {b} are exchanged: {_TELLS[a + b]}.", _exchanged(a, b))
            for a, b in itertools.combinations("ABCD", 2)
        ),
        praise="The first loss, the second loss and the number of tokens tell most disagreements of two engines apart.",
    ),
]  # fmt: skip
