"""Comparisons as batches of token ids, each response of a batch computed once however many pairs share it.

With K completions a prompt, K-choose-2 pairs share K responses: four forward passes serve six pairs
(InstructGPT 3.5 does this for the reward model; it holds for every loss on pairs). The gradient is the same.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from .data import check_comparisons
from .tokens import collate, encode, encode_responses, pass_rows
from .training import epoch_order


@dataclasses.dataclass(frozen=True)
class TokenPairs:
    """Comparisons as indices into lists of distinct (prompt, response) sequences."""

    prompts: list[list[int]]  # of each sequence
    responses: list[list[int]]  # of each sequence, with EOS
    chosen: np.ndarray  # (pairs,) index of the chosen sequence
    rejected: np.ndarray  # (pairs,)
    groups: list[tuple[int, int]]  # pairs [start, end) that share a prompt and so travel together

    def __len__(self):
        return len(self.chosen)


def tokenize_pairs(
    comparisons, tokenizer, *, max_tokens: int = 48, max_prompt: int | None = None
) -> TokenPairs:
    """Tokenize comparisons {"prompt", "chosen", "rejected"}; a prompt that is too long keeps its end."""
    check_comparisons(comparisons)
    texts = [comparisons["prompt"], comparisons["chosen"], comparisons["rejected"]]
    index: dict[tuple[str, str], int] = {}
    sides = [
        np.array([index.setdefault(key, len(index)) for key in zip(texts[0], side, strict=True)])
        for side in texts[1:]
    ]
    prompts = encode(tokenizer, [p for p, _ in index])
    if max_prompt:
        prompts = [p[-max_prompt:] for p in prompts]
    responses = encode_responses(tokenizer, [r for _, r in index], max_tokens=max_tokens)
    starts = [i for i, p in enumerate(texts[0]) if i == 0 or p != texts[0][i - 1]]
    return TokenPairs(
        prompts, responses, *sides, list(zip(starts, [*starts[1:], len(texts[0])], strict=True))
    )


def pair_batch(pairs: TokenPairs, step: int, batch_size: int, seed: int) -> np.ndarray:
    """Indices of the pairs of batch `step`: whole groups, about `batch_size` pairs in all."""
    groups_a_batch = max(1, round(batch_size * len(pairs.groups) / len(pairs)))
    chosen = epoch_order(len(pairs.groups), groups_a_batch, step, seed)
    return np.concatenate([np.arange(*pairs.groups[g]) for g in chosen])


def sequences_of(pairs: TokenPairs, rows: Sequence[int]):
    """(distinct sequence ids, place of each pair's chosen, of each pair's rejected), sorted by length."""
    used = np.unique(np.concatenate([pairs.chosen[rows], pairs.rejected[rows]]))
    used = used[np.argsort([len(pairs.prompts[i]) + len(pairs.responses[i]) for i in used], kind="stable")]
    place = {s: n for n, s in enumerate(used)}
    return used, [place[s] for s in pairs.chosen[rows]], [place[s] for s in pairs.rejected[rows]]


def by_chunks(pairs: TokenPairs, used: Sequence[int], function, pad_id: int, device) -> torch.Tensor:
    """function(batch) -> (rows,) over length-sorted chunks of sequences, so that little of the work is padding."""
    parts, chunk = [], pass_rows(device)
    for start in range(0, len(used), chunk):
        part = used[start : start + chunk]
        batch = collate([pairs.prompts[i] for i in part], [pairs.responses[i] for i in part], pad_id, device)
        parts.append(function(batch))
    return torch.cat(parts)
