"""Answers to the exercises of notebook 11 as students write them."""

import math

import numpy as np
import torch

WRONG, RIGHT = {}, {}

# --- 11.1 which losses feel the prompt ---

NAMES = ("SFT", "DPO", "IPO", "KTO", "R-DPO", "CPO", "SimPO", "ORPO")


def feels(yes):
    return {name: "yes" if name in yes.split() else "no" for name in NAMES}


RIGHT["11.1"] = [
    feels("SFT KTO CPO SimPO ORPO"),
    {name: value.upper() for name, value in feels("SFT KTO CPO SimPO ORPO").items()},
    dict(reversed(feels("SFT KTO CPO SimPO ORPO").items())),
]
WRONG["11.1"] = [
    (feels("SFT DPO IPO KTO R-DPO CPO SimPO ORPO"), "not every loss feels it"),
    (feels(""), "a difference of two sums loses"),
    (feels("SFT KTO R-DPO CPO SimPO ORPO"), "both lengths grow by the same number"),
    (feels("SFT KTO SimPO ORPO"), "there is a second term"),
    (feels("SFT CPO SimPO ORPO"), "one response at a time"),
    (feels("SFT IPO KTO CPO SimPO ORPO"), "IPO is written in h"),
    (feels("SFT DPO KTO CPO SimPO ORPO"), "what both have in common is gone"),
    (feels("SFT KTO CPO ORPO"), "divides by the length"),
    (feels("SFT KTO CPO SimPO"), "ORPO uses means"),
    (feels("DPO IPO R-DPO"), "yes and no are exchanged"),
    (feels("SFT"), "is not it"),
    (feels("KTO CPO SimPO ORPO"), "SFT: 'no' is not it"),
    ({name: name in ["SFT", "KTO", "CPO", "SimPO", "ORPO"] for name in NAMES}, "a text is asked for"),
    (["SFT", "KTO", "CPO", "SimPO", "ORPO"], "a dict with"),
    ({"SFT": "yes"}, "a dict with"),
    ("yes", "a dict with"),
]

# --- 11.2, 11.4, 11.6 letters ---


def letters(*bugs):
    return dict(zip("ABCDEF", bugs))


SFT = ("not shifted", "no EOS", "prompt counted", "padding counted")
DPO = ("mean", "no frozen copy", "train mode", "swapped", "tiny beta", "learning rate")
PPO = ("one past EOS", "temperature", "KL sign", "mean shifted")


def exchanged(bugs, a, b):
    some = letters(*bugs)
    some[a], some[b] = some[b], some[a]
    return some


for _name, _bugs in (("11.2", SFT), ("11.4", DPO), ("11.6", PPO)):
    RIGHT[_name] = [letters(*_bugs), {k: v.upper() for k, v in letters(*_bugs).items()}]
    WRONG[_name] = [
        (letters(*_bugs[::-1]), "is not it"),
        (letters(*_bugs[1:], _bugs[0]), "is not it"),
        (letters(*[_bugs[0]] * len(_bugs)), "is not it"),
        (letters(*_bugs[:3]), "a dict with"),
        (list(_bugs), "a dict with"),
        ({bug: letter for letter, bug in letters(*_bugs).items()}, "a dict with"),
        (dict.fromkeys("ABCDEF"[: len(_bugs)], 1), "a text is asked for"),
        ("A", "a dict with"),
    ]
WRONG["11.2"] += [
    (exchanged(SFT, "A", "B"), "A and B are exchanged"),
    (exchanged(SFT, "A", "C"), "A and C are exchanged"),
    (exchanged(SFT, "A", "D"), "A and D are exchanged"),
    (exchanged(SFT, "B", "C"), "share of samples that end"),
    (exchanged(SFT, "B", "D"), "look at the first loss"),
    (exchanged(SFT, "C", "D"), "has never met"),
]
WRONG["11.4"] += [
    (exchanged(DPO, *pair), f"{pair[0]} and {pair[1]} are exchanged")
    for pair in ("AB", "AC", "AD", "AE", "AF", "BC", "BD", "BE", "CD", "CE", "CF", "DF")
]
WRONG["11.4"] += [(exchanged(DPO, "E", "F"), "is not it"), (exchanged(DPO, "B", "F"), "is not it")]
WRONG["11.6"] += [
    (exchanged(PPO, *pair), f"{pair[0]} and {pair[1]} are exchanged")
    for pair in ("AB", "AC", "AD", "BC", "BD", "CD")
]

# --- 11.3 the test of the prompt ---


def by_new_logits(sums, logits, ids, prompt, lengths):
    changed = logits.clone()
    changed[:, : prompt - 1] = torch.randn_like(changed[:, : prompt - 1])
    return torch.allclose(sums(changed, ids, prompt, lengths), sums(logits, ids, prompt, lengths))


def by_new_tokens(sums, logits, ids, prompt, lengths):
    other = ids.clone()
    other[:, :prompt] = (other[:, :prompt] + 1) % logits.shape[-1]
    return bool((sums(logits, other, prompt, lengths) == sums(logits, ids, prompt, lengths)).all())


def by_gradient(sums, logits, ids, prompt, lengths):
    leaf = logits.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(sums(leaf, ids, prompt, lengths).sum(), leaf)
    return not gradient[:, : prompt - 1].any()


def by_infinity(sums, logits, ids, prompt, lengths):
    changed = logits.clone()
    changed[:, : prompt - 1] = float("nan")
    return sums(changed, ids, prompt, lengths).isfinite().all()


def exchanged_answers(sums, logits, ids, prompt, lengths):
    return not by_new_logits(sums, logits, ids, prompt, lengths)


def adds_a_constant(sums, logits, ids, prompt, lengths):
    changed = logits.clone()
    changed[:, : prompt - 1] += 1.0
    return torch.allclose(sums(changed, ids, prompt, lengths), sums(logits, ids, prompt, lengths))


def changes_nothing(sums, logits, ids, prompt, lengths):
    return torch.equal(sums(logits, ids, prompt, lengths), sums(logits.clone(), ids, prompt, lengths))


def changes_what_is_never_scored(sums, logits, ids, prompt, lengths):
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % logits.shape[-1]  # no logits predict the first token
    return torch.allclose(sums(logits, other, prompt, lengths), sums(logits, ids, prompt, lengths))


def one_too_far(sums, logits, ids, prompt, lengths):
    changed = logits.clone()
    changed[:, :prompt] = torch.randn_like(changed[:, :prompt])
    return torch.allclose(sums(changed, ids, prompt, lengths), sums(logits, ids, prompt, lengths))


def changes_everything(sums, logits, ids, prompt, lengths):
    return torch.allclose(
        sums(torch.randn_like(logits), ids, prompt, lengths), sums(logits, ids, prompt, lengths)
    )


def changes_the_response(sums, logits, ids, prompt, lengths):
    changed = logits.clone()
    changed[:, prompt - 1 :] = 0.0
    return torch.allclose(sums(changed, ids, prompt, lengths), sums(logits, ids, prompt, lengths))


def first_only(sums, logits, ids, prompt, lengths):
    changed = logits.clone()
    changed[:, 0] = torch.randn_like(changed[:, 0])
    return torch.allclose(sums(changed, ids, prompt, lengths), sums(logits, ids, prompt, lengths))


def one_too_few(sums, logits, ids, prompt, lengths):
    changed = logits.clone()
    changed[:, : prompt - 2] = torch.randn_like(changed[:, : prompt - 2])
    return torch.allclose(sums(changed, ids, prompt, lengths), sums(logits, ids, prompt, lengths))


def only_its_last(sums, logits, ids, prompt, lengths):
    changed = logits.clone()
    changed[:, prompt - 1] = torch.randn_like(changed[:, prompt - 1])
    return torch.allclose(sums(changed, ids, prompt, lengths), sums(logits, ids, prompt, lengths))


def one_right_answer(sums, logits, ids, prompt, lengths):
    wanted = []
    for i in range(len(ids)):
        logps = logits[i, :-1].log_softmax(-1)
        wanted.append(sum(logps[t - 1, ids[i, t]] for t in range(prompt, int(lengths[i]))))
    return torch.allclose(sums(logits, ids, prompt, lengths), torch.stack(wanted))


def returns_the_sums(sums, logits, ids, prompt, lengths):
    return sums(logits, ids, prompt, lengths)


RIGHT["11.3"] = [by_new_logits, by_new_tokens, by_gradient, by_infinity]
WRONG["11.3"] = [
    (exchanged_answers, "yes and no are exchanged"),
    (adds_a_constant, "passes every function"),
    (changes_nothing, "passes every function"),
    (changes_what_is_never_scored, "passes every function"),
    (one_too_far, "refuses every function"),
    (changes_everything, "refuses every function"),
    (changes_the_response, "refuses every function"),
    (only_its_last, "refuses every function"),
    (first_only, "only the last token or two"),
    (one_too_few, "position prompt − 2"),
    (one_right_answer, "one special sum"),
    (returns_the_sums, "shape"),
]

# --- 11.5 the rewards of PPO ---


def repaired(logps, ref_logps, scores, mask, coefficient):
    rewards = -coefficient * (logps - ref_logps) * mask
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] += scores
    return rewards


def repaired_by_where(logps, ref_logps, scores, mask, coefficient):
    last = torch.arange(mask.shape[1]) == mask.sum(1, keepdim=True) - 1
    paid = torch.where(mask, coefficient * (ref_logps - logps), 0.0)
    return paid + torch.where(last, scores[:, None], 0.0)


def repaired_by_loop(logps, ref_logps, scores, mask, coefficient):
    out = torch.zeros_like(logps)
    for i, n in enumerate(mask.sum(1).tolist()):
        out[i, :n] = -coefficient * (logps[i, :n] - ref_logps[i, :n])
        out[i, n - 1] += scores[i]
    return out


def still(sign=False, past=False, padding=False):
    def rewards(logps, ref_logps, scores, mask, coefficient):
        log_ratio = ref_logps - logps if sign else logps - ref_logps
        out = -coefficient * log_ratio
        if not padding:
            out[~mask] = 0.0
        end = mask.sum(1) if past else mask.sum(1) - 1
        out[torch.arange(len(scores)), end.clamp(max=mask.shape[1] - 1)] += scores
        return out

    return rewards


def every_token(logps, ref_logps, scores, mask, coefficient):
    return (scores[:, None] - coefficient * (logps - ref_logps)) * mask


def last_column(logps, ref_logps, scores, mask, coefficient):
    out = -coefficient * (logps - ref_logps) * mask
    out[:, -1] += scores
    return out


def no_score(logps, ref_logps, scores, mask, coefficient):
    return -coefficient * (logps - ref_logps) * mask


def score_instead(logps, ref_logps, scores, mask, coefficient):
    out = -coefficient * (logps - ref_logps) * mask
    out[torch.arange(len(scores)), mask.sum(1) - 1] = scores
    return out


def score_priced(logps, ref_logps, scores, mask, coefficient):
    return repaired(logps, ref_logps, coefficient * scores, mask, coefficient)


def no_coefficient(logps, ref_logps, scores, mask, coefficient):
    return repaired(logps, ref_logps, scores, mask, 1.0)


def first_token(logps, ref_logps, scores, mask, coefficient):
    out = -coefficient * (logps - ref_logps) * mask
    out[:, 0] += scores
    return out


def summed(logps, ref_logps, scores, mask, coefficient):
    return scores - coefficient * ((logps - ref_logps) * mask).sum(1)


def k3(logps, ref_logps, scores, mask, coefficient):
    x = logps - ref_logps
    out = -coefficient * (torch.expm1(-x) + x) * mask
    out[torch.arange(len(scores)), mask.sum(1) - 1] += scores
    return out


RIGHT["11.5"] = [repaired, repaired_by_where, repaired_by_loop]
WRONG["11.5"] = [
    (still(sign=True), "still wrong: the sign of the KL (the policy is paid for leaving the reference)."),
    (still(past=True), "still wrong: the place of the score"),
    (still(padding=True), "still wrong: the padding"),
    (still(sign=True, past=True), "and the place of the score"),
    (still(sign=True, padding=True), "the reference) and the padding"),
    (still(past=True, padding=True), "still wrong: the place of the score (the last token of a response is at mask.sum(1) − 1) and"),
    (still(sign=True, past=True, padding=True), "(the last token of a response is at mask.sum(1) − 1) and the padding"),
    (every_token, "every token gets it"),
    (last_column, "stands at the last column"),
    (no_score, "the score is missing"),
    (score_instead, "it is added to it"),
    (score_priced, "belongs to the KL alone"),
    (no_coefficient, "should be"),
    (first_token, "should be"),
    (summed, "the shape is"),
    (k3, "should be"),
]  # fmt: skip

# --- 11.7 KTO's reference point ---


def by_index(log_ratios):
    rows = torch.arange(len(log_ratios))
    return log_ratios.detach()[rows, rows.roll(-1)].mean().clamp(min=0)


def by_rolled_columns(log_ratios):
    return max(
        torch.zeros((), dtype=log_ratios.dtype), log_ratios.roll(-1, dims=1).diagonal().mean().detach()
    )


def by_numpy(log_ratios):
    m = log_ratios.detach().numpy()
    return torch.tensor(max(0.0, np.mean([m[i, (i + 1) % len(m)] for i in range(len(m))])))


def rolled_diagonal(log_ratios):
    return log_ratios.detach().diagonal().roll(-1).mean().clamp(min=0)


def plain_diagonal(log_ratios):
    return log_ratios.detach().diagonal().mean().clamp(min=0)


def not_cut(log_ratios):
    rows = torch.arange(len(log_ratios))
    return log_ratios.detach()[rows, rows.roll(-1)].mean()


def cut_each(log_ratios):
    rows = torch.arange(len(log_ratios))
    return log_ratios.detach()[rows, rows.roll(-1)].clamp(min=0).mean()


def previous(log_ratios):
    rows = torch.arange(len(log_ratios))
    return log_ratios.detach()[rows, rows.roll(1)].mean().clamp(min=0)


def transposed(log_ratios):
    rows = torch.arange(len(log_ratios))
    return log_ratios.detach()[rows.roll(-1), rows].mean().clamp(min=0)


def last_left_out(log_ratios):
    return log_ratios.detach().diagonal(offset=1).mean().clamp(min=0)


def all_others(log_ratios):
    m = log_ratios.detach()
    return m[~torch.eye(len(m), dtype=torch.bool)].mean().clamp(min=0)


def whole_matrix(log_ratios):
    return log_ratios.detach().mean().clamp(min=0)


def added_up(log_ratios):
    rows = torch.arange(len(log_ratios))
    return log_ratios.detach()[rows, rows.roll(-1)].sum().clamp(min=0)


def with_gradient(log_ratios):
    rows = torch.arange(len(log_ratios))
    return log_ratios[rows, rows.roll(-1)].mean().clamp(min=0)


def absolute(log_ratios):
    return not_cut(log_ratios).abs()


def each_row(log_ratios):
    rows = torch.arange(len(log_ratios))
    return log_ratios.detach()[rows, rows.roll(-1)].clamp(min=0)


RIGHT["11.7"] = [by_index, by_rolled_columns, by_numpy]
WRONG["11.7"] = [
    (rolled_diagonal, "changes their order, not their mean"),
    (plain_diagonal, "changes their order, not their mean"),
    (not_cut, "a KL is not negative"),
    (cut_each, "not each log-ratio"),
    (previous, "prompt i goes with the response of prompt i + 1"),
    (transposed, "prompt i goes with the response of prompt i + 1"),
    (last_left_out, "the last prompt has a partner"),
    (all_others, "only the next response"),
    (whole_matrix, "the whole matrix"),
    (added_up, "that is a sum"),
    (with_gradient, "detach it"),
    (absolute, "should be"),
    (each_row, "the shape is"),
    (lambda log_ratios: math.nan, "NaN"),
]
