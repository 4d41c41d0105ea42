"""Students' answers to notebook 01."""

import math

import torch
import torch.nn.functional as F

ALL = "nothing is masked"


def per_token(logits, token_ids):
    return torch.log_softmax(logits[:, :-1], -1).gather(2, token_ids[:, 1:].unsqueeze(2)).squeeze(2)


def logps_gather(logits, token_ids, response_mask):
    m = response_mask[:, 1:]
    return (per_token(logits, token_ids) * m).sum(-1), m.sum(-1)


def logps_cross_entropy(logits, token_ids, response_mask):
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), token_ids[:, 1:], reduction="none")
    return -torch.where(response_mask[:, 1:], nll, 0.0).sum(1), response_mask.sum(1)


def logps_loop(logits, token_ids, response_mask):
    sums = []
    for b in range(len(logits)):
        total = 0.0
        for t in range(1, logits.shape[1]):
            if response_mask[b, t]:
                total = total + logits[b, t - 1, token_ids[b, t]] - torch.logsumexp(logits[b, t - 1], 0)
        sums.append(total)
    return torch.stack(sums), response_mask.sum(1)


def no_shift(logits, token_ids, response_mask):
    picked = logits.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    return (picked * response_mask).sum(1), response_mask.sum(1)


def back_shift(logits, token_ids, response_mask):
    picked = logits[:, 1:].log_softmax(-1).gather(-1, token_ids[:, :-1, None])[..., 0]
    return (picked * response_mask[:, :-1]).sum(1), response_mask[:, :-1].sum(1)


def twice_shifted(logits, token_ids, response_mask):
    picked = logits[:, :-2].log_softmax(-1).gather(-1, token_ids[:, 2:, None])[..., 0]
    return (picked * response_mask[:, 2:]).sum(1), response_mask[:, 2:].sum(1)


def mask_not_shifted(logits, token_ids, response_mask):
    m = response_mask[:, :-1]
    return (per_token(logits, token_ids) * m).sum(1), m.sum(1)


def no_mask(logits, token_ids, response_mask):
    picked = per_token(logits, token_ids)
    return picked.sum(1), torch.full((len(picked),), picked.shape[1])


def eos_left_out(logits, token_ids, response_mask):
    m = response_mask[:, 1:] & torch.cat([response_mask[:, 2:], torch.zeros_like(response_mask[:, :1])], 1)
    return (per_token(logits, token_ids) * m).sum(1), m.sum(1)


def first_left_out(logits, token_ids, response_mask):
    m = response_mask[:, 1:] & response_mask[:, :-1]
    return (per_token(logits, token_ids) * m).sum(1), m.sum(1)


def prompt_counted(logits, token_ids, response_mask):
    end = response_mask.shape[1] - response_mask.flip(1).int().argmax(1)
    m = (torch.arange(response_mask.shape[1]) < end[:, None])[:, 1:]
    return (per_token(logits, token_ids) * m).sum(1), m.sum(1)


def padding_counted(logits, token_ids, response_mask):
    m = (torch.arange(response_mask.shape[1]) >= response_mask.int().argmax(1)[:, None])[:, 1:]
    return (per_token(logits, token_ids) * m).sum(1), m.sum(1)


def raw(logits, token_ids, response_mask):
    picked = logits[:, :-1].gather(2, token_ids[:, 1:, None]).squeeze(2)
    return (picked * response_mask[:, 1:]).sum(1), response_mask[:, 1:].sum(1)


def detached(logits, token_ids, response_mask):
    with torch.no_grad():
        return logps_gather(logits, token_ids, response_mask)


def padded_lengths(logits, token_ids, response_mask):
    return logps_gather(logits, token_ids, response_mask)[0], torch.tensor(
        [token_ids.shape[1]] * len(token_ids)
    )


def changed(f, how):
    return lambda logits, token_ids, response_mask: how(*f(logits, token_ids, response_mask))


# --- 01.2 ---


def mask_from(token_ids, start, end):
    i = torch.arange(token_ids.shape[1])[None]
    return (i >= start[:, None]) & (i < end[:, None])


def loss_of(counting=logps_gather, reduce=lambda s, n: -s.sum() / n.sum(), start=0, end=0):
    def answer(logits, token_ids, prompt_lengths, lengths):
        mask = mask_from(token_ids, prompt_lengths + start, lengths + end)
        return reduce(*counting(logits, token_ids, mask))

    return answer


def loss_ignore_index(logits, token_ids, prompt_lengths, lengths):
    labels = token_ids.clone()
    for b in range(len(labels)):
        labels[b, : prompt_lengths[b]] = -100
        labels[b, lengths[b] :] = -100
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_lists(logits, token_ids, prompt_lengths, lengths):
    parts = []
    for z, ids, p, n in zip(logits, token_ids, prompt_lengths, lengths, strict=True):
        parts.append(F.cross_entropy(z[p - 1 : n - 1], ids[p:n], reduction="none"))
    return torch.cat(parts).mean()


def loss_of_whole_batch(logits, token_ids, prompt_lengths, lengths):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())


def loss_padding_forgotten(logits, token_ids, prompt_lengths, lengths):
    keep = torch.arange(token_ids.shape[1])[None] >= prompt_lengths[:, None]
    return -per_token(logits, token_ids)[keep[:, 1:]].mean()


def loss_masked_mean(logits, token_ids, prompt_lengths, lengths):
    return -(per_token(logits, token_ids) * mask_from(token_ids, prompt_lengths, lengths)[:, 1:]).mean()


def loss_over_cells(logits, token_ids, prompt_lengths, lengths):
    mask = mask_from(token_ids, prompt_lengths, lengths)
    return -logps_gather(logits, token_ids, mask)[0].sum() / mask.numel()


# --- 01.4 ---


def by_value(prompts, responses, pad_id):
    labels = right_labels(prompts, responses, pad_id)
    for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        labels[row, len(p) : len(p) + len(r)] = torch.tensor(r)
    labels[labels == pad_id] = -100
    return labels


def right_labels(prompts, responses, pad_id):
    texts = [p + r for p, r in zip(prompts, responses, strict=True)]
    longest = max(map(len, texts))
    return torch.tensor(
        [
            [-100] * len(p) + r + [-100] * (longest - len(p) - len(r))
            for p, r in zip(prompts, responses, strict=True)
        ]
    )


def labels_where(prompts, responses, pad_id):
    n = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    ids = torch.tensor(
        [p + r + [pad_id] * (max(n) - k) for p, r, k in zip(prompts, responses, n, strict=True)]
    )
    inside = mask_from(ids, torch.tensor([len(p) for p in prompts]), torch.tensor(n))
    return torch.where(inside, ids, -100)


def last_line_removed(prompts, responses, pad_id):
    time = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    labels = torch.full((len(prompts), time), pad_id)
    for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        labels[row, : len(p) + len(r)] = torch.tensor([*p, *r])
        labels[row, : len(p)] = -100
    return labels


def first_pad_kept(prompts, responses, pad_id):
    labels = right_labels(prompts, responses, pad_id)
    for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        if len(p) + len(r) < labels.shape[1]:
            labels[row, len(p) + len(r)] = pad_id
    return labels


def prompt_kept(prompts, responses, pad_id):
    return right_labels(
        [[] for _ in prompts], [p + r for p, r in zip(prompts, responses, strict=True)], pad_id
    )


def already_shifted(prompts, responses, pad_id):
    labels = right_labels(prompts, responses, pad_id).roll(-1, 1)
    labels[:, -1] = -100
    return labels


def zeros_for_masked(prompts, responses, pad_id):
    labels = right_labels(prompts, responses, pad_id)
    return torch.where(labels == -100, 0, labels)


# --- 01.5 ---


def rolled_twice(logits, token_ids, response_mask):
    targets, counted = token_ids.roll(-1, 1), response_mask.roll(-1, 1)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, targets[:, 1:, None])[..., 0]
    return -(logps * counted[:, 1:]).sum() / counted[:, 1:].sum()


def rolled_once(logits, token_ids, response_mask):
    targets, counted = token_ids.roll(-1, 1)[:, :-1], response_mask.roll(-1, 1)[:, :-1]
    logps = logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return -(logps * counted).sum() / counted.sum()


def only_targets_mended(logits, token_ids, response_mask):
    counted = response_mask.roll(-1, 1)[:, 1:]
    return -(per_token(logits, token_ids) * counted).sum() / counted.sum()


def neither_shifted(logits, token_ids, response_mask):
    logps = logits.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    return -(logps * response_mask).sum() / response_mask.sum()


def mask_kept_unshifted(logits, token_ids, response_mask):
    return -per_token(logits, token_ids)[response_mask[:, :-1]].mean()


def boolean_index(logits, token_ids, response_mask):
    return -per_token(logits, token_ids)[response_mask[:, 1:]].mean()


def mean_of(counting):
    return changed(counting, lambda s, n: -s.sum() / n.sum())


# --- 01.6 ---


def rate(step, steps, peak, final):
    low = peak * final
    return low + (peak - low) * (1 + math.cos(step / steps * math.pi)) / 2


def rate_torch(step, steps, peak, final):
    weights = [torch.zeros(1, requires_grad=True)]
    optimizer = torch.optim.SGD(weights, lr=peak)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=final * peak)
    for _ in range(step):
        optimizer.step()
        schedule.step()
    return optimizer.param_groups[0]["lr"]


def with_angle(angle):
    return lambda step, steps, peak, final: (
        peak * (final + (1 - final) * (1 + math.cos(angle(step, steps))) / 2)
    )


PI = math.pi
WRONG = {
    "01.1": [
        (no_shift, "there is no shift"),
        (back_shift, "the wrong way"),
        (twice_shifted, "shifted twice"),
        (mask_not_shifted, "mask is not shifted"),
        (no_mask, ALL),
        (eos_left_out, "EOS is dropped"),
        (first_left_out, "first token of the response is lost"),
        (prompt_counted, "prompt is not masked"),
        (padding_counted, "padding is counted"),
        (raw, "these are logits"),
        (detached, "detached"),
        (changed(logps_gather, lambda s, n: (-s, n)), "the sign"),
        (changed(logps_gather, lambda s, n: (s / n, n)), "this is the mean"),
        (changed(logps_gather, lambda s, n: (n, s)), "the order"),
        (changed(logps_gather, lambda s, n: (s, n - 1)), "leave EOS out"),
        (padded_lengths, "count prompt or padding"),
        (changed(logps_gather, lambda s, n: s), "2 things are asked for"),
        (changed(logps_gather, lambda s, n: (s.detach(), n)), "detached"),
        (changed(logps_gather, lambda s, n: (s.sum(), n.sum())), "shape"),
        (changed(logps_gather, lambda s, n: (s.exp(), n)), "should be"),
    ],
    "01.2": [
        (loss_of(no_shift), "there is no shift"),
        (loss_of(back_shift), "the wrong way"),
        (loss_of(twice_shifted), "shifted twice"),
        (loss_of(mask_not_shifted), "mask is not shifted"),
        (loss_over_cells, "batch times time"),
        (loss_of_whole_batch, ALL),
        (loss_padding_forgotten, "padding is counted"),
        (loss_of(start=-100), "prompt is not masked"),
        (loss_of(end=-1), "EOS is dropped"),
        (loss_of(start=1), "first token of the response is lost"),
        (loss_of(raw), "these are logits"),
        (loss_of(detached), "detached"),
        (loss_of(reduce=lambda s, n: s.sum() / n.sum()), "the sign"),
        (loss_of(reduce=lambda s, n: -(s / n).mean()), "each response's own mean"),
        (loss_of(reduce=lambda s, n: -s.sum()), "this is a sum"),
        (loss_of(reduce=lambda s, n: -s.mean()), "number of responses"),
        (loss_masked_mean, "all places of the batch"),
        (loss_of(reduce=lambda s, n: -s / n), "shape"),
        (loss_of(end=1), "should be"),
    ],
    "01.3": [("A", "side effect"), ("b", "single target"), ("none", "is not it")],
    "01.4": [
        (by_value, "still the bug"),
        (last_line_removed, "padding is a target"),
        (first_pad_kept, "one pad is a target"),
        (prompt_kept, "prompt is not masked"),
        (already_shifted, "labels are shifted"),
        (zeros_for_masked, "must be -100"),
        (lambda prompts, responses, pad_id: right_labels(prompts, [r[:-1] for r in responses], pad_id), "shape"),
    ],
    "01.5": [
        (rolled_twice, "shifted twice"),
        (only_targets_mended, "mask is still shifted twice"),
        (neither_shifted, "there is no shift"),
        (mean_of(back_shift), "the wrong way"),
        (mean_of(padding_counted), "padding is counted"),
        (mean_of(prompt_counted), "prompt is not masked"),
        (mean_of(eos_left_out), "EOS is dropped"),
        (mean_of(first_left_out), "first token of the response is lost"),
        (mask_kept_unshifted, "mask is not shifted"),
        (lambda logits, token_ids, response_mask: -per_token(logits, token_ids).mean(), ALL),
        (lambda logits, token_ids, response_mask: -boolean_index(logits, token_ids, response_mask), "the sign"),
        (changed(logps_gather, lambda s, n: -(s / n).mean()), "own mean"),
        (changed(logps_gather, lambda s, n: -s.sum()), "should be"),
    ],
    "01.6": [
        (lambda step, steps, peak, final: peak * (1 + math.cos(PI * step / steps)) / 2, "falls to 0"),
        (lambda step, steps, peak, final: peak * final + peak * (1 + math.cos(PI * step / steps)) / 2, "above the peak"),
        (lambda step, steps, peak, final: peak - (peak - final * peak) * step / steps, "straight line"),
        (lambda step, steps, peak, final: peak * (final + (1 - final) * (1 - math.cos(PI * step / steps)) / 2), "rises"),
        (lambda step, steps, peak, final: peak * (final + (1 - final) * math.cos(PI * step / steps)), "from 1 to -1"),
        (lambda step, steps, peak, final: peak * (final + (1 - final) * math.cos(PI * step / steps / 2)), "quarter turn"),
        (with_angle(lambda s, n: 2 * PI * s / n), "2 pi"),
        (with_angle(lambda s, n: PI * s / (n - 1)), "off by one: the angle"),
        (with_angle(lambda s, n: PI * (s + 1) / n), "off by one: step 0"),
        (with_angle(lambda s, n: 180 * s / n), "degrees"),
        (lambda step, steps, peak, final: max(final * peak, peak * (1 + math.cos(PI * step / steps)) / 2), "floor too long"),
        (with_angle(lambda s, n: s / n), "should be"),
    ],
    "01.7": [("A", "training loss"), ("c", "first pass does help"), (2, "a text is asked for")],
}  # fmt: skip

RIGHT = {
    "01.1": [logps_gather, logps_cross_entropy, logps_loop],
    "01.2": [loss_of(), loss_ignore_index, loss_lists],
    "01.3": ["C", " c "],
    "01.4": [
        right_labels,
        labels_where,
        lambda prompts, responses, pad_id: right_labels(prompts, responses, 0).tolist(),
    ],
    "01.5": [boolean_index, rolled_once, changed(logps_cross_entropy, lambda s, n: -s.sum() / n.sum())],
    "01.6": [rate, rate_torch],
    "01.7": ["B", "b"],
}
