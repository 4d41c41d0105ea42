"""Sampling responses: batched, with a key-value cache, ended by EOS, the same for the same seed."""

import numbers
from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from .errors import UserError
from .logprobs import in_vocabulary
from .training import torch_rng


class RoomyLayer(DynamicLayer):
    """A key-value cache with room for `room` tokens from the start; `DynamicLayer` copies all of it for each token."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def update(self, key_states, value_states, *args, **kwargs):
        """Add keys and values (batch, heads, new, width of a head); return those of all tokens so far."""
        before = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self.room, key_states.shape[3])
            self.both = key_states.new_empty(2, *shape)
        end = before + key_states.shape[2]
        self.both[0, :, :, before:end] = key_states
        self.both[1, :, :, before:end] = value_states
        self.keys, self.values = self.both[:, :, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices):
        self.both = self.both[:, indices]
        self.keys, self.values = self.both[:, :, :, : self.get_seq_length()]


def cache_for(policy, room: int) -> DynamicCache:
    cache = DynamicCache(config=policy.config)
    if all(type(layer) is DynamicLayer for layer in cache.layers):  # other models keep a window, or more
        cache.layers = [RoomyLayer(room) for _ in cache.layers]
    return cache


@torch.no_grad()
def sample(
    policy,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    max_tokens: int = 48,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> list[list[int]]:
    """One response (token ids, with EOS unless it ran into `max_tokens`) for each prompt (token ids).

    temperature divides the logits; 0 takes the likeliest token. top_p keeps the smallest set of tokens whose
    probability reaches it. At temperature 1 and top_p 1 the responses are samples of the policy, which is what
    a KL estimate needs.
    """
    real = isinstance(temperature, numbers.Real) and isinstance(top_p, numbers.Real)
    real = real and isinstance(max_tokens, numbers.Integral)
    if not (real and 0 <= temperature < float("inf") and 0 < top_p <= 1 and max_tokens >= 1):
        raise UserError(
            f"temperature {temperature}, top_p {top_p} and max_tokens {max_tokens}: need temperature >= 0, "
            "0 < top_p <= 1 and max_tokens >= 1"
        )
    if not all(len(p) for p in prompts):
        raise UserError("an empty prompt gives the policy nothing to continue: give each at least one token")
    context = getattr(policy.config, "n_positions", None) or getattr(
        policy.config, "max_position_embeddings", 2**30
    )
    longest = max((len(p) for p in prompts), default=0)
    if longest >= context:
        raise UserError(f"a prompt of {longest} tokens leaves no room in a context of {context}: shorten it")
    max_tokens = min(max_tokens, context - longest)
    was_training = policy.training
    policy.eval()
    responses: list[list[int]] = []
    for number, start in enumerate(range(0, len(prompts), batch_size)):
        generator = torch_rng(seed, number, device=policy.device)
        batch = prompts[start : start + batch_size]
        with in_vocabulary(getattr(policy.config, "vocab_size", "this model")):
            responses += _sample_batch(policy, batch, eos_id, max_tokens, temperature, top_p, generator)
    policy.train(was_training)
    return responses


def _sample_batch(policy, prompts, eos_id, max_tokens, temperature, top_p, generator) -> list[list[int]]:
    device, width = policy.device, max(map(len, prompts))
    # prompts are padded on the left, so that every row's next token stands in the same column
    ids = torch.full((len(prompts), width), eos_id)
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        attention[row, width - len(prompt) :] = 1
    ids, attention = ids.to(device), attention.to(device)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    cache = cache_for(policy, width + max_tokens)
    rows = torch.arange(len(prompts), device=device)  # which prompt each row of the batch belongs to
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    chosen = torch.full((len(prompts), max_tokens), -1, device=device)
    for column in range(max_tokens):
        logits = policy(
            ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if column == 0 and logits.isnan().any():  # nothing would be said of it otherwise: argmax takes a NaN
            raise UserError(
                "the policy gives NaN for logits, its weights are spoilt: load it again, or train slower"
            )
        token = choose(logits.float(), temperature, top_p, generator)
        chosen[rows, column] = token
        finished = finished | (token == eos_id)
        ended = int(finished.sum())
        if ended == len(rows):
            break
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], 1)
        positions = positions[:, -1:] + 1
        ids = token[:, None]
        if (
            ended > len(rows) // 8
        ):  # dropping finished rows copies the cache: worth it only for several at once
            keep = (~finished).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, ids, finished = rows[keep], ids[keep], finished[keep]
            attention, positions = attention[keep], positions[keep]
    return [_until_end(row, eos_id) for row in chosen.tolist()]


def _until_end(row: list[int], eos_id: int) -> list[int]:
    end = row.index(eos_id) + 1 if eos_id in row else (row.index(-1) if -1 in row else len(row))
    return row[:end]


def choose(logits, temperature: float, top_p: float, generator) -> torch.Tensor:
    """One token for each row of logits (batch, vocab)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill(before.ge(top_p).gather(-1, order.argsort(-1)), -torch.inf)
    return (by_cumulative if logits.device.type == "cpu" else by_gumbel)(logits, generator)


def by_gumbel(logits, generator) -> torch.Tensor:
    """Samples of the softmax in one pass: the argmax of logits - log(exponential)."""
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - noise.log()).argmax(-1)


def by_cumulative(logits, generator) -> torch.Tensor:
    """Samples of the softmax from one random number a row: the first token at which the summed probabilities pass it.

    A CPU draws random numbers one after another; without one for each token generation takes two thirds of the time.
    """
    summed = logits.softmax(-1).cumsum(-1)
    total = summed[:, -1:]
    drawn = total * torch.rand(total.shape, generator=generator, dtype=total.dtype, device=logits.device)
    drawn = drawn.minimum(total.nextafter(torch.zeros_like(total)))  # at the total it would name no token
    return torch.searchsorted(summed, drawn, right=True)[:, 0]
