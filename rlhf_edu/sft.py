"""Supervised fine-tuning: next-token loss on the response alone, the prompt masked."""

import torch

from .errors import UserError
from .logprobs import batch_token_logps
from .parallel import spread
from .tokens import by_length, collate, pass_rows
from .training import TrainConfig, epoch_order, train


def train_sft(policy, prompts, responses, *, tokenizer, config: TrainConfig, batch_size: int = 64, **loop):
    """Train `policy` in place on (prompt ids, response ids with EOS); return metrics, one row an update.

    The loss is the mean over all response tokens of the batch, as in InstructGPT's SFT, so that every token
    counts alike; `losses.sft_loss` gives the mean of each response instead.
    """

    if len(prompts) != len(responses) or not any(map(len, responses)):
        raise UserError(
            f"{len(prompts)} prompts do not go with {len(responses)} responses of {sum(map(len, responses))} tokens: give "
            "one response for each prompt, and one token at least"
        )

    def batch_of(step):
        rows = epoch_order(len(prompts), batch_size, step, config.seed)
        return sorted(rows, key=lambda i: len(prompts[i]) + len(responses[i]))  # little padding in each chunk

    def loss_of(rows):
        tokens, chunk = [], pass_rows(policy.device)
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            batch = collate(
                [prompts[i] for i in part],
                [responses[i] for i in part],
                tokenizer.pad_token_id,
                policy.device,
            )
            tokens.append(batch_token_logps(policy, batch))
        return -torch.cat(tokens).mean(), {}

    def split(rows, count):
        return [(part, sum(len(responses[i]) for i in part)) for part in spread(rows, count)]

    return train(policy, batch_of, loss_of, config, split=split, **loop)


@torch.no_grad()
def heldout_loss(policy, prompts, responses, tokenizer, batch_size: int = 128) -> float:
    """Mean negative log-prob per response token (EOS counts), in nats."""
    order = by_length(prompts, responses)
    parts = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate(
            [prompts[i] for i in rows], [responses[i] for i in rows], tokenizer.pad_token_id, policy.device
        )
        parts.append(batch_token_logps(policy, batch))
    return -torch.cat(parts).mean().item()
