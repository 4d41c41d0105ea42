"""Training on comparisons with any loss of `losses`, or with a function of your own of the same argument names."""

import functools
import inspect
from collections.abc import Callable

import numpy as np
import torch

from . import losses, parallel, sharding
from .errors import UserError
from .logprobs import all_logps, batch_logps
from .pairs import TokenPairs, by_chunks, pair_batch, sequences_of, tokenize_pairs
from .training import Memory, TrainConfig, precision, train

GIVEN = {  # what a loss may ask for by name; everything else needs a default or a value in loss_kwargs
    "chosen_logps",
    "rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_lengths",
    "rejected_lengths",
}


def train_preference(
    policy,
    comparisons,
    loss: Callable = losses.dpo_loss,
    *,
    tokenizer,
    config: TrainConfig,
    reference=None,
    loss_kwargs: dict | None = None,
    batch_size: int = 64,
    max_tokens: int = 48,
    reference_cache: dict | None = None,
    **loop,
):
    """Train `policy` in place on comparisons {"prompt", "chosen", "rejected"}; return metrics, one row an update.

    loss: takes the arguments of `GIVEN` it names, each (pairs,), and returns (pairs,); `loss_kwargs` (beta, ...)
    go with them. Reference log-probs are computed once, before training, and only if the loss asks for them:
    under `reference`, by default the policy as it comes in. A loss that asks for `reference_point` (KTO) and gets
    no value is given KTO's estimate of the KL from mismatched pairs.
    batch_size: pairs an update; all pairs of a prompt go in one batch, so it is met on average.
    reference_cache: a dict that keeps reference log-probs from one run on the same comparisons to the next.
    loop: `folder`, `after_step`, `progress`, ... of `training.train`.
    """
    loss_kwargs = dict(loss_kwargs or {})
    wanted = wanted_arguments(loss, loss_kwargs)
    pairs = (
        comparisons
        if isinstance(comparisons, TokenPairs)
        else tokenize_pairs(comparisons, tokenizer, max_tokens=max_tokens)
    )
    pad, device = tokenizer.pad_token_id, policy.device
    needs_point = (
        "reference_point" in inspect.signature(loss).parameters and "reference_point" not in loss_kwargs
    )
    reference_sums = None
    if {"ref_chosen_logps", "ref_rejected_logps"} & set(wanted) or needs_point:
        reference = reference if reference is not None else policy
        cache = reference_cache if reference_cache is not None else {}
        with precision(loop.get("memory") or Memory(), device):  # the policy's: they are compared
            if "sums" not in cache:
                cache["sums"] = shared_logps(reference, pad, pairs.prompts, pairs.responses)
            reference_sums = cache["sums"]
            if needs_point and "mismatched" not in cache:
                cache["mismatched"] = mismatched(pairs, config.seed)
                cache["mismatched_sums"] = shared_logps(reference, pad, *cache["mismatched"])

    def batch_of(step):
        rows = pair_batch(pairs, step, batch_size, config.seed)
        if needs_point:  # one point for the batch, whatever parts of it are computed where
            loss_kwargs["reference_point"] = kl_point(policy, cache, rows, pad)
        return rows

    def loss_of(rows):
        used, chosen, rejected = sequences_of(pairs, rows)
        logps = by_chunks(pairs, used, lambda b: batch_logps(policy, b)[0], pad, device)
        lengths = torch.tensor([len(pairs.responses[i]) for i in used], device=device)
        values = {"chosen_logps": logps[chosen], "rejected_logps": logps[rejected]}
        values |= {"chosen_lengths": lengths[chosen], "rejected_lengths": lengths[rejected]}
        score = (
            logps.detach()
        )  # what the policy ranks by: its log-prob, or the log-ratio where there is a reference
        if reference_sums is not None:
            ref = reference_sums[used].to(device)
            values |= {"ref_chosen_logps": ref[chosen], "ref_rejected_logps": ref[rejected]}
            score = score - ref
        per_pair = loss(**{k: values[k] for k in wanted}, **loss_kwargs)
        check_result(per_pair, len(rows), loss)
        return per_pair.mean(), {
            "accuracy": (score[chosen] > score[rejected]).float().mean(),
            "margin": (score[chosen] - score[rejected]).mean(),
            "chosen_logps": values["chosen_logps"].detach().mean(),
            "rejected_logps": values["rejected_logps"].detach().mean(),
        }

    split = functools.partial(split_pairs, pairs)
    return train(policy, batch_of, loss_of, config, split=split, **loop)


def split_pairs(pairs: TokenPairs, rows, count: int) -> list[tuple[np.ndarray, int]]:
    """Pairs as at most `count` parts with their numbers of pairs; the pairs of a prompt stay together while they can."""
    starts = np.array([start for start, _ in pairs.groups])
    group = np.searchsorted(starts, rows, side="right")
    prompts = np.unique(group)
    if count > len(prompts):  # then a response is computed once in each part that has pairs of it
        parts = np.array_split(rows, count)
    else:
        parts = [rows[np.isin(group, some)] for some in np.array_split(prompts, count)]
    return [(part, len(part)) for part in parts if len(part)]


def shared_logps(model, pad: int, prompts, responses) -> torch.Tensor:
    """`all_logps`, each process computing its share."""

    def part(rows):
        return all_logps(model, pad, [prompts[i] for i in rows], [responses[i] for i in rows])

    return parallel.per_row(part, len(prompts), model.device).cpu()


def wanted_arguments(loss: Callable, loss_kwargs: dict) -> list[str]:
    """The names of `GIVEN` that a loss asks for; a clear word about a name nobody can fill."""
    parameters = inspect.signature(loss).parameters.values()
    name = getattr(loss, "__name__", "your loss")
    wanted = [p.name for p in parameters if p.name in GIVEN]
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    unknown = [n for n in required if n not in GIVEN and n not in loss_kwargs and n != "reference_point"]
    if unknown:
        raise UserError(
            f"{name} asks for {unknown[0]!r}, which training cannot give: use names of {sorted(GIVEN)}"
        )
    accepted = {p.name for p in parameters}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    if not takes_any and (stray := [k for k in loss_kwargs if k not in accepted]):
        raise UserError(f"{name} has no argument {stray[0]!r}: it takes {', '.join(sorted(accepted))}")
    if not wanted:
        raise UserError(
            f"{name} asks for no log-probs, so nothing could be learned: name chosen_logps at least"
        )
    return wanted


def check_result(per_pair, pairs: int, loss: Callable) -> None:
    name = getattr(loss, "__name__", "your loss")
    if not torch.is_tensor(per_pair) or tuple(per_pair.shape) != (pairs,):
        shape = (
            f"shape {tuple(per_pair.shape)}" if torch.is_tensor(per_pair) else f"a {type(per_pair).__name__}"
        )
        raise UserError(
            f"{name} returned {shape}: it must return one value a pair, shape ({pairs},), and no mean"
        )
    if not per_pair.requires_grad:
        raise UserError(f"{name} returned a value without gradient: do not detach the policy's log-probs")


def mismatched(pairs: TokenPairs, seed: int):
    """(prompts, responses): the prompt of each pair with a response to the next other prompt (KTO 4.1)."""
    group_of = np.repeat(np.arange(len(pairs.groups)), [e - s for s, e in pairs.groups])
    other = [pairs.groups[(g + 1) % len(pairs.groups)][0] for g in group_of]
    return [pairs.prompts[i] for i in pairs.chosen], [pairs.responses[pairs.chosen[o]] for o in other]


def kl_point(policy, cache: dict, rows, pad: int) -> torch.Tensor:
    """KTO's reference point: max(0, mean log-ratio of mismatched pairs of this batch), without gradient."""
    prompts, responses = cache["mismatched"]
    rows = rows[:: max(1, len(rows) // 16)]  # an estimate needs no more than some of them
    with sharding.whole(policy):
        logps = shared_logps(policy, pad, [prompts[i] for i in rows], [responses[i] for i in rows])
    return (logps - cache["mismatched_sums"][rows]).mean().clamp(min=0).to(policy.device)
