"""PPO for language models, after Ziegler et al. 2019 and InstructGPT: sample, score, subtract the KL, update.

Two limits that are often confused: the clipped ratio keeps an update near the policy that *sampled* the batch;
the KL penalty keeps the policy near the *reference* and is part of the reward of every token.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from . import losses, parallel, sharding
from .advantages import AdaptiveKL, gae, kl_estimates, whiten
from .errors import UserError
from .logprobs import all_token_logps, batch_token_logps, predicting_states
from .models import ValueModel
from .parallel import spread
from .rewards import Score
from .sampling import sample
from .tokens import collate, pass_rows
from .training import TrainConfig, enough_memory, epoch_order, rng, train

__all__ = ["AdaptiveKL", "PPOConfig", "gae", "kl_estimates", "train_ppo", "whiten"]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    rollouts: int = 20
    episodes: int = 128  # responses a rollout
    epochs: int = 2  # passes over a rollout (Ziegler: 4, InstructGPT: 1)
    minibatches: int = 2
    learning_rate: float = 1e-4
    kl_coefficient: float = 0.05  # reward lost per nat, per token
    kl_target: float | None = None  # nats a response; None keeps the coefficient fixed
    kl_horizon: int = 500  # a fifth of a mini run's episodes; Ziegler's 10,000 belong to a million episodes
    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_score: float | None = (
        None  # replaces the score of a response that never ends (the "EOS trick")
    )
    max_tokens: int = 32
    temperature: float = 1.0
    sample_batch: int = 256  # episodes sampled at once; several processes share a rollout in such blocks
    seed: int = 0

    @property
    def updates_a_rollout(self) -> int:
        return self.epochs * self.minibatches


@dataclasses.dataclass
class Rollout:
    """What a batch of episodes leaves behind; lists hold one 1-D tensor of response tokens for each episode."""

    prompts: list[list[int]]
    responses: list[list[int]]
    logps: list[torch.Tensor]
    values: list[torch.Tensor]
    advantages: list[torch.Tensor]
    returns: list[torch.Tensor]
    metrics: dict


def train_ppo(
    policy, prompts: Sequence[Sequence[int]], score: Score, *, tokenizer, reference, config: PPOConfig,
    pretraining: Sequence[Sequence[int]] | None = None, ptx_weight: float = 1.0, **loop,
):  # fmt: skip
    """Train `policy` in place on prompts (token ids) to raise score(prompts, responses) minus the KL penalty.

    pretraining: texts (token ids, two or more each); given, this is PPO-ptx (InstructGPT eq. 2): an update also
      raises `ptx_weight` times their mean log-prob per token, on as many texts as it has episodes.
    Returns the metrics, one row an update; `loop` goes to `training.train`.
    """
    if pretraining is not None and (ptx_weight < 0 or min(map(len, pretraining), default=0) < 2):
        raise UserError("pretraining needs texts of at least two tokens each, and ptx_weight at least 0")
    model = ValueModel(policy)
    state = {"kl_coefficient": config.kl_coefficient}
    current: list[Rollout] = []
    whole = [0, 0]  # response tokens and pretraining tokens of the batch

    def batch_of(step):
        """Rows of the rollout, each with a pretraining text or None."""
        number, update = divmod(step, config.updates_a_rollout)
        if update == 0:
            with sharding.whole(model), sharding.whole(reference):
                current[:] = [roll_out(model, reference, prompts, score, tokenizer, config, number, state)]
        epoch, part = divmod(update, config.minibatches)
        order = rng(config.seed, 31, number, epoch).permutation(len(current[0].prompts))
        rows = np.array_split(order, config.minibatches)[part]
        rows = sorted(rows, key=lambda i: len(current[0].prompts[i]) + len(current[0].responses[i]))
        texts = []
        if pretraining is not None:
            texts = [pretraining[i] for i in epoch_order(len(pretraining), len(rows), step, config.seed)]
        whole[:] = [response_tokens(rows), sum(len(t) - 1 for t in texts)]
        return list(itertools.zip_longest(rows, texts))

    def response_tokens(rows):
        return sum(len(current[0].responses[i]) for i in rows)

    def split(batch, count):
        return [(part, response_tokens([i for i, _ in part])) for part in spread(batch, count)]

    def loss_of(batch):
        rows, texts = [i for i, _ in batch], [text for _, text in batch if text]
        loss, metrics = ppo_loss(model, current[0], rows, tokenizer.pad_token_id, config)
        if pretraining is None:
            return loss, metrics
        # a part of the batch is weighted by its response tokens; its texts count by their own
        share = sum(len(t) - 1 for t in texts) / whole[1] * (whole[0] / response_tokens(rows))
        texts = texts or [pretraining[0]]  # at no weight: under FSDP each part must make the same passes
        nll = share * pretraining_loss(policy, texts, tokenizer.pad_token_id)
        return loss + ptx_weight * nll, {**metrics, "pretraining_loss": nll.detach()}  # InstructGPT eq. 2

    train_config = TrainConfig(
        steps=config.rollouts * config.updates_a_rollout,
        learning_rate=config.learning_rate,
        warmup=0.05,
        schedule="linear",
        final=0.1,
        seed=config.seed,
    )
    ptx = {} if pretraining is None else {"ptx": [ptx_weight, len(pretraining)]}
    loop["fingerprint"] = {**(loop.get("fingerprint") or {}), "ppo": dataclasses.asdict(config), **ptx}
    with sharding.spread(reference):
        return train(
            model, batch_of, loss_of, train_config,
            state=state, save_multiple=config.updates_a_rollout, split=split, **loop,
        )  # fmt: skip


def roll_out(model, reference, prompts, score, tokenizer, config, number: int, state: dict) -> Rollout:
    """Sample one response for each of `episodes` prompts and work out rewards, advantages and returns."""
    rows = epoch_order(len(prompts), config.episodes, number, config.seed)
    chosen = [list(prompts[i]) for i in rows]
    columns: list[dict] = [{}, {}, {}, {}, {}]  # responses, scores, log-probs, values, reference log-probs
    starts = range(0, len(chosen), config.sample_batch)
    for block in parallel.share(len(starts)):
        first = starts[block]
        some = chosen[first : first + config.sample_batch]
        seed = int(rng(config.seed, 37, number, *([block] if block else [])).integers(2**31))
        with enough_memory(some, "PPOConfig.sample_batch {} in rlhf_edu/scales.py"):
            made = episodes(model, reference, some, score, tokenizer, config, seed)
        for column, values in zip(columns, made, strict=True):
            column |= {first + i: value for i, value in enumerate(values)}
    device = model.policy.device
    responses, scores, *rest = (parallel.from_all(column, len(chosen), device) for column in columns)
    responses = [r.long().tolist() for r in responses]
    logps, values, ref_logps = (torch.cat(parts).float() for parts in rest)
    lengths, scores = [len(r) for r in responses], torch.cat(scores).float()
    log_ratio = logps - ref_logps  # k1: its expectation under the policy is the KL from the reference
    rewards = list((-state["kl_coefficient"] * log_ratio).split(lengths))
    for row, value in zip(rewards, scores.to(log_ratio.device), strict=True):
        row[-1] += value  # one score a response, given at its last token
    mask = pad_sequence(
        [torch.ones(n, dtype=torch.bool, device=logps.device) for n in lengths], batch_first=True
    )
    padded_rewards = pad_sequence(rewards, batch_first=True)
    if config.whiten_rewards:
        padded_rewards = whiten(padded_rewards, mask, shift_mean=False)
    padded_values = pad_sequence(list(values.split(lengths)), batch_first=True)
    advantages, returns = gae(padded_rewards, padded_values, gamma=config.gamma, lam=config.lam, mask=mask)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    kl = torch.stack([part.sum() for part in log_ratio.split(lengths)]).mean().item()
    metrics = {
        "score": scores.mean().item(),
        "kl": kl,
        "length": float(np.mean(lengths)),
        "kl_coefficient": state["kl_coefficient"],
    }
    if config.kl_target is not None:
        adaptive = AdaptiveKL(state["kl_coefficient"], config.kl_target, config.kl_horizon)
        state["kl_coefficient"] = adaptive.update(kl, len(chosen))
    by_row = [list(x[mask].split(lengths)) for x in (advantages, returns)]
    return Rollout(
        chosen, responses, list(logps.split(lengths)), list(values.split(lengths)), *by_row, metrics
    )


def episodes(model: ValueModel, reference, prompts, score: Score, tokenizer, config: PPOConfig, seed: int):
    """Responses, scores, log-probs, values and reference log-probs: five lists of 1-D tensors, in the prompts' order."""
    responses = sample(
        model.policy, prompts, eos_id=tokenizer.eos_token_id, max_tokens=config.max_tokens,
        temperature=config.temperature, seed=seed, batch_size=config.sample_batch,
    )  # fmt: skip
    pad = tokenizer.pad_token_id
    scores = torch.as_tensor(np.asarray(score(prompts, responses)), dtype=torch.float32)
    if config.missing_eos_score is not None:
        unended = torch.tensor([r[-1] != tokenizer.eos_token_id for r in responses])
        scores = scores.masked_fill(unended, config.missing_eos_score)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))  # little padding
    with torch.no_grad():
        both = ppo_forward(
            model, [prompts[i] for i in order], [responses[i] for i in order], pad, config.temperature
        )
    lengths = [len(responses[i]) for i in order]
    logps, values = (in_order(x.split(lengths), order) for x in both)
    # at the policy's temperature, or the KL of two equal models would not be 0
    ref_logps = all_token_logps(reference, pad, prompts, responses, temperature=config.temperature or 1.0)
    return [torch.tensor(r) for r in responses], list(scores[:, None]), logps, values, ref_logps


def ppo_forward(model: ValueModel, prompts, responses, pad_id: int, temperature: float):
    """Log-prob and value of each response token, in row order; the value is that of the state before the token.

    Rows sorted by length cost least, since they are computed in chunks.
    """
    logps, values, chunk = [], [], pass_rows(model.policy.device)
    for start in range(0, len(prompts), chunk):
        part = slice(start, start + chunk)
        batch = collate(prompts[part], responses[part], pad_id, model.policy.device)
        states = predicting_states(model.policy, batch)
        # responses sampled at a temperature are scored at that temperature
        logits = model.policy.get_output_embeddings()(states).float() / (temperature or 1.0)
        targets = batch["input_ids"][:, 1:][batch["response_mask"][:, 1:]]
        logps.append(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
        values.append(model.value(states)[:, 0].float())
    return torch.cat(logps), torch.cat(values)


def in_order(parts: Sequence[torch.Tensor], order: Sequence[int]) -> list[torch.Tensor]:
    """The parts of rows taken in `order`, put back as the rows stood."""
    back = [None] * len(parts)
    for place, part in zip(order, parts, strict=True):
        back[place] = part
    return back


def ppo_loss(model: ValueModel, rollout: Rollout, rows, pad_id: int, config: PPOConfig):
    """Policy and value loss of some episodes, means over their response tokens."""
    logps, values = ppo_forward(
        model,
        [rollout.prompts[i] for i in rows],
        [rollout.responses[i] for i in rows],
        pad_id,
        config.temperature,
    )
    old_logps, old_values, advantages, returns = (
        torch.cat([part[i] for i in rows])
        for part in (rollout.logps, rollout.values, rollout.advantages, rollout.returns)
    )
    policy_loss = losses.ppo_policy_loss(logps, old_logps, advantages, clip=config.clip).mean()
    value_loss = losses.ppo_value_loss(values, old_values, returns, clip=config.value_clip).mean()
    with torch.no_grad():
        log_ratio = logps - old_logps
        clipped = ((log_ratio.exp() - 1).abs() > config.clip).float().mean()
        moved = (
            torch.expm1(log_ratio) - log_ratio
        ).mean()  # k3 of KL(old || new), from samples of the old policy
    metrics = {
        "policy_loss": policy_loss.detach(),
        "value_loss": value_loss.detach(),
        "clip_fraction": clipped,
    }
    return policy_loss + config.value_weight * value_loss, {**metrics, "step_kl": moved, **rollout.metrics}


def pretraining_loss(policy, texts: Sequence[Sequence[int]], pad_id: int):
    """Mean negative log-prob per token of texts (token ids), each token but a text's first: a scalar, in nats."""
    batch = collate([t[:1] for t in texts], [t[1:] for t in texts], pad_id, policy.device)
    return -batch_token_logps(policy, batch).mean()
