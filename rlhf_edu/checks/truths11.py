"""Behind the letters of notebook 11: which bug each run had; and the truths of its exercises."""

import functools
import math

import numpy as np
import torch

from .. import gallery, losses
from ..advantages import whiten

Recipe = gallery.Recipe

# --- the blind galleries: a letter of the page -> the name of its bug, and the recipe that was run ---

NAMED = {
    "sft": {
        "no EOS": Recipe(encode=gallery.encode_without_eos),
        "padding counted": Recipe(collate=gallery.collate_padding_counted),
        "prompt counted": Recipe(collate=gallery.collate_prompt_counted),
        "not shifted": Recipe(sums=gallery.sums_not_shifted),
    },
    "dpo": {
        "swapped": Recipe(loss=lambda w, l, ref_w, ref_l: losses.dpo_loss(l, w, ref_l, ref_w)),
        "learning rate": Recipe(learning_rate=20.0),
        "no frozen copy": Recipe(reference=lambda policy: policy),
        "mean": Recipe(sums=gallery.sums_are_means),
        "train mode": Recipe(reference=gallery.reference_in_train_mode),
        "tiny beta": Recipe(loss=functools.partial(losses.dpo_loss, beta=0.002)),
    },
    "ppo": {
        "KL sign": Recipe(penalty=torch.neg),
        "one past EOS": Recipe(place=gallery.place_one_past),
        "temperature": Recipe(scoring_temperature=1.0),
        "mean shifted": Recipe(scale=whiten),
    },
}
KEYS = {
    "sft": dict(zip("ABCD", ("not shifted", "no EOS", "prompt counted", "padding counted"), strict=True)),
    "dpo": dict(
        zip(
            "ABCDEF",
            ("mean", "no frozen copy", "train mode", "swapped", "tiny beta", "learning rate"),
            strict=True,
        )
    ),
    "ppo": dict(zip("ABCD", ("one past EOS", "temperature", "KL sign", "mean shifted"), strict=True)),
}


def blind(family: str) -> dict[str, Recipe]:
    """Letter -> recipe, for the page to run without saying which."""
    return {letter: NAMED[family][bug] for letter, bug in KEYS[family].items()}


def exchanged(family, *letters):
    """The key with the bugs of two letters exchanged, or of three moved on by one."""
    key = dict(KEYS[family])
    moved = [key[letter] for letter in (*letters[1:], letters[0])]
    return key | dict(zip(letters, moved, strict=True))


# --- 11.1: which losses feel the prompt ---


def losses_of_a_pair(extra):
    """Each loss of one pair, as numbers, when log-probs of `extra` prompt tokens are counted with the response."""
    w, l, ref_w, ref_l, n_w, n_l = -20.0, -31.0, -22.0, -29.0, 10, 14
    policy, reference = -3.1 * extra, -3.7 * extra
    w, l, ref_w, ref_l, n_w, n_l = (
        w + policy, l + policy, ref_w + reference, ref_l + reference, n_w + extra, n_l + extra,
    )  # fmt: skip
    nls = lambda z: math.log1p(math.exp(-z))
    h, a_w, a_l = (w - ref_w) - (l - ref_l), w / n_w, l / n_l
    odds = lambda a: a - math.log(1 - math.exp(a))
    return {
        "SFT": -a_w,
        "DPO": nls(0.1 * h),
        "IPO": (h - 5) ** 2,
        "KTO": 2 - 1 / (1 + math.exp(-0.1 * (w - ref_w))) - 1 / (1 + math.exp(0.1 * (l - ref_l))),
        "R-DPO": nls(0.1 * h + 0.05 * (n_w - n_l)),
        "CPO": nls(0.1 * (w - l)) - w,
        "SimPO": nls(2 * (a_w - a_l) - 1),
        "ORPO": -a_w + 0.1 * nls(odds(a_w) - odds(a_l)),
    }


def feels(**changed):
    without, counted = losses_of_a_pair(0), losses_of_a_pair(6)
    return {name: "yes" if abs(without[name] - counted[name]) > 1e-9 else "no" for name in without} | changed


# --- 11.3: the test that catches a prompt in the sum ---


def summer(first, last=0, reduce="sum"):
    """sums(logits, ids, prompt, lengths) that adds positions prompt + first .. lengths + last."""

    def sums(logits, ids, prompt, lengths):
        rows = []
        for i in range(len(ids)):
            start = prompt + first if first <= 0 else first
            wanted = range(max(1, start), min(ids.shape[1], int(lengths[i]) + last))
            terms = [logits[i, t - 1].log_softmax(-1)[ids[i, t]] for t in wanted]
            rows.append(torch.stack(terms).sum() / (len(terms) if reduce == "mean" else 1))
        return torch.stack(rows)

    return sums


RIGHT_SUMS = [summer(0), summer(0, reduce="mean"), summer(0, last=-1), summer(0, last=9)]
WRONG_SUMS = [summer(-99), summer(-99, reduce="mean"), summer(-1), summer(-2)]


def sums_inputs(rng):
    batch, time, vocab, prompt = 3, 12, 11, int(rng.integers(3, 6))
    some = (RIGHT_SUMS, WRONG_SUMS)[int(rng.integers(2))]
    return {
        "sums": some[int(rng.integers(len(some)))],
        "logits": torch.tensor(rng.normal(size=(batch, time, vocab))),
        "ids": torch.tensor(rng.integers(0, vocab, (batch, time))),
        "prompt": prompt,
        "lengths": torch.tensor(rng.integers(prompt + 2, time + 1, batch)),
    }


def is_right(sums, **_):
    return sums in RIGHT_SUMS


def unmoved(change):
    """A test that changes something and asks whether the sums stayed."""

    def answer(sums, logits, ids, prompt, lengths):
        changed, new_ids = change(logits.clone(), ids.clone(), prompt, torch.Generator().manual_seed(1))
        before, after = sums(logits, ids, prompt, lengths), sums(changed, new_ids, prompt, lengths)
        return torch.allclose(before, after)

    return answer


def noise(where):
    def change(logits, ids, prompt, generator):
        part = where(prompt)
        logits[:, part] += torch.randn(logits[:, part].shape, generator=generator, dtype=logits.dtype)
        return logits, ids

    return unmoved(change)


def opposite(function):
    return lambda **inputs: not function(**inputs)


# --- 11.5: the repaired rewards of PPO ---


def reward_inputs(rng):
    shape = (5, 9)
    lengths = np.array([9, 3, *rng.integers(2, 9, 3)])
    draw = lambda: torch.tensor(rng.normal(-3, 1, shape))
    return {
        "logps": draw(),
        "ref_logps": draw(),
        "scores": torch.tensor(rng.normal(size=shape[0])),
        "mask": torch.tensor(np.arange(shape[1])[None] < lengths[:, None]),
        "coefficient": float(rng.uniform(0.05, 0.5)),
    }


def rewards_by_loop(logps, ref_logps, scores, mask, coefficient):
    out = np.zeros(tuple(mask.shape))
    for i, row in enumerate(mask.tolist()):
        for t in range(sum(row)):
            out[i, t] = coefficient * (ref_logps[i, t].item() - logps[i, t].item())
        out[i, sum(row) - 1] += scores[i].item()
    return out


def broken_rewards(sign=False, past=False, padding=False, scored=None):
    """The broken function of the page with some of its bugs still in it."""

    def answer(logps, ref_logps, scores, mask, coefficient):
        log_ratio = (ref_logps - logps) if sign else (logps - ref_logps)
        rewards = -coefficient * log_ratio * (1 if padding else mask)
        end = mask.sum(1) - (0 if past else 1)
        if scored:
            return rewards + scored(scores, mask)
        rewards[torch.arange(len(scores)), end.clamp(max=mask.shape[1] - 1)] += scores
        return rewards

    return answer


# --- 11.7: KTO's reference point ---


def matrix_inputs(rng):
    n = int(rng.integers(3, 7))
    return {"log_ratios": torch.tensor(rng.normal(0.4, 1.5, (n, n)), requires_grad=True)}


def next_ones(matrix):
    return torch.stack([matrix[i, (i + 1) % len(matrix)] for i in range(len(matrix))])


def point_by_loop(log_ratios):
    rows, n = log_ratios.tolist(), len(log_ratios)
    return torch.tensor(max(0.0, math.fsum(rows[i][i + 1 - n] for i in range(n)) / n), dtype=torch.float64)


def point(formula):
    return lambda log_ratios: formula(log_ratios.detach())
