"""Bugs on purpose: every place of a training where a bug can sit, the right code for it, and wrong code beside it.

A `Recipe` holds one function a place, right by default; a bug replaces one of them and nothing else of a run changes.
To train for real, use `sft`, `preference` and `ppo`: these runs are as small as they can be. What they *log* (loss,
margin, ...) comes from their own, perhaps wrong, code; what is *measured* (reward, kl, ended, length) never does.
"""

import dataclasses
from collections.abc import Callable

import pandas as pd
import torch

from . import evaluate, losses, models, sampling, tokens
from .advantages import gae, whiten
from .training import epoch_order

TEMPERATURE = 0.7  # of PPO, as in Ziegler et al.: it divides the logits, in sampling and in scoring

# --- from text to a batch: ids and the mask of what counts, both (batch, time) ---


def encode(tokenizer, prompt, response):
    """Two texts -> prompt ids, response ids with EOS."""
    prompt_ids, response_ids = tokens.encode(tokenizer, [prompt, response])
    return prompt_ids, [*response_ids, tokenizer.eos_token_id]


def encode_without_eos(tokenizer, prompt, response):
    prompt_ids, response_ids = encode(tokenizer, prompt, response)
    return prompt_ids, response_ids[:-1]


def encode_with_two_bos(tokenizer, prompt, response):
    prompt_ids, response_ids = encode(tokenizer, prompt, response)
    return [tokenizer.bos_token_id] * 2 + prompt_ids, response_ids


def collate(prompts, responses, tokenizer):
    batch = tokens.collate(prompts, responses, tokenizer.pad_token_id, models.best_device())
    return batch["input_ids"], batch["response_mask"]


def collate_prompt_counted(prompts, responses, tokenizer):
    ids, _ = collate(prompts, responses, tokenizer)
    mask = ids != tokenizer.pad_token_id
    mask[:, 0] = False  # nothing predicts the first token
    return ids, mask


def collate_padding_counted(prompts, responses, tokenizer):
    ids, mask = collate(prompts, responses, tokenizer)
    return ids, mask.cumsum(1) > 0  # from the first token of the response to the end of the row


def collate_pad_is_eos(prompts, responses, tokenizer):
    """`labels[labels == pad] = -100` where the tokenizer pads with EOS."""
    ids, mask = collate(prompts, responses, tokenizer)
    ids[ids == tokenizer.pad_token_id] = tokenizer.eos_token_id
    return ids, mask & (ids != tokenizer.eos_token_id)


# --- from a batch to log-probs ---


def token_logps(model, ids, temperature=1.0):
    """(batch, time) -> log-prob of each token but the first, (batch, time - 1)."""
    logits = model(ids).logits[:, :-1].float() / temperature
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def sums(model, ids, mask):
    """(batch, time) twice -> summed log-prob of each response, (batch,)."""
    return (token_logps(model, ids) * mask[:, 1:]).sum(1)


def sums_not_shifted(model, ids, mask):
    """The logits at position t score the token at t, which the model has just read."""
    logps = model(ids).logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return (logps * mask).sum(1)


def sums_are_means(model, ids, mask):
    return sums(model, ids, mask) / mask[:, 1:].sum(1)


# --- reference and loss ---


def frozen_copy(policy):
    return models.freeze(models.copy_of(policy))


def reference_in_train_mode(policy, dropout=0.1):
    """In an architecture that has dropout; ours has none, so it gets GPT-2's 0.1."""
    reference = frozen_copy(policy)
    for module in reference.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return reference.train()


# --- PPO: the reward of each token, (batch, time) ---


def place(scores, mask):
    """The score of each response (batch,) at its last token."""
    return scores[:, None] * (mask & (mask.cumsum(1) == mask.sum(1, keepdim=True)))


def place_one_past(scores, mask):
    """One position further, where no token is left to be rewarded."""
    return place(scores, mask).roll(1, dims=1) * ~mask


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One function for each place where a bug can sit; `Recipe()` is right."""

    encode: Callable = encode
    collate: Callable = collate
    sums: Callable = sums
    reference: Callable = frozen_copy
    loss: Callable = losses.dpo_loss  # with its default, beta 0.1
    learning_rate: float = 1.0  # times that of the run
    penalty: Callable = torch.positive  # of the log-ratio: k1, whose mean over samples is the KL, is itself
    place: Callable = place
    scale: Callable = lambda rewards, mask: rewards  # as they are: advantages are whitened later
    scoring_temperature: float = TEMPERATURE

    def batch(self, tokenizer, prompts, responses):
        both = [self.encode(tokenizer, p, r) for p, r in zip(prompts, responses, strict=True)]
        return self.collate([p for p, _ in both], [r for _, r in both], tokenizer)


# --- the runs: (curves, one row a step, the last one without an update; the policy) ---


def train(world, start, recipe, step_of, *, learning_rate, steps, looks=(), heldout=(), max_tokens=32):
    """`step_of(policy, reference, step, row)` yields a loss for each update and writes its log into `row`."""
    policy, rate, rows = models.copy_of(start).requires_grad_(True), learning_rate * recipe.learning_rate, []
    reference = recipe.reference(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    measure = {"tokenizer": world.tokenizer, "seed": 9, "max_tokens": max_tokens}
    for step in range(steps + 1):
        rows.append({"step": step})
        if heldout and (step in looks or step == steps):
            rows[-1] |= evaluate.evaluate_policy(policy, world.sft, heldout, world.true_score, **measure)
        for loss in step_of(policy, reference, step, rows[-1]):
            if step < steps:
                policy.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()  # NaN goes where NaN goes: `training.train` would have stopped
    return pd.DataFrame(rows), policy


def sft_run(world, rows, recipe, *, batch_size, seed=0, learning_rate=1e-3, **loop):
    """SFT of the base policy on rows {"prompt", "completion"}."""

    def step_of(policy, reference, step, log):
        some = [rows[int(i)] for i in epoch_order(len(rows), batch_size, step, seed)]
        ids, mask = recipe.batch(
            world.tokenizer, [r["prompt"] for r in some], [r["completion"] for r in some]
        )
        loss = -recipe.sums(policy, ids, mask).sum() / mask.sum()
        log["loss"] = loss.item()
        yield loss

    return train(world, world.base, recipe, step_of, learning_rate=learning_rate, **loop)


def dpo_run(world, pairs, recipe, *, batch_size, seed=0, learning_rate=3e-4, **loop):
    """A loss on rows {"prompt", "chosen", "rejected"}, from the SFT policy; log-ratios and margin in nats."""

    def step_of(policy, reference, step, log):
        some = [pairs[int(i)] for i in epoch_order(len(pairs), batch_size, step, seed)]
        texts = [p[side] for side in ("chosen", "rejected") for p in some]
        ids, mask = recipe.batch(world.tokenizer, [p["prompt"] for p in some] * 2, texts)
        with torch.no_grad():
            ref_w, ref_l = recipe.sums(reference, ids, mask).chunk(2)
        w, l = recipe.sums(policy, ids, mask).chunk(2)
        loss = recipe.loss(w, l, ref_w, ref_l).mean()
        log |= {
            "loss": loss.item(),
            "chosen": (w - ref_w).mean().item(),
            "rejected": (l - ref_l).mean().item(),
        }
        log["margin"] = log["chosen"] - log["rejected"]
        yield loss

    return train(world, world.sft, recipe, step_of, learning_rate=learning_rate, **loop)


def ppo_run(world, prompts, recipe, *, episodes, coefficient=0.03, seed=0, learning_rate=3e-4, **loop):
    """PPO without a critic: the baseline is the mean reward to go at a position. A step: a rollout, two updates."""

    def step_of(policy, reference, step, log):
        some = [prompts[i] for i in epoch_order(len(prompts), episodes, step, seed)]
        limits = {"max_tokens": loop["max_tokens"], "temperature": TEMPERATURE, "seed": 1000 * seed + step}
        responses = sampling.sample(policy, some, eos_id=world.tokenizer.eos_token_id, **limits)
        ids, mask = recipe.collate(some, responses, world.tokenizer)
        mask, scores = mask[:, 1:], torch.as_tensor(world.true_score(some, responses)).float().to(ids.device)
        with torch.no_grad():
            old = token_logps(policy, ids, TEMPERATURE)  # of the sampler
            log_ratio = (old - token_logps(reference, ids, recipe.scoring_temperature)) * mask
            paid = recipe.penalty(log_ratio)
            rewards = recipe.scale(recipe.place(scores, mask) * mask - coefficient * paid, mask)
            to_go = gae(rewards, torch.zeros_like(rewards), mask=mask)[0]
            advantages = whiten(to_go - to_go.sum(0) / mask.sum(0).clamp(min=1), mask)
        log |= {"score": scores.mean().item(), "logged_kl": paid.sum(1).mean().item()}
        for epoch in range(2):
            logps = token_logps(policy, ids, recipe.scoring_temperature)
            log.setdefault(
                "ratio_off", ((logps - old)[mask].exp() - 1).abs().mean().item()
            )  # before an update
            yield losses.ppo_policy_loss(logps, old, advantages)[mask].mean()

    return train(world, world.sft, recipe, step_of, learning_rate=learning_rate, **loop)
