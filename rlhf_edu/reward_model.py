"""The reward model: a scalar for each response, trained so that the chosen one of a pair gets more."""

import functools

import torch

from . import losses
from .models import class_logits
from .pairs import TokenPairs, by_chunks, pair_batch, sequences_of, tokenize_pairs
from .preference import split_pairs
from .rewards import classifier_logits
from .training import TrainConfig, train


def train_reward_model(model, comparisons, *, tokenizer, config: TrainConfig, batch_size: int = 64, **loop):
    """Train a one-label classifier in place on comparisons; return metrics, one row an update.

    All pairs of a prompt travel in one batch and each response is scored once (InstructGPT 3.5): shuffled pairs
    would show each response K-1 times an epoch, and the model would overfit.
    """
    pairs = comparisons if isinstance(comparisons, TokenPairs) else tokenize_pairs(comparisons, tokenizer)

    def rewards_of(batch):
        return class_logits(model, batch)[:, 0].float()

    def loss_of(rows):
        used, chosen, rejected = sequences_of(pairs, rows)
        rewards = by_chunks(pairs, used, rewards_of, tokenizer.pad_token_id, model.device)
        per_pair = losses.reward_pair_loss(rewards[chosen], rewards[rejected])
        with torch.no_grad():
            metrics = {
                "accuracy": (rewards[chosen] > rewards[rejected]).float().mean(),
                "margin": (rewards[chosen] - rewards[rejected]).mean(),
            }
        return per_pair.mean(), metrics

    def batch_of(step):
        return pair_batch(pairs, step, batch_size, config.seed)

    split = functools.partial(split_pairs, pairs)
    return train(model, batch_of, loss_of, config, split=split, **loop)


def pair_accuracy(model, comparisons, tokenizer) -> float:
    """Share of comparisons in which the chosen response gets the higher reward."""
    pairs = comparisons if isinstance(comparisons, TokenPairs) else tokenize_pairs(comparisons, tokenizer)
    rewards = classifier_logits(model, tokenizer.pad_token_id, pairs.prompts, pairs.responses)[:, 0]
    return (rewards[pairs.chosen] > rewards[pairs.rejected]).float().mean().item()
