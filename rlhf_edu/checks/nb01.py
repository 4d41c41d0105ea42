"""Exercises of notebook 01, supervised fine-tuning."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from . import Exercise, Mistake


def _batch(rng, rows=3, vocabulary=6):
    """Right-padded ids with logits of every position: prompts of 2-3 tokens, responses of 2-5, EOS included."""
    prompts, responses = rng.integers(2, 4, rows), rng.permutation(np.arange(2, 2 + rows))
    time = int((prompts + responses).max()) + 2
    return {
        "logits": torch.tensor(rng.normal(0, 1.5, (rows, time, vocabulary))).requires_grad_(),
        "token_ids": torch.tensor(rng.integers(0, vocabulary, (rows, time))),
        "prompt_lengths": torch.tensor(prompts),
        "lengths": torch.tensor(prompts + responses),
    }


def _masked(rng):
    given = _batch(rng)
    where = torch.arange(given["token_ids"].shape[1])
    prompt, end = given.pop("prompt_lengths")[:, None], given.pop("lengths")[:, None]
    return given | {"response_mask": (where >= prompt) & (where < end)}


def _spelled_out(logits, token_ids, response_mask):
    """Token by token, softmax by its definition: one list of log-probs a response."""
    out = []
    for row in range(len(token_ids)):
        out.append([])
        for t in range(token_ids.shape[1]):
            if response_mask[row, t]:
                odds = logits[row, t - 1].exp()
                out[-1].append((odds[token_ids[row, t]] / odds.sum()).log())
    return out


def _truth_logps(logits, token_ids, response_mask):
    rows = _spelled_out(logits, token_ids, response_mask)
    return torch.stack([torch.stack(r).sum() for r in rows]), torch.tensor([len(r) for r in rows])


def _truth_mean(logits, token_ids, response_mask):
    """Cross-entropy with the targets that count written into a list: PyTorch's mean skips the others."""
    targets = [
        [int(i) if counts else -100 for i, counts in zip(ids[1:], mask[1:], strict=True)]
        for ids, mask in zip(token_ids, response_mask, strict=True)
    ]
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), torch.tensor(targets).flatten())


def _mask_of(token_ids, start, end):
    where = torch.arange(token_ids.shape[1])
    return (where >= start[:, None]) & (where < end[:, None])


def _with_lengths(function, start=lambda p, n: p, end=lambda p, n: n):
    """The same function of a mask, given as lengths: from `start` to before `end`."""
    return lambda logits, token_ids, prompt_lengths, lengths: function(
        logits,
        token_ids,
        _mask_of(token_ids, start(prompt_lengths, lengths), end(prompt_lengths, lengths)),
    )


# --- what goes wrong, all in one place: which logits, which mask, how the tokens become numbers ---


def _picked(logits, ids, softmax=True):
    return (logits.log_softmax(-1) if softmax else logits).gather(-1, ids[..., None])[..., 0]


def _right(logits, ids, mask):
    return _picked(logits[:, :-1], ids[:, 1:]), mask[:, 1:]


def _no_shift(logits, ids, mask):
    return _picked(logits, ids), mask


def _shifted_back(logits, ids, mask):
    return _picked(logits[:, 1:], ids[:, :-1]), mask[:, :-1]


def _shifted_twice(logits, ids, mask):
    return _picked(logits[:, :-2], ids[:, 2:]), mask[:, 2:]


def _mask_of_predictors(logits, ids, mask):
    return _picked(logits[:, :-1], ids[:, 1:]), mask[:, :-1]


def _everything(logits, ids, mask):
    return _picked(logits[:, :-1], ids[:, 1:]), torch.ones_like(mask[:, 1:])


def _padding_too(logits, ids, mask):
    return _picked(logits[:, :-1], ids[:, 1:]), mask.cumsum(1)[:, 1:] > 0


def _prompt_too(logits, ids, mask):
    return _picked(logits[:, :-1], ids[:, 1:]), mask.flip(1).cumsum(1).flip(1)[:, 1:] > 0


def _last(mask):
    return mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)


def _no_eos(logits, ids, mask):
    return _picked(logits[:, :-1], ids[:, 1:]), (mask & ~_last(mask))[:, 1:]


def _first_lost(logits, ids, mask):
    return _picked(logits[:, :-1], ids[:, 1:]), (mask & torch.roll(mask, 1, 1))[:, 1:]


def _raw_logits(logits, ids, mask):
    return _picked(logits[:, :-1], ids[:, 1:], softmax=False), mask[:, 1:]


def _sums(which, sign=1):
    def answer(logits, token_ids, response_mask):
        logps, mask = which(logits, token_ids, response_mask)
        return sign * (logps * mask).sum(1), mask.sum(1)

    return answer


def _token_mean(which, sign=-1):
    def answer(logits, token_ids, response_mask):
        logps, mask = which(logits, token_ids, response_mask)
        return sign * (logps * mask).sum() / mask.sum()

    return answer


def _reduced(change):
    def answer(logits, token_ids, response_mask):
        return change(*_sums(_right)(logits, token_ids, response_mask), token_ids)

    return answer


WHERE = {
    _no_shift: "there is no shift: the token at position t is predicted by the logits at t - 1.",
    _shifted_back: "the shift goes the wrong way: the logits at t - 1 predict the token at t, not the one at t - 2.",
    _shifted_twice: "shifted twice: the logits at t - 1 predict the token at t, and you score them on the one at t + 1.",
    _mask_of_predictors: "the mask is not shifted with the tokens: EOS is dropped and a prompt token counts instead.",
    _everything: "nothing is masked: prompt and padding count as well.",
    _padding_too: "padding is counted: after EOS nothing is true under the mask.",
    _prompt_too: "the prompt is not masked: only tokens of the response count.",
    _no_eos: "EOS is dropped: it is part of the response, and the only place where stopping is learned.",
    _first_lost: "the first token of the response is lost: it counts, and the last prompt token predicts it.",
    _raw_logits: "these are logits: a log-prob needs log_softmax over the vocabulary first.",
}


def _places(wrap, leave_out=()):
    return tuple(Mistake(hint, wrap(which)) for which, hint in WHERE.items() if which not in leave_out)


# --- 01.4 and 01.5 find the bug ---


def _unpadded(rng, eos=7):
    draw = lambda low, high: [int(t) for t in rng.integers(0, eos, rng.integers(low, high))]
    rows = range(3)
    return {
        "prompts": [draw(1, 4) for _ in rows],
        "responses": [[*draw(1, 6), eos] for _ in rows],
        "pad_id": eos,
    }


def _truth_labels(prompts, responses, pad_id):
    time = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    labels = np.full((len(prompts), time), -100)
    for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        for place, token in enumerate(r):
            labels[row, len(p) + place] = token
    return labels


def _labels(row_of):
    """Labels whose rows `row_of(prompt, response, pads, pad_id)` builds."""

    def answer(prompts, responses, pad_id):
        time = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        return torch.tensor([row_of(p, r, time - len(p) - len(r), pad_id)
                             for p, r in zip(prompts, responses, strict=True)])  # fmt: skip

    return answer


# --- 01.6 the schedule ---


def _schedule(rng):
    """Any step, and as often one of the last, where a floor that was put in wrongly shows."""
    steps = int(rng.integers(20, 60))
    step = rng.integers(1, steps - 1) if rng.random() < 0.5 else steps - 2
    return {"step": int(step), "steps": steps, "peak": float(rng.uniform(0.5, 2)),
            "final": float(rng.uniform(0.05, 0.3))}  # fmt: skip


def _by_squared_cosine(step, steps, peak, final):
    """(1 + cos a) / 2 is the square of cos(a / 2)."""
    return final * peak + (peak - final * peak) * math.cos(math.pi * step / steps / 2) ** 2


def _cosine(angle, floor=None, share=None):
    def answer(step, steps, peak, final):
        part = (share or (lambda a: (1 + math.cos(a)) / 2))(angle(step, steps))
        return peak * part if floor == 0 else peak * (final + part) if floor == 1 else peak * (
            final + (1 - final) * part
        )  # fmt: skip

    return answer


_half_turn = lambda step, steps: math.pi * step / steps

EXERCISES = [
    Exercise(
        "01.1",
        "log-probs of responses",
        truth=_truth_logps,
        inputs=_masked,
        mistakes=(
            *_places(_sums),
            Mistake("the sign: a log-prob is negative; the minus belongs to the loss.", _sums(_right, sign=-1)),
            Mistake("this is the mean: return the sum, and the length beside it.", _reduced(lambda s, n, _: (s / n, n))),
            Mistake("the lengths count prompt or padding: they are the number of true places under the mask.",
                    _reduced(lambda s, n, ids: (s, torch.full_like(n, ids.shape[1])))),
            Mistake("the lengths leave EOS out: every place under the mask counts.", _reduced(lambda s, n, _: (s, n - 1))),
            Mistake("the order: first the sums, then the lengths.", _reduced(lambda s, n, _: (n, s))),
        ),
        praise="DPO, SimPO, PPO and all others of the course begin with this function.",
    ),
    Exercise(
        "01.2",
        "the SFT loss",
        truth=lambda **x: _with_lengths(_truth_mean)(**x),
        inputs=_batch,
        mistakes=(
            *(Mistake(m.hint, _with_lengths(m.answer)) for m in _places(_token_mean)),
            Mistake("the sign: a loss falls when the log-probs rise.", _with_lengths(_token_mean(_right, sign=1))),
            Mistake("this is the mean of each response's own mean: here every token of the batch weighs the same.",
                    _with_lengths(_reduced(lambda s, n, _: -(s / n).mean()))),
            Mistake("this is a sum: divide by the number of response tokens in the batch.",
                    _with_lengths(_reduced(lambda s, n, _: -s.sum()))),
            Mistake("this divides by the number of responses: divide by the number of their tokens.",
                    _with_lengths(_reduced(lambda s, n, _: -s.mean()))),
            Mistake("this divides by all places of the batch: masked ones do not count below the line either.",
                    _with_lengths(_reduced(lambda s, n, ids: -s.sum() / ids[:, 1:].numel()))),
            Mistake("this divides by batch times time: masked places do not count below the line either.",
                    _with_lengths(_reduced(lambda s, n, ids: -s.sum() / ids.numel()))),
        ),
        praise="Nothing of the prompt and nothing of the padding can move it, and EOS can.",
    ),
    Exercise(
        "01.3",
        "predict: no EOS",
        truth=lambda: "C",
        mistakes=(
            Mistake("stopping is no side effect of good text: who never saw EOS as a target never learned to choose it.", "A"),
            Mistake("is there a single target, in base training or here, that raised the probability of EOS?", "B"),
        ),
        praise="The probability of a token rises only where it was a target.",
    ),
    Exercise(
        "01.4",
        "find the bug: it never stops",
        truth=_truth_labels,
        inputs=_unpadded,
        mistakes=(
            Mistake("still the bug: where pad_id equals EOS, masking by value hides the real EOS too. Mask by place.",
                    _labels(lambda p, r, n, pad: [-100] * len(p) + [-100 if t == pad else t for t in r] + [-100] * n)),
            Mistake("now the padding is a target as well: after the first EOS all is -100.",
                    _labels(lambda p, r, n, pad: [-100] * len(p) + [*r] + [pad] * n)),
            Mistake("one pad is a target besides EOS: after the response all is -100.",
                    _labels(lambda p, r, n, pad: [-100] * len(p) + [*r] + [pad] * (n > 0) + [-100] * (n - 1))),
            Mistake("the prompt is not masked: its places get -100.",
                    _labels(lambda p, r, n, pad: [*p, *r] + [-100] * n)),
            Mistake("the labels are shifted: the model shifts them itself, so a label stands at its token's own place.",
                    _labels(lambda p, r, n, pad: [-100] * (len(p) - 1) + [*r] + [-100] * (n + 1))),
            Mistake("what is masked must be -100, the value that cross-entropy skips; 0 is a token.",
                    _labels(lambda p, r, n, pad: [0] * len(p) + [*r] + [0] * n)),
        ),
        praise="This course's tokenizer has a pad token of its own for this reason; GPT-2's has none.",
    ),
    Exercise(
        "01.5",
        "find the bug: two steps ahead",
        truth=_truth_mean,
        inputs=_masked,
        mistakes=(
            Mistake(WHERE[_shifted_twice], _token_mean(_shifted_twice)),
            *_places(_token_mean, leave_out=(_shifted_twice, _raw_logits)),
            Mistake("the tokens are right now, but the mask is still shifted twice: the first response token is lost.",
                    lambda logits, token_ids, response_mask: -(
                        _picked(logits[:, :-1], token_ids[:, 1:])
                        * (later := F.pad(response_mask[:, 2:], (0, 1)))
                    ).sum() / later.sum()),
            Mistake("the sign: a loss falls when the log-probs rise.", _token_mean(_right, sign=1)),
            Mistake("this is the mean of each response's own mean: keep the mean over all tokens.",
                    _reduced(lambda s, n, _: -(s / n).mean())),
        ),
        praise="Models of transformers shift `labels` themselves: who shifts before, shifts twice.",
    ),
    Exercise(
        "01.6",
        "cosine to 10 %",
        truth=_by_squared_cosine,
        inputs=_schedule,
        trials=16,
        mistakes=(
            Mistake("this falls to 0: at the end a share `final` of the peak is left.", _cosine(_half_turn, floor=0)),
            Mistake("the rate stays at the floor too long: max(floor, cosine) cuts the wave off, (1 - final) scales it.",
                    lambda step, steps, peak, final: peak * max(final, (1 + math.cos(_half_turn(step, steps))) / 2)),
            Mistake("this starts above the peak: only the part above the floor, (1 - final), is multiplied by the cosine.",
                    _cosine(_half_turn, floor=1)),
            Mistake("this is a straight line: the cosine is missing.",
                    _cosine(lambda s, n: s / n, share=lambda a: 1 - a)),
            Mistake("this rises: it starts at the floor and ends at the peak.",
                    _cosine(_half_turn, share=lambda a: (1 - math.cos(a)) / 2)),
            Mistake("the cosine runs from 1 to -1: (1 + cos) / 2 runs from 1 to 0.", _cosine(_half_turn, share=math.cos)),
            Mistake("this is a quarter turn: the angle runs from 0 to pi.",
                    _cosine(lambda s, n: math.pi * s / n / 2, share=math.cos)),
            Mistake("the angle runs to 2 pi: the rate comes back up. Stop at pi.", _cosine(lambda s, n: 2 * math.pi * s / n)),
            Mistake("off by one: the angle is pi times step / steps.", _cosine(lambda s, n: math.pi * s / (n - 1))),
            Mistake("off by one: step 0 has the peak rate itself.", _cosine(lambda s, n: math.pi * (s + 1) / n)),
            Mistake("the angle is in degrees: math.cos takes radians.", _cosine(lambda s, n: 180 * s / n)),
        ),
        praise="Large steps first, small ones at the end, and never none at all.",
    ),
    Exercise(
        "01.7",
        "predict: many epochs",
        truth=lambda: "B",
        mistakes=(
            Mistake("that is the training loss: texts it has not seen do not get likelier with each repetition.", "A"),
            Mistake("the first pass does help: these texts are new to the base policy, and EOS above all.", "C"),
        ),
        praise="InstructGPT saw the same after one epoch, and trained on: read below why.",
    ),
]  # fmt: skip
