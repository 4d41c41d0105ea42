"""Where rewards and labels come from: the sentiment oracle, a learned reward model, and simulated labelers."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.special import expit

from .errors import UserError
from .models import class_logits
from .tokens import by_length, chunk_rows, collate
from .training import rng

Score = Callable[
    [Sequence[Sequence[int]], Sequence[Sequence[int]]], np.ndarray
]  # (prompts, responses) -> scores


@torch.no_grad()
def classifier_logits(
    model, pad_id: int, prompts, responses, *, batch_size: int | None = None
) -> torch.Tensor:
    """(n, labels) of a sequence classifier on prompt + response, length-sorted so that little is padding."""
    order = by_length(prompts, responses)
    out, batch_size = (
        torch.empty(len(prompts), model.config.num_labels),
        batch_size or chunk_rows(model.device),
    )
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([prompts[i] for i in rows], [responses[i] for i in rows], pad_id, model.device)
        logits = class_logits(model, batch)
        out[rows] = logits.float().cpu()
    return out


def oracle_score(oracle, tokenizer, *, batch_size: int | None = None) -> Score:
    """Probability that prompt + response is positive: the IMDb experiment's true reward, in [0, 1]."""

    def score(prompts, responses):
        responses = [r[:-1] if len(r) and r[-1] == tokenizer.eos_token_id else r for r in responses]
        logits = classifier_logits(oracle, tokenizer.pad_token_id, prompts, responses, batch_size=batch_size)
        return logits.softmax(-1)[:, 1].double().numpy()

    return score


def text_oracle_score(oracle, oracle_tokenizer, policy_tokenizer, *, batch_size: int = 64) -> Score:
    """The same for an oracle with a tokenizer of its own (hub scales): ids are read back as text first."""
    labels = {v.upper(): k for k, v in oracle.config.id2label.items()}
    positive = labels.get("POSITIVE", labels.get("POS", 1))

    @torch.no_grad()
    def score(prompts, responses):
        texts = policy_tokenizer.batch_decode(
            [[*p, *r] for p, r in zip(prompts, responses, strict=True)], skip_special_tokens=True
        )
        out = []
        for start in range(0, len(texts), batch_size):
            batch = oracle_tokenizer(
                texts[start : start + batch_size], padding=True, truncation=True, return_tensors="pt"
            )
            out.append(oracle(**batch.to(oracle.device)).logits.float().softmax(-1)[:, positive].cpu())
        return torch.cat(out).double().numpy()

    return score


def reward_model_score(model, tokenizer, *, batch_size: int | None = None) -> Score:
    """The scalar of a reward model, read at the last token, EOS."""

    def score(prompts, responses):
        logits = classifier_logits(model, tokenizer.pad_token_id, prompts, responses, batch_size=batch_size)
        return logits[:, 0].double().numpy()

    return score


@dataclasses.dataclass(frozen=True)
class Labeler:
    """A simulated labeler: prefers by Bradley-Terry on reward / temperature + length_preference * tokens.

    temperature: in units of reward; 0 always prefers the higher reward, larger is noisier.
    length_preference: what one more token is worth, in units of reward / temperature (of reward at temperature 0).
    """

    temperature: float = 0.0
    length_preference: float = 0.0
    seed: int = 0

    def utility(self, rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.asarray(rewards) / (self.temperature or 1.0) + self.length_preference * np.asarray(lengths)

    def prefers_first(self, first_rewards, second_rewards, first_lengths, second_lengths) -> np.ndarray:
        """True where the first response is preferred; each argument is (n,)."""
        if self.temperature < 0:
            raise UserError(f"a labeler's temperature is {self.temperature}: it must be 0 (no noise) or more")
        difference = self.utility(first_rewards, first_lengths) - self.utility(second_rewards, second_lengths)
        draw = rng(self.seed, 7).random(len(difference))
        if self.temperature == 0:
            return np.where(difference == 0, draw < 0.5, difference > 0)
        return draw < expit(difference)  # Bradley-Terry
