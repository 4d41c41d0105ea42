"""From logits to the log-prob of a response: the one place where "sum or mean?" is answered.

`response_logps` returns the sum **and** the length; a loss that wants the mean divides in its own line. The
token at position t is predicted by the logits at t - 1, and only tokens under the mask count: EOS does, the
prompt and the padding never do. Logits are raised to float32 before the softmax; float64 stays float64.
"""

import contextlib

import torch

from .tokens import by_length, chunk_rows, collate


def response_logps(logits, token_ids, response_mask):
    """Summed log-prob in nats and length in tokens of each response.

    logits: (batch, time, vocab); token_ids, response_mask: (batch, time) -> sums (batch,), lengths (batch,).
    Logits and ids outside the mask may hold anything, NaN and -100 included.
    """
    _check("response_logps", logits, token_ids, response_mask)
    mask = response_mask.bool()
    if mask[:, 0].any():
        raise ValueError(
            "response_logps: response_mask is true at position 0, where no logits predict the token; "
            "start the sequence with a prompt or BOS token outside the mask"
        )
    mask = mask[:, 1:]
    # Pick before the softmax: a mask multiplied in afterwards lets NaN through, also in the gradient.
    picked = _logps(logits[:, :-1][mask], token_ids[:, 1:][mask])  # (response tokens of the batch,)
    return _sums(picked, mask).to(picked.dtype), mask.sum(dim=1)


def token_logps(logits, token_ids):
    """Log-probs of all tokens but the first: (batch, time, vocab), (batch, time) -> (batch, time - 1)."""
    _check("token_logps", logits, token_ids)
    return _logps(logits[:, :-1], token_ids[:, 1:])


def _logps(logits, targets):
    """log softmax(logits)[target]: (..., vocab), (...) -> (...)."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    with in_vocabulary(logits.shape[-1]):
        return logits.log_softmax(dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


@contextlib.contextmanager
def in_vocabulary(size):
    """One sentence where torch meets a token id that the model does not have."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if "out of bounds" not in str(error) and "out of range" not in str(error):
            raise
        raise ValueError(
            f"a token id lies outside the vocabulary of {size}: use the tokenizer that belongs to this model"
        ) from error


def _sums(values, mask):
    """Sums over each row of `mask` of the values that stand under it, in row order; added up in float64."""
    return values.new_zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, values.double()).sum(dim=1)


def _check(where, logits, token_ids, response_mask=None):
    given = [x for x in (logits, token_ids, response_mask) if x is not None]
    if not all(isinstance(x, torch.Tensor) for x in given[:3]) or token_ids is None:
        raise TypeError(
            f"{where}: pass torch tensors, logits (batch, time, vocab) and the rest (batch, time)"
        )
    if not logits.is_floating_point() or token_ids.dtype != torch.int64 or not logits.shape[1:].numel():
        raise ValueError(
            f"{where}: logits are {logits.dtype} {tuple(logits.shape)}, ids {token_ids.dtype}; pass logits of floats, "
            "ids of int64, and at least one position"
        )
    shapes = [tuple(x.shape) for x in (logits, token_ids, response_mask) if x is not None]
    if len(shapes[0]) != 3 or any(shape != shapes[0][:2] for shape in shapes[1:]):
        raise ValueError(
            f"{where}: the shapes are {', '.join(map(str, shapes))}; pass logits (batch, time, vocab) "
            "and everything else (batch, time), with the logits of all positions, unshifted"
        )


def predicting_states(model, batch):
    """Hidden states that predict the response tokens: (response tokens of the batch, width), in row order.

    The vocabulary is by far the widest layer, so its logits are computed at these positions alone. Padding is on
    the right and attention is causal, so no attention mask is needed: no response token ever sees a pad.
    """
    with in_vocabulary(getattr(model.config, "vocab_size", "this model")):
        hidden = model.base_model(batch["input_ids"], use_cache=False).last_hidden_state
    return hidden[:, :-1][batch["response_mask"][:, 1:]]


def batch_token_logps(model, batch, temperature: float = 1.0):
    """Log-prob of each response token of a collated batch, in row order: (response tokens of the batch,)."""
    logits = model.get_output_embeddings()(predicting_states(model, batch))
    if temperature != 1.0:
        logits = logits / temperature
    return _logps(logits, batch["input_ids"][:, 1:][batch["response_mask"][:, 1:]])


def batch_logps(model, batch):
    """Summed log-probs (float64) and lengths (batch,), as `response_logps` gives them on the full logits.

    A sum of -200 has steps of 1.5e-5 in float32, which padding or another batch size would then move it by.
    """
    mask = batch["response_mask"][:, 1:]
    return _sums(batch_token_logps(model, batch), mask), mask.sum(1)


@torch.no_grad()
def all_token_logps(model, pad_id, prompts, responses, *, batch_size=None, temperature: float = 1.0):
    """Log-probs of the tokens of each response, without gradient: a list of (length,) tensors.

    Batches are sorted by length so that little of the work is padding.
    """
    order = by_length(prompts, responses)
    out, batch_size = [None] * len(prompts), batch_size or chunk_rows(model.device)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([prompts[i] for i in rows], [responses[i] for i in rows], pad_id, model.device)
        parts = batch_token_logps(model, batch, temperature).split([len(responses[i]) for i in rows])
        for i, part in zip(rows, parts, strict=True):
            out[i] = part
    return out


def all_logps(model, pad_id, prompts, responses, *, batch_size=None):
    """Summed log-probs (n,), float64, of many responses, without gradient, on the CPU."""
    parts = all_token_logps(model, pad_id, prompts, responses, batch_size=batch_size)
    return torch.stack([part.double().sum() for part in parts]).cpu() if parts else torch.empty(0)
