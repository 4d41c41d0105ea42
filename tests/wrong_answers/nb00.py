"""Students' answers to notebook 00."""

import itertools
import math

import numpy as np
import torch


def product(table, prompt, response):
    p, last = torch.tensor(1.0).double(), prompt[-1]
    for token in response:
        p = p * table[last, token]
        last = token
    return p


def walk(table, prompt, response):
    text = prompt + response
    return [table[text[i - 1], text[i]].log() for i in range(len(prompt), len(text))]


def logp_sum(table, prompt, response):
    return sum(walk(table, prompt, response))


def logp_vector(table, prompt, response):
    before = torch.tensor([prompt[-1], *response[:-1]])
    return table.log()[before, torch.tensor(response)].sum()


def logp_float(table, prompt, response):
    total, last = 0.0, prompt[-1]
    for token in response:
        total += math.log(table[last][token].item())
        last = token
    return total


def without_eos(table, prompt, response):
    return logp_sum(table, prompt, response[:-1])


def whole_text(table, prompt, response):
    text = torch.tensor(prompt + response)
    return table[text[:-1], text[1:]].log().sum()


def response_alone(table, prompt, response):
    return sum(table[a, b].log() for a, b in itertools.pairwise(response))


def from_first_prompt_token(table, prompt, response):
    return table[[prompt[0], *response[:-1]], response].log().sum()


def column_first(table, prompt, response):
    return table[response, [prompt[-1], *response[:-1]]].log().sum()


def table_sum_mean(token_logps, lengths):
    sums = torch.stack([row[:n].sum() for row, n in zip(token_logps, lengths, strict=True)])
    return sums, sums / lengths


def numpy_sum_mean(token_logps, lengths):
    x, n = token_logps.numpy(), lengths.numpy()
    keep = np.arange(x.shape[1])[None] < n[:, None]
    return np.where(keep, x, 0).sum(1), np.where(keep, x, 0).sum(1) / n


def off_by_one_mask(token_logps, lengths):
    keep = torch.arange(token_logps.shape[1])[None] <= lengths[:, None]
    sums = (token_logps * keep).sum(1)
    return sums, sums / keep.sum(1)


def mask_from_one(token_logps, lengths):
    keep = torch.arange(1, token_logps.shape[1] + 1)[None] < lengths[:, None]
    sums = (token_logps * keep).sum(1)
    return sums, sums / keep.sum(1)


def masked_mean_by_width(token_logps, lengths):
    keep = torch.arange(token_logps.shape[1])[None] < lengths[:, None]
    return (token_logps * keep).sum(1), (token_logps * keep).mean(1)


def divided_by_mean_length(token_logps, lengths):
    sums = table_sum_mean(token_logps, lengths)[0]
    return sums, sums / lengths.float().mean()


def kl(policy_heads, reference_heads):
    p, q = policy_heads, reference_heads
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def kl_vectors(policy_heads, reference_heads):
    p, q = (np.array([h, 1 - h]) for h in (policy_heads, reference_heads))
    return (p * (np.log(p) - np.log(q))).sum()


def kl_torch(policy_heads, reference_heads):
    p, q = (torch.tensor([h, 1 - h], dtype=torch.float64) for h in (policy_heads, reference_heads))
    return torch.nn.functional.kl_div(q.log(), p, reduction="sum")


def kl_div_swapped(policy_heads, reference_heads):
    p, q = (torch.tensor([h, 1 - h], dtype=torch.float64) for h in (policy_heads, reference_heads))
    return torch.nn.functional.kl_div(p.log(), q, reduction="sum")


def kl_one_face(policy_heads, reference_heads):
    return policy_heads * math.log(policy_heads / reference_heads)


def kl_negative(policy_heads, reference_heads):
    p, q = policy_heads, reference_heads
    return p * math.log(q / p) + (1 - p) * math.log((1 - q) / (1 - p))


def kl_reference_weights(policy_heads, reference_heads):
    p, q = policy_heads, reference_heads
    return q * math.log(p / q) + (1 - q) * math.log((1 - p) / (1 - q))


def loop_best(rewards):
    total = 0.0
    for row in rewards:
        total += max(row.tolist())
    return total / rewards.shape[0]


WRONG = {
    "00.1": [
        (product, "this is the probability"),
        (lambda table, prompt, response: -logp_sum(table, prompt, response), "the sign"),
        (lambda table, prompt, response: torch.stack(walk(table, prompt, response)).mean(), "this is the mean"),
        (without_eos, "EOS is dropped"),
        (whole_text, "the prompt is scored"),
        (response_alone, "first token of the response is missing"),
        (from_first_prompt_token, "not by the first"),
        (column_first, "rows and columns"),
        (lambda table, prompt, response: torch.log2(product(table, prompt, response)), "base 2"),
        (lambda table, prompt, response: torch.log10(product(table, prompt, response)), "base 10"),
        (lambda table, prompt, response: logp_vector(table, prompt, response)[None], "shape"),
        (lambda table, prompt: 0.0, "stopped with"),
    ],
    "00.2": [
        (lambda token_logps, lengths: (token_logps.sum(1), token_logps.mean(1)), "padding is counted in both"),
        (lambda token_logps, lengths: (token_logps.sum(1), token_logps.sum(1) / lengths), "padding is counted in the sum"),
        (masked_mean_by_width, "divides by the width"),
        (mask_from_one, "last token"),
        (off_by_one_mask, "one token too many"),
        (lambda token_logps, lengths: table_sum_mean(token_logps, lengths)[::-1], "the order"),
        (divided_by_mean_length, "the mean length"),
        (lambda token_logps, lengths: table_sum_mean(token_logps, lengths)[0], "2 things are asked for"),
        (lambda token_logps, lengths: tuple(x.mean() for x in table_sum_mean(token_logps, lengths)), "shape"),
        (lambda token_logps, lengths: tuple(-x for x in table_sum_mean(token_logps, lengths)), "should be"),
    ],
    "00.3": [
        (lambda policy_heads, reference_heads: kl(reference_heads, policy_heads), "KL(reference || policy)"),
        (kl_div_swapped, "KL(reference || policy)"),
        (kl_negative, "the sign"),
        (kl_one_face, "tails are forgotten"),
        (kl_reference_weights, "weights are the reference's"),
        (lambda policy_heads, reference_heads: math.log(policy_heads / reference_heads)
         + math.log((1 - policy_heads) / (1 - reference_heads)), "without weights"),
        (lambda policy_heads, reference_heads: kl(policy_heads, reference_heads) / math.log(2), "in bits"),
        (lambda policy_heads, reference_heads: -policy_heads * math.log(reference_heads)
         - (1 - policy_heads) * math.log(1 - reference_heads), "cross-entropy"),
        (lambda policy_heads, reference_heads: kl(policy_heads, reference_heads)
         + kl(reference_heads, policy_heads), "should be"),
        (lambda policy_heads, reference_heads: abs(policy_heads - reference_heads), "should be"),
    ],
    "00.4": [
        (0.4, "single sample"), (0.0256, "all four are positive"), (0.1296, "none is positive"),
        (0.13, "none is positive"), (0.9744, "at least one is negative"), (1.6, "do not add up"),
        (1, "cannot be 1"), (87.04, "not percent"), (0.8, "should be"),
    ],
    "00.5": [
        (lambda rewards: rewards.max(dim=0).values.mean(), "still the bug"),
        (lambda rewards: rewards.max(), "best reward of all"),
        (lambda rewards: rewards.mean(), "nothing is chosen"),
        (lambda rewards: rewards.mean(1).max(), "best prompt's mean"),
        (lambda rewards: rewards.min(1).values.mean(), "worst sample"),
        (lambda rewards: rewards.mean(0).max(), "each sample number"),
        (lambda rewards: rewards.max(1).values, "one value a prompt"),
        (lambda rewards: rewards.max(1)[0].sum(), "the sum over the prompts"),
        (lambda rewards: rewards.argmax(1).double().mean(), "should be"),
        (lambda rewards: rewards.max(dim=1).values.median(), "should be"),
    ],
}  # fmt: skip

RIGHT = {
    "00.1": [logp_sum, logp_vector, logp_float, lambda table, prompt, response: product(table, prompt, response).log()],
    "00.2": [table_sum_mean, numpy_sum_mean,
             lambda token_logps, lengths: [list(map(float, x)) for x in table_sum_mean(token_logps, lengths)]],
    "00.3": [kl, kl_vectors, kl_torch],
    "00.4": [1 - 0.6**4, 0.87, 0.8704, torch.tensor(0.8704)],
    "00.5": [loop_best, lambda rewards: rewards.amax(-1).mean(), lambda rewards: np.max(rewards.numpy(), axis=1).mean()],
}  # fmt: skip
